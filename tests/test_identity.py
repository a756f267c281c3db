"""Real text at temperature 0: `model.generate(custom_generate=decoder)` says token for token what `model.generate` says.

The embedded target in float32 with its real heads, on the held-out prompts of all domains, in ragged batches.

A forward over a round's tokens and one over a single token add up the same numbers in another order. Where the two largest
logits all but tie, the argmax may then fall either way. Such a text is counted, not hidden: its first difference has to be at a
tie, and there must be next to none.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from hedgespec import DecodeConfig, Decoder, Tree, load_zoo
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.zoo import EXPERTS, load_prompts

BATCH = 4
TIE = 1e-4
"""Largest difference of the two best logits, of some 20, that counts as a tie."""
MOST_TIES = 0.01
"""Share of the texts that may differ by one."""


@pytest.fixture(scope="module")
def zoo():
    return load_zoo()


@dataclass(frozen=True)
class Difference:
    """Where a text first leaves the target's own."""

    number: int
    position: int
    margin: float
    """Between the two best logits of the target, of which the texts have one each; inf where one has another token."""


def difference(target, number: int, own: torch.Tensor, other: torch.Tensor, prompt_length: int) -> Difference | None:
    if own.tolist() == other.tolist():
        return None
    alike = min(len(own), len(other))
    apart = (own[:alike] != other[:alike]).nonzero()
    if not len(apart):
        return Difference(number, alike - prompt_length, float("inf"))  # one ended and the other went on
    position = int(apart[0])
    with torch.inference_mode():
        best = target(own[None, :position], logits_to_keep=1).logits[0, -1].topk(2)
    tied = set(best.indices.tolist()) == {int(own[position]), int(other[position])}
    return Difference(number, position - prompt_length, float(best.values[0] - best.values[1]) if tied else float("inf"))


def check(zoo, decoders: dict[str, Decoder], count: int, new_tokens: int) -> None:
    """Decodes the first `count` prompts `BATCH` at a time; expects of each what plain generate says to it alone."""
    texts = [prompt.text for prompt in load_prompts()[:count]]
    assert len(texts) == count
    found: dict[str, list[Difference]] = {name: [] for name in decoders}
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    for first in range(0, count, BATCH):
        inputs = zoo.tokenizer(texts[first : first + BATCH], return_tensors="pt", padding=True, padding_side="left")
        together = {
            name: zoo.target.generate(**inputs, **options, custom_generate=decoder) for name, decoder in decoders.items()
        }
        for row, mask in enumerate(inputs.attention_mask.bool()):
            prompt = inputs.input_ids[row][mask][None]
            [own] = zoo.target.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            for name, sequences in together.items():
                one = sequences[row][len(mask) - prompt.shape[1] :]
                one, padding = one[: len(own)], one[len(own) :]  # a row that ended is filled up
                apart = difference(zoo.target, first + row, own, one, prompt.shape[1])
                assert apart is not None or (padding == zoo.target.generation_config.pad_token_id).all()
                found[name] += [apart] if apart else []
    for name, apart in found.items():
        print(f"{name}: {len(apart)} of {count} texts differ: {apart}")
        assert all(one.margin <= TIE for one in apart), (name, apart)
        assert len(apart) <= MOST_TIES * count, (name, apart)


def test_20_prompts_are_continued_as_plain_generate_does(zoo):
    assert {prompt.domain for prompt in load_prompts()[:20]} == set(EXPERTS)
    check(zoo, {"default": Decoder(zoo.target, zoo.drafters)}, 20, new_tokens=12)


def test_8_prompts_are_continued_as_plain_generate_does_by_trees(zoo):
    config = DecodeConfig(proposal="argmax", tree=Tree(8, size=16))
    drafters = [*zoo.drafters, NGramDrafter(zoo.target.config.vocab_size)]
    check(zoo, {"tree": Decoder(zoo.target, drafters, config)}, 8, new_tokens=12)


@pytest.mark.slow
def test_all_held_out_prompts_are_continued_as_plain_generate_does(zoo):
    """All 240; heads and prompt lookup, and what else may make a difference."""
    drafters = [*zoo.drafters, NGramDrafter(zoo.target.config.vocab_size)]
    decoders = {
        "sampled": Decoder(zoo.target, drafters, DecodeConfig(evaluate_every=4)),
        "argmax, bandit, short": Decoder(zoo.target, drafters, DecodeConfig(proposal="argmax", learner="exp3", draft_length=3)),
        "tree": Decoder(zoo.target, drafters, DecodeConfig(tree=Tree((3, 2, 1, 1, 1)))),
    }
    count = len(load_prompts())
    assert count >= 200
    check(zoo, decoders, count, new_tokens=32)


def test_a_difference_is_a_tie_or_it_is_not(zoo):
    """The measure itself: another token than the best two, and a text that ends early, are no ties."""
    prompt = zoo.tokenizer(load_prompts()[0].text, return_tensors="pt").input_ids
    with torch.inference_mode():
        best = zoo.target(prompt, logits_to_keep=1).logits[0, -1].topk(3)
    own, second, third = (torch.cat([prompt[0], token[None]]) for token in best.indices)
    assert difference(zoo.target, 0, own, own, prompt.shape[1]) is None
    apart = difference(zoo.target, 0, own, second, prompt.shape[1])
    assert apart.position == 0
    assert apart.margin == pytest.approx(float(best.values[0] - best.values[1]), abs=TIE)
    assert difference(zoo.target, 0, own, third, prompt.shape[1]).margin == float("inf")
    assert difference(zoo.target, 0, own, prompt[0], prompt.shape[1]).margin == float("inf")
