"""A short text by which a target of code that is not known shows how its forward may be used.

Models of transformers are known by the tests of this package (docs/compatibility.md). Any other code is tried once: whether a
forward over several tokens gives what token after token gives, and whether one forward can serve rows of different lengths and
draft trees. It costs about ten forwards, of at most 48 tokens, when the first decoder for the model is made.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn

from hedgespec.linear import few_row_view
from hedgespec.positions import context_of, table_size
from hedgespec.target import TargetSession, device_of, rows_may_differ
from hedgespec.tree import ancestry

KNOWN = {"torch", "transformers", "hedgespec", "accelerate", "bitsandbytes", "torchao", "gptqmodel", "auto_gptq", "awq", "hqq",
         "compressed_tensors", "optimum", "quanto", "eetq", "aqlm", "kernels", "liger_kernel"}  # fmt: skip
"""Packages whose modules compute a layer of transformers in another way, or are such layers."""
LONG, SHORT, NEXT = 24, 9, 4
"""Tokens of two texts, and of those that follow each."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""By dtype, of the greatest logit: by how much logits may differ. 0.05 for half types."""
_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, bool]] = weakref.WeakKeyDictionary()


def may_be_ragged(model) -> bool:
    """Returns whether rows of different lengths, and draft trees, may go through one forward of the model.

    Raises: ValueError if several tokens in one forward do not give what one after another gives.
    """
    foreign = tuple(name for name, module in model.named_modules() if _is_foreign(module))
    if not foreign or model.training:
        return True
    kinds = tuple(type(model.get_submodule(name)) for name in foreign)
    if model not in _FOUND or _FOUND[model][0] != kinds:
        _FOUND[model] = kinds, _try(model)
    return _FOUND[model][1]


def _is_foreign(module: nn.Module) -> bool:
    if type(module).__module__.partition(".")[0] not in KNOWN:
        return True
    own = vars(module).get("forward")
    own = getattr(own, "_torchdynamo_orig_callable", own)
    return (
        own is not None
        and (getattr(own, "__func__", getattr(own, "func", own)).__module__ or "").partition(".")[0] not in KNOWN
    )


@torch.no_grad()
def _try(model) -> bool:
    ends = [end for end in (context_of(model), table_size(model)) if end is not None]
    long = min(LONG, *(end - NEXT for end in ends)) if ends else LONG
    short = min(SHORT, long - 1)
    if short < 1:
        return False
    device, vocabulary = device_of(model), model.config.get_text_config(decoder=True).vocab_size
    random = torch.Generator().manual_seed(0)
    texts = torch.randint(vocabulary, (2, long + NEXT), generator=random).to(device)
    ahead = [texts[0, long:], texts[1, short : short + NEXT]]
    view = few_row_view(model)

    def session(*rows: int) -> TargetSession:
        offsets = [(0, long - short)[row] for row in rows]
        one = TargetSession(view, [], len(rows), offsets=offsets, floor=long)
        counts = [(long, short)[row] for row in rows]
        one.forward(texts[list(rows), : max(counts)], 1, reach=counts)
        one.keep(counts)
        return one

    alone = session(0)
    expected = [alone.forward(ahead[0][None], NEXT)[0]]
    trees = rows_may_differ(model)
    if trees:
        # The root, its child, another child that is not the text's, and the first child's child.
        nodes = torch.stack([ahead[0][0], ahead[0][1], (ahead[0][1] + 1) % vocabulary, ahead[0][2]])[None]
        try:
            found = alone.forward(nodes, NEXT, ancestry(torch.tensor([[-1, -1, 0]], device=device), 2))[0]
            trees = _alike(found[[0, 1, 3]], expected[0][:3])
        except (RuntimeError, ValueError, IndexError):
            trees = False
    for position in range(2):
        found = alone.forward(ahead[0][None, position : position + 1], 1)[0]
        alone.keep([1])
        if not _alike(found, expected[0][position : position + 1]):
            raise ValueError(
                f"target: expected a model whose forward over {NEXT} tokens gives the logits that it gives token after token, "
                f"got {type(model).__name__}, where they differ at token {long + position + 1} of a text"
            )
    if not trees:
        return False
    expected.append(session(1).forward(ahead[1][None], NEXT)[0])
    try:
        found = session(0, 1).forward(torch.stack(ahead), NEXT)
    except (RuntimeError, ValueError, IndexError):
        return False
    return all(map(_alike, found, expected))


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    scale = expected.abs().amax().clamp(min=torch.finfo(expected.dtype).tiny)
    return bool((found - expected).abs().amax() <= TOLERANCE.get(expected.dtype, 0.05) * scale)
