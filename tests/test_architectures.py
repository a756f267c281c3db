"""Every architecture of tests/helpers/architectures.py: one row, a ragged batch and trees give plain `generate`'s text."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import ARCHITECTURES, QUICK, build
from helpers.texts import TREE, check_same_text, plain_texts, prompts

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.drafters.ngram import NGramDrafter

COUNT = 14


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(one, id=one.name, marks=() if one.name in QUICK else pytest.mark.slow) for one in ARCHITECTURES],
)
def test_texts_are_plain_decodings_own(architecture):
    try:
        model = build(architecture)
    except KeyError:
        pytest.skip(f"{architecture.name} is not in the installed transformers")
    together = architecture.rows == "together"
    one, ragged = prompts(11), prompts(12, 7)
    check_same_text(model, one, COUNT, trees=together)
    decoder = Decoder(model, [NGramDrafter(61)])
    assert decoder.together == together
    if architecture.rows == "unpadded":
        with pytest.raises(ValueError, match="attention_mask: expected no padding"):
            decoder.generate(**ragged, max_new_tokens=4)
    else:
        texts = plain_texts(model, ragged, COUNT)
        assert len({*texts[0], *texts[1]}) > 2  # or it is NaN throughout that is compared
        check_same_text(model, ragged, COUNT, texts=texts, trees=together)
    if not together:
        with pytest.raises(ValueError, match="tree: expected a target that takes positions and a mask"):
            Decoder(model, [NGramDrafter(61)], DecodeConfig(draft_length=3, tree=TREE))


def test_local_attention_within_its_window_is_as_any_other():
    """Layers hold masks of their own, but these hide nothing."""
    from hedgespec.target import windows_by_slot

    [architecture] = [one for one in ARCHITECTURES if one.name == "gpt_neo"]
    model = build(architecture)
    assert windows_by_slot(model)
    for module in model.modules():
        if isinstance(module._buffers.get("bias"), torch.Tensor):
            module.bias = torch.ones_like(module.bias).tril()
    assert not windows_by_slot(model)
    check_same_text(model, prompts(12, 7), COUNT)
