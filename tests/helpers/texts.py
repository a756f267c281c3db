"""Small models and batches for tests that compare texts with plain `generate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from hedgespec.config import DecodeConfig, Tree
from hedgespec.decoder import Decoder
from hedgespec.drafters.ngram import NGramDrafter
from helpers.oracle import Oracle

VOCABULARY = 61
TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
TREE = Tree((2, 2, 1))


def tiny(family: str = "Llama", model_class: type | None = None, **options):
    """Returns a random model in float64, by the name of its configuration in transformers or of a class of one's own."""
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**TINY | options)
    model = model_class(config) if model_class else transformers.AutoModelForCausalLM.from_config(config)
    return model.double().eval()


def prompts(*lengths: int, width: int | None = None) -> dict[str, torch.Tensor]:
    """Returns `input_ids` and `attention_mask` of a left-padded batch of prompts of these lengths."""
    width = width or max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def plain_texts(model, batch: dict[str, torch.Tensor], count: int, **options) -> list[list[int]]:
    """Returns what plain greedy `generate` continues a batch with."""
    asked = {"max_new_tokens": count, "do_sample": False} | options
    return model.generate(**batch, **asked)[:, batch["input_ids"].shape[1] :].tolist()


def knowing_pool(batch: dict[str, torch.Tensor], texts: Sequence[Sequence[int]]) -> list:
    """Returns prompt lookup and a drafter that knows the texts, mostly."""
    known = [[*ids[mask.bool()].tolist(), *text] for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], texts)]
    return [Oracle(known, VOCABULARY), NGramDrafter(VOCABULARY)]


def check_same_text(model, batch: dict[str, torch.Tensor], count: int, *, texts: list[list[int]] | None = None,
                    trees: bool = True, config: DecodeConfig | None = None) -> None:  # fmt: skip
    """Asserts that both doors give plain `generate`'s text for a batch, with chains and trees, and that drafts are used."""
    width = batch["input_ids"].shape[1]
    texts = texts or plain_texts(model, batch, count)
    for tree in (None, TREE) if trees else (None,):
        one = config or DecodeConfig(draft_length=3, tree=tree)
        decoder = Decoder(model, knowing_pool(batch, texts), one)
        out = decoder.generate(**batch, max_new_tokens=count)
        assert out.sequences[:, width:].tolist() == texts, f"Decoder.generate, {tree}"
        assert not any(stats.failures for stats in out.stats)
        assert sum(stats.rounds for stats in out.stats) < 0.8 * len(texts) * count  # or nothing was drafted
        found = model.generate(**batch, max_new_tokens=count, do_sample=False, custom_generate=decoder)
        assert found[:, width:].tolist() == texts, f"generate, {tree}"


def error_of(call) -> BaseException:
    """Returns the exception that a call raises."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("expected an error")
