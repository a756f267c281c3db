"""The drafters of a batch: stacks of unequal heads beside other drafters, failures, cadence."""

from __future__ import annotations

import copy
import math
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.batches import Apart, batch_of, other_head, pool
from helpers.decoding import VOCABULARY, prompt_of, tiny_head, tiny_llama
from helpers.learners import ScoredFixedLearner
from torch.overrides import TorchFunctionMode

from hedgespec.config import DecodeConfig, Tree
from hedgespec.decoder import Decoder, verification
from hedgespec.decoder.batch import Batch
from hedgespec.decoder.groups import NON_FINITE_LOGITS
from hedgespec.decoder.verification import Verifier
from hedgespec.drafters.eagle import EagleHead, EagleSession
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.drafters.stack_session import StackSession
from hedgespec.errors import VocabularyMismatchError
from hedgespec.runtime.target import TargetSession
from hedgespec.selection.selector import MAX_EVALUATE_EVERY, Selector


@pytest.fixture(scope="module")
def target():
    return tiny_llama(seed=0, layers=4)


@pytest.mark.parametrize("every", [1, 3, "adaptive"])
@pytest.mark.parametrize(
    ("learner", "options"),
    [("normal_hedge", {}), ("ucb", {}), ("exp3", {}), ("uniform", {}), ("fixed", {})],
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
    assert all(NON_FINITE_LOGITS in cause for cause in out.stats[1].failures.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("processed", [False, True])
def test_an_unsound_draft_is_not_used(target, monkeypatch, temperature, processed):
    """A head whose drafts turn to NaN is found out at the verification, if the evaluation has not seen it: nothing is
    emitted because of it."""

    class Faulty(StackSession):
        def draft_next(self, chosen, tokens):
            return super().draft_next(chosen, tokens) * math.nan

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
        def begin_draft(self, *arguments):
            raise RuntimeError("out of memory")

    expected = target.generate(**batch_of(3), max_new_tokens=30, do_sample=False)
    session = EagleHead.session
    monkeypatch.setattr(EagleHead, "session", lambda head: 1 / 0 if head.name == "head-2" else session(head))
    monkeypatch.setattr("hedgespec.drafters.stack.StackSession", Faulty)
    decoder = Decoder(target, heads, DecodeConfig(draft_length=3))
    with pytest.warns(UserWarning, match="heads run one by one|is out of this request") as caught:
        out = decoder.generate(**batch_of(3), max_new_tokens=30, seed=0)
    assert [str(one.message).split(":")[0] for one in caught] == [
        "stacked heads run one by one from now on", "drafter head-2 is out of this request",
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
    # The prompt, after rounds 1, 2, 4, 8, then each MAX_EVALUATE_EVERY-th, and the end.
    rare = (rounds - MAX_EVALUATE_EVERY) // MAX_EVALUATE_EVERY
    assert len(calls) in (4 + 1 + rare, 4 + 2 + rare)


def test_a_window_changes_drafts_and_no_text(target):
    config = DecodeConfig(draft_length=3, drafter_window=16)
    out = Decoder(target, pool(target, True), config).generate(**batch_of(3), max_new_tokens=80, seed=0)
    assert out.sequences.tolist() == target.generate(**batch_of(3), max_new_tokens=80, do_sample=False).tolist()
    assert not any(stats.failures for stats in out.stats)
    whole = Decoder(target, pool(target, True)).generate(**batch_of(3), max_new_tokens=80, seed=0)
    assert 0 < out.stats[0].drafter_cache_bytes < whole.stats[0].drafter_cache_bytes


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("overlap", [False, True])
def test_losses_arrive_a_round_later_where_evaluation_overlaps(target, monkeypatch, overlap, every):
    seen = []

    def observe(selector, prob, ratio, seconds):
        seen.append((selector.stats.rounds, prob.shape[1]))
        original(selector, prob, ratio, seconds)

    original = Selector.observe
    monkeypatch.setattr(Selector, "observe", observe)
    decoder = Decoder(target, pool(target, True), DecodeConfig(draft_length=3, evaluate_every=every))
    decoder.overlaps = overlap
    out = decoder.generate(prompt_of(1), max_new_tokens=30, seed=0)
    stats = out.stats[0]
    assert out.sequences.tolist() == target.generate(prompt_of(1), max_new_tokens=30, do_sample=False).tolist()
    # Rounds that were over when the learner heard, and of how many tokens: at the end of everything that is left.
    scored = [round for round in range(stats.rounds) if (round + 1) % every == 0 or round == stats.rounds - 1]
    heard = [min(round + overlap, stats.rounds - 1) for round in scored]
    counts = [sum(part) for part in np.split(stats.emitted_by_round, np.array(scored[:-1]) + 1)]
    assert seen == list(zip(heard, counts))
    # A drafter stays until the learner has heard.
    for round in range(1, stats.rounds - 1):
        assert stats.choices[round] == stats.choices[round - 1] or round - 1 in heard


def test_overlap_changes_when_losses_arrive_and_not_which(target):
    runs = []
    for overlap in (False, True):
        decoder = Decoder(target, pool(target, True), DecodeConfig(draft_length=3, learner=ScoredFixedLearner))
        decoder.overlaps = overlap
        runs.append(decoder.generate(**batch_of(3), max_new_tokens=30, temperature=1.0, seed=0))
    assert runs[0].sequences.tolist() == runs[1].sequences.tolist()
    for one, other in zip(*(run.stats for run in runs)):
        np.testing.assert_array_equal(one.losses, other.losses)


OPERATIONS = {"checks", "evaluate", "verify", "head_layers", "linear", "gumbel", "native"}
"""Modules that look at values on the CPU only."""


class HostReads(TorchFunctionMode):
    """Counts by method and dtype how often hedgespec's modules, but for `OPERATIONS`, ask a tensor for its values."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__"):
            frame = sys._getframe(1)
            while "torch" in Path(frame.f_code.co_filename).parts:
                frame = frame.f_back
            module = frame.f_globals.get("__name__", "")
            if module.startswith("hedgespec.") and module.rpartition(".")[2] not in OPERATIONS:
                self.counts[name, args[0].dtype] += 1
        return function(*args, **kwargs or {})


SHAPES = [{}, {"tree": Tree(3, size=9), "proposal": "argmax"}, {"tree": Tree((3, 2, 1))}]


def reads_of(target, monkeypatch, shape, temperature) -> tuple[Counter, int]:
    """Host reads of the rounds of three requests, and how many rounds those are."""
    heads = [tiny_head(target, 1), other_head(target, 2), tiny_head(target, 3)]
    decoder = Decoder(target, heads, DecodeConfig(draft_length=3, **shape))
    decoder.overlaps = True
    reads, round = HostReads(), Batch.round

    def watched(self):
        with reads:
            round(self)

    monkeypatch.setattr(Batch, "round", watched)
    stats = decoder.generate(**batch_of(3), max_new_tokens=25, temperature=temperature, seed=0).stats
    return reads.counts, max(one.rounds for one in stats)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_round_asks_the_device_once(target, monkeypatch, shape, temperature):
    """What heads draft, verify and evaluate stays where it is: the host waits for the emitted tokens, and for nothing else."""
    counts, rounds = reads_of(target, monkeypatch, shape, temperature)
    times = counts.pop(("tolist", torch.int64))
    assert rounds <= times <= rounds + 3  # a row's last round may have no draft, and is verified apart
    assert set(counts) == {
        ("__bool__", torch.bool),  # whether logits are finite, on the CPU only
        ("numpy", torch.float64),  # scores that were sent a round ago
    }


@pytest.mark.parametrize("read", ["tolist", "item", "__bool__"])
def test_another_read_in_a_round_is_seen(target, monkeypatch, read):
    """In the forward of every round, say."""
    forward = TargetSession.forward

    def curious(self, *arguments, **options):
        logits = forward(self, *arguments, **options)
        getattr(logits.argmax() if read == "tolist" else logits[0, 0, 0], read)()
        return logits

    monkeypatch.setattr(TargetSession, "forward", types.FunctionType(
        curious.__code__, {**globals(), "__name__": "hedgespec.runtime.target"}, closure=curious.__closure__))  # fmt: skip
    with pytest.raises(AssertionError):
        test_a_round_asks_the_device_once(target, monkeypatch, {}, 1.0)


@pytest.mark.parametrize("fault", ["nan", "raises"])
@pytest.mark.parametrize("stacked", [True, False])
def test_what_was_drafted_before_a_fault_counts(target, monkeypatch, fault, stacked):
    """Whether a position goes wrong may depend on the tokens before it: to drop these too would make some tokens rarer."""
    steps = []

    def faulty(step):
        def wrapped(self, *arguments):
            steps.append(1)
            if len(steps) == 2 and fault == "raises" and not stacked:
                raise RuntimeError("broken")
            logits = step(self, *arguments)
            return logits * math.nan if len(steps) >= 2 and fault == "nan" else logits

        return wrapped

    if fault == "raises" and stacked:
        pytest.skip("a stack that raises drafts anew, head by head, with the same random numbers")
    monkeypatch.setattr(StackSession, "draft_next", faulty(StackSession.draft_next))
    monkeypatch.setattr(EagleSession, "step", faulty(EagleSession.step))
    head = tiny_head(target, 1)
    if not stacked:
        head.__class__ = Apart
    drafts = []
    verify = Verifier.verify

    def seen(self, rows, logits, given, *rest):
        drafts.extend(given)
        return verify(self, rows, logits, given, *rest)

    monkeypatch.setattr(Verifier, "verify", seen)
    with pytest.warns(UserWarning, match="head-1 is out of this request"):
        Decoder(target, [head], DecodeConfig(draft_length=4)).generate(prompt_of(2), max_new_tokens=9, temperature=1.0, seed=0)
    first = drafts[1]  # the prompt's has none
    drafted = len(first.tokens)
    assert (drafted if first.usable is None else min(drafted, int(first.usable))) == 2


def test_drafts_of_different_dtypes_are_verified_apart(target, monkeypatch):
    """In one call all would have the dtype of the first, and not be what was drawn from."""
    low = NGramDrafter(VOCABULARY, name="low")
    session = low.session

    def lowered(call):
        return lambda *arguments: call(*arguments).bfloat16()

    def half():
        one = session()
        one.consume, one.step = lowered(one.consume), lowered(one.step)
        return one

    low.session = half
    calls, verify = [], verification.verify

    def seen(target_logits, draft_tokens, draft_logits, *arguments, **options):
        calls.append(None if draft_logits is None else draft_logits.dtype)
        return verify(target_logits, draft_tokens, draft_logits, *arguments, **options)

    monkeypatch.setattr(verification, "verify", seen)
    config = DecodeConfig(draft_length=2, learner="uniform")
    Decoder(target, [low, NGramDrafter(VOCABULARY)], config).generate(**batch_of(4), max_new_tokens=20, temperature=1.0, seed=0)
    assert {torch.bfloat16, torch.float32} <= set(calls)


def test_a_window_and_a_learner_that_scores_nobody(target):
    """Tokens that a head leaves out count once."""
    sessions = []

    class Seen(StackSession):
        def begin_draft(self, rows, heads, tokens, features):
            sessions.append(self)
            assert all(len(one) > 0 for one in tokens)
            return super().begin_draft(rows, heads, tokens, features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hedgespec.drafters.stack.StackSession", Seen)
        config = DecodeConfig(learner="fixed", drafter_window=16, draft_length=2)
        prompt = prompt_of(3, 40)
        stats = Decoder(target, [tiny_head(target, 1)], config).generate(prompt, max_new_tokens=30).stats[0]
    assert sessions[-1].consumed[0, 0] <= 40 + stats.emitted_tokens


def test_a_processor_that_fails_on_a_draft_ends_it(target):
    """What it says of a text that is not, and may never be, is nobody's fault."""
    prompt = prompt_of(4)
    text = target.generate(prompt, max_new_tokens=20, do_sample=False)[0].tolist()

    def allowed(_, tokens):
        if tokens.tolist() != text[: len(tokens)]:
            raise ValueError("never heard of it")
        return text[len(tokens) : len(tokens) + 1] or [0]

    decoder = Decoder(target, [tiny_head(target, 1), tiny_head(target, 2), NGramDrafter(VOCABULARY)])
    options = {"max_new_tokens": 20, "do_sample": False, "prefix_allowed_tokens_fn": allowed, "return_dict_in_generate": True}
    out = target.generate(prompt, custom_generate=decoder, **options)
    assert out.sequences[0].tolist() == text
    assert not out.hedgespec[0].failures


def test_heads_with_hooks_or_layers_of_their_own_are_not_stacked(target):
    hooked, wrapped, plain = (tiny_head(target, seed) for seed in (1, 2, 3))
    calls = []
    hooked.lm_head.register_forward_hook(lambda *_: calls.append(1))
    wrapped.o_proj = torch.nn.utils.parametrizations.weight_norm(wrapped.o_proj)
    decoder = Decoder(target, [hooked, wrapped, plain])
    assert [members for members, _ in decoder.stacks()] == [[2]]
    out = decoder.generate(prompt_of(1), max_new_tokens=10, seed=0)
    assert calls and not out.stats[0].failures


def test_a_decoder_that_has_decoded_can_be_copied(target):
    decoder = Decoder(target, [tiny_head(target, 1), tiny_head(target, 2)])
    expected = decoder.generate(prompt_of(1), max_new_tokens=10).sequences.tolist()
    assert copy.deepcopy(decoder).generate(prompt_of(1), max_new_tokens=10).sequences.tolist() == expected


def test_a_map_with_an_id_twice_is_refused(target):
    head = tiny_head(target, 1)
    head.draft_to_target[3] = head.draft_to_target[4]
    with pytest.raises(VocabularyMismatchError, match="drafter head-1: expected draft_to_target of distinct ids"):
        Decoder(target, [head])


def test_heads_that_were_written_to_are_stacked_anew(target):
    heads = [tiny_head(target, 1), tiny_head(target, 2)]
    decoder = Decoder(target, heads)
    decoder.generate(prompt_of(1), max_new_tokens=4)
    with torch.no_grad():
        heads[0].fc.weight.mul_(2)
    [(_, stack)] = decoder.stacks()
    assert torch.equal(stack.weights["fc.weight"][0], heads[0].fc.weight)
    heads[1].draft_to_target = heads[1].draft_to_target.flip(0)
    [(_, again)] = decoder.stacks()
    assert again is not stack and torch.equal(again.maps[1], heads[1].draft_to_target)
