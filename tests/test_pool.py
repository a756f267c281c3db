"""The drafters of a batch: stacks of unequal heads beside other drafters, failures, cadence."""

from __future__ import annotations

import linecache
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_decoder import VOCABULARY, prompt_of, tiny_head, tiny_llama
from torch.overrides import TorchFunctionMode

from hedgespec.config import DecodeConfig
from hedgespec.decoder import RAREST, Decoder, Row
from hedgespec.decoder.batch import Batch
from hedgespec.decoder.pool import UNSOUND
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.eagle import EagleHead
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.drafters.stack import StackSession


@pytest.fixture(scope="module")
def target():
    return tiny_llama(seed=0, layers=4)


class Apart(EagleHead):
    """A head that is not stacked: a class of its own may do what it likes."""


def other_head(target, seed: int) -> EagleHead:
    """A head of another shape."""
    like = tiny_head(target, seed)
    head = EagleHead(replace(like.config, intermediate_size=20, aux_layers=(2, 3)), like.embedding, like.draft_to_target)
    head.name = f"other-{seed}"
    generator = torch.Generator().manual_seed(seed)
    for weight in head.double().parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return head.requires_grad_(False).eval()


def pool(target, stacked: bool):
    heads = [tiny_head(target, 1), other_head(target, 2), tiny_head(target, 3), other_head(target, 4), tiny_head(target, 5)]
    if not stacked:
        for head in heads:
            head.__class__ = Apart
    small = CausalLMDrafter(tiny_llama(seed=7, layers=1), target, name="small")
    return [heads[0], small, *heads[1:], NGramDrafter(VOCABULARY)]


def batch_of(count: int) -> dict:
    """Prompts of different lengths, padded on the left."""
    lengths = [11, 3, 7, 1, 9][:count]
    ids = torch.zeros(count, max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = prompt_of(row, length)[0], 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("every", [1, 3, "adaptive"])
@pytest.mark.parametrize(
    ("learner", "options"),
    [("normal_hedge", {}), ("ucb", {}), ("exp3", {"track_regret": True}), ("uniform", {}), ("fixed", {})],
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_stack_decodes_as_its_heads_do_one_after_another(target, every, learner, options, temperature):
    """Two stacks of unequal heads and two other drafters, five rows: text, choices and losses."""
    config = DecodeConfig(draft_length=3, learner=learner, evaluate_every=every, **options)
    request = batch_of(5) | {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
    together, apart = (Decoder(target, pool(target, stacked), config).generate(**request) for stacked in (True, False))
    assert together.sequences.tolist() == apart.sequences.tolist()
    for one, other in zip(together.stats, apart.stats):
        assert not one.failures
        assert one.choices == other.choices
        np.testing.assert_allclose(np.array(one.losses), np.array(other.losses), atol=1e-9)


def test_a_head_that_says_nan_leaves_its_row_and_no_other(target, monkeypatch):
    """Its stack goes on without it, and so do the rows that it served well."""
    drafters = pool(target, True)
    calls = []

    class Faulty(StackSession):
        def _forward(self, now, *arguments, **options):
            hidden, logits = super()._forward(now, *arguments, **options)
            calls.append(len(calls))
            if len(calls) > 12 and hidden.ndim == 4 and 1 in now.places:  # the second row, of each stack's second head
                logits[1, now.places.tolist().index(1)] = math.nan
            return hidden, logits

    expected = target.generate(**batch_of(3), max_new_tokens=40, do_sample=False)
    decoder = Decoder(target, drafters, DecodeConfig(draft_length=3, evaluate_every=1))
    monkeypatch.setattr("hedgespec.drafters.stack.StackSession", Faulty)
    with pytest.warns(UserWarning, match="is out of this request"):
        out = decoder.generate(**batch_of(3), max_new_tokens=40, seed=0)
    assert out.sequences.tolist() == expected.tolist()
    assert [len(stats.failures) for stats in out.stats] == [0, 2, 0]
    assert all(UNSOUND in cause for cause in out.stats[1].failures.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("processed", [False, True])
def test_an_unsound_draft_is_not_used(target, monkeypatch, temperature, processed):
    """A head whose drafts turn to NaN is found out at the verification, if the evaluation has not seen it: nothing is
    emitted because of it."""

    class Faulty(StackSession):
        def step(self, chosen, tokens):
            return super().step(chosen, tokens) * math.nan

    head = tiny_head(target, 1)
    options = {"do_sample": temperature > 0, "max_new_tokens": 20}
    if temperature:
        options |= {"temperature": temperature, "top_k": 0}
    if processed:
        options |= {"repetition_penalty": 1.3}
    monkeypatch.setattr("hedgespec.drafters.stack.StackSession", Faulty)
    decoder = Decoder(target, [head], DecodeConfig(draft_length=3))
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="head-1 is out of this request"):
        out = target.generate(prompt_of(2), custom_generate=decoder, **options)
    assert out.shape[1] == prompt_of(2).shape[1] + 20
    if temperature == 0:
        assert out.tolist() == target.generate(prompt_of(2), **options).tolist()


def test_heads_that_fail_together_go_on_apart(target, monkeypatch):
    """What a stack cannot do its heads may: each is tried by itself, and only those at fault are lost."""
    heads = [tiny_head(target, seed) for seed in (1, 2, 3)]

    class Faulty(StackSession):
        def lead(self, *arguments):
            raise RuntimeError("out of memory")

    expected = target.generate(**batch_of(3), max_new_tokens=30, do_sample=False)
    heads[1].session = lambda: 1 / 0
    monkeypatch.setattr("hedgespec.drafters.stack.StackSession", Faulty)
    decoder = Decoder(target, heads, DecodeConfig(draft_length=3))
    with pytest.warns(UserWarning, match="heads work apart|is out of this request") as caught:
        out = decoder.generate(**batch_of(3), max_new_tokens=30, seed=0)
    assert [str(one.message).split(":")[0] for one in caught] == [
        "stacked heads work apart from now on", "drafter head-2 is out of this request",
    ]  # fmt: skip
    assert out.sequences.tolist() == expected.tolist()
    assert all(list(stats.failures) == ["head-2"] for stats in out.stats)
    assert all(len(stats.losses) > 3 for stats in out.stats)


def test_the_adaptive_cadence_follows_the_choice(target, monkeypatch):
    """Evaluations grow rarer while the same drafter is drawn, and drafters change after an evaluation only."""
    calls = []

    class Counted(StackSession):
        def score(self, *arguments):
            calls.append(1)
            return super().score(*arguments)

    heads = [tiny_head(target, seed) for seed in (1, 2)]
    monkeypatch.setattr("hedgespec.drafters.stack.StackSession", Counted)
    learner = Decoder(target, heads).new_learner()
    for _ in range(400):
        learner.update([0.0, 1.0])
    request = {"max_new_tokens": 120, "learner_state": learner.state_dict(), "temperature": 1.0, "seed": 0}
    certain = Decoder(target, heads).generate(prompt_of(1), **request)
    rounds = certain.stats[0].rounds
    assert set(certain.stats[0].choices) <= {0, -1}
    assert rounds > 40
    # The prompt, after rounds 1, 2, 4, 8, then each RAREST-th, and the end.
    assert len(calls) in (4 + 1 + (rounds - RAREST) // RAREST, 4 + 2 + (rounds - RAREST) // RAREST)


def test_a_window_changes_drafts_and_no_text(target):
    config = DecodeConfig(draft_length=3, drafter_window=16)
    out = Decoder(target, pool(target, True), config).generate(**batch_of(3), max_new_tokens=80, seed=0)
    assert out.sequences.tolist() == target.generate(**batch_of(3), max_new_tokens=80, do_sample=False).tolist()
    assert not any(stats.failures for stats in out.stats)
    whole = Decoder(target, pool(target, True)).generate(**batch_of(3), max_new_tokens=80, seed=0)
    assert 0 < out.stats[0].drafter_cache_bytes < whole.stats[0].drafter_cache_bytes


@pytest.mark.parametrize("overlap", [False, True])
def test_losses_arrive_a_round_later_where_evaluation_overlaps(target, monkeypatch, overlap):
    seen = []

    def observe(row, prob, ratio):
        seen.append((row.stats.rounds, prob.shape[1]))
        original(row, prob, ratio)

    original = Row.observe
    monkeypatch.setattr(Row, "observe", observe)
    config = DecodeConfig(draft_length=3, evaluate_every=1, overlap=overlap)
    out = Decoder(target, pool(target, True), config).generate(prompt_of(1), max_new_tokens=30, seed=0)
    rounds = out.stats[0].rounds
    assert out.sequences.tolist() == target.generate(prompt_of(1), max_new_tokens=30, do_sample=False).tolist()
    # Rounds that were over when the learner heard, and of how many tokens: at the end of everything that is left.
    heard = [min(round + overlap, rounds - 1) for round in range(rounds)]
    assert seen == list(zip(heard, out.stats[0].emitted_by_round))


def test_overlap_changes_when_losses_arrive_and_not_which(target):
    runs = []
    for overlap in (False, True):
        config = DecodeConfig(draft_length=3, learner="fixed", track_regret=True, overlap=overlap)
        request = batch_of(3) | {"max_new_tokens": 30, "temperature": 1.0, "seed": 0}
        runs.append(Decoder(target, pool(target, True), config).generate(**request))
    assert runs[0].sequences.tolist() == runs[1].sequences.tolist()
    for one, other in zip(*(run.stats for run in runs)):
        np.testing.assert_array_equal(one.losses, other.losses)


class HostReads(TorchFunctionMode):
    """Notes which line of the decoder or of a stack asks a tensor for its values."""

    def __init__(self):
        super().__init__()
        self.lines = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__"):
            frame = sys._getframe(1)
            while "torch" in Path(frame.f_code.co_filename).parts:
                frame = frame.f_back
            place = Path(frame.f_code.co_filename)
            if place.parent.name in ("decoder", "drafters") or place.name in ("transfer.py", "target.py", "cache.py"):
                self.lines[linecache.getline(str(place), frame.f_lineno).strip()] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_round_asks_the_device_once(target, monkeypatch, temperature):
    """What heads draft, verify and evaluate stays where it is: the host waits for the emitted tokens, and for nothing else."""
    heads = [tiny_head(target, 1), other_head(target, 2), tiny_head(target, 3)]
    decoder = Decoder(target, heads, DecodeConfig(draft_length=3, overlap=True))
    reads, round = HostReads(), Batch.round

    def watched(self):
        with reads:
            round(self)

    monkeypatch.setattr(Batch, "round", watched)
    stats = decoder.generate(**batch_of(3), max_new_tokens=25, temperature=temperature, seed=0).stats
    rounds = max(one.rounds for one in stats)
    times = reads.lines.pop("found = torch.cat([sound[:, None], verdict.tokens], 1).tolist()")
    assert rounds <= times <= rounds + 3  # a row's last round may have no draft, and is verified apart
    assert set(reads.lines) == {
        "if not logits.is_cpu or not sound.all():",  # on the CPU only
        "*measured, sound = bring()",  # what was sent a round ago
    }
