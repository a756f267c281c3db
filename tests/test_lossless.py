"""Whatever drafts, the text has the target's distribution; and a broken accept rule is noticed.

A Llama without layers sees the last token only, so its text is a Markov chain whose law is a table of 7 x 7. Every emitted
token is a draw from a known row of it, which numpy works out anew from the target's logits. All tokens of a long ragged batch
are counted twice, each time given something that was settled before they were drawn, and compared with that row:

- by their offset in the round that emitted them and the token before them: accepted, recovered and bonus tokens apart;
- by the two tokens before them, which puts the joint law of consecutive tokens to the test.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.markov import MIXED, SMALLEST_P_VALUE, TableDrafter, V, chain, direct, law_of, pool, table_of, through_generate

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder, Request
from hedgespec.integrations.transformers.batch_steps import Recorder
from hedgespec.ops.sampling import Sampling
from hedgespec.records import Verdict

COUNT = 800
"""Tokens a row: 102,400 draws. The mutants below are noticed within a thirtieth of them."""


@pytest.fixture(scope="module")
def target():
    return chain(seed=0)


# --- the law, worked out in numpy -----------------------------------------------------------------------------------


# --- texts ----------------------------------------------------------------------------------------------------------


CASES = {
    "sampled": (DecodeConfig(draft_length=3), {"temperature": 0.8, "top_k": 5}, MIXED),
    "argmax": (DecodeConfig(draft_length=5, proposal="argmax", learner="exp3"), {"temperature": 1.2, "top_p": 0.9}, MIXED),
    "one ahead": (DecodeConfig(draft_length=1, evaluate_every=3), {"temperature": 1.0, "min_p": 0.1}, MIXED),
}
MORE = {
    "throughput": (DecodeConfig(draft_length=2, objective="throughput"), {"temperature": 1.1, "top_k": 6}, MIXED),
    "plain temperature": (DecodeConfig(draft_length=5), {"temperature": 1.0}, MIXED),
    "hot": (DecodeConfig(draft_length=3, evaluate_every=3), {"temperature": 2.5}, ("bad", "reduced")),
    "everything": (
        DecodeConfig(draft_length=3, learner="exp3"), {"temperature": 1.3, "top_k": 6, "top_p": 0.95, "min_p": 0.02}, MIXED,
    ),
    "argmax, one ahead": (DecodeConfig(draft_length=1, proposal="argmax"), {"temperature": 0.7}, MIXED),
    "argmax, seldom scored": (
        DecodeConfig(draft_length=3, proposal="argmax", evaluate_every=3), {"temperature": 1.5, "top_k": 4}, ("good", "ngram"),
    ),
    "a language model": (DecodeConfig(draft_length=3), {"temperature": 1.5, "top_p": 0.9}, ("lm", "reduced", "ngram")),
    "reference": (DecodeConfig(draft_length=3, backend="reference"), {"temperature": 1.0, "top_p": 0.8}, MIXED),
}  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)])
def test_text_has_the_targets_distribution(target, case):
    config, sampling, names = (CASES | MORE)[case]
    assert min(direct(target, pool(target, *names), config, COUNT, **sampling)) > SMALLEST_P_VALUE


PROCESSED = {
    "drafts too": (DecodeConfig(draft_length=3), {"temperature": 1.2, "top_k": 4}),
    "argmax": (DecodeConfig(draft_length=5, proposal="argmax", learner="exp3"), {"temperature": 0.8}),
    "drafts not": (DecodeConfig(draft_length=3, evaluate_every=3), {"temperature": 1.0, "top_p": 0.9, "stateless": False}),
    "scores kept": (DecodeConfig(draft_length=1), {"temperature": 1.0, "min_p": 0.05, "scores": True}),
}


def test_processors_shape_the_distribution(target):
    config, options = PROCESSED["drafts too"]
    assert min(through_generate(target, pool(target, *MIXED), config, COUNT // 10, **options)) > SMALLEST_P_VALUE


@pytest.mark.slow
@pytest.mark.parametrize("case", PROCESSED)
def test_processors_shape_the_distribution_over_many_draws(target, case):
    config, options = PROCESSED[case]
    assert min(through_generate(target, pool(target, *MIXED), config, COUNT, **options)) > SMALLEST_P_VALUE


# --- mutants: the rule once more, and each way to get it wrong -------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Verification, position by position; every field is a place where it may be wrong."""

    accepts: Callable[[float, float, float], bool] = lambda uniform, draft_prob, target_prob: uniform * draft_prob < target_prob
    residual: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda target, draft: np.maximum(target - draft, 0)
    renormalises: bool = True
    processes: bool = True
    """Whether a token is accepted by the target's processed probabilities."""
    bonus: np.ndarray | None = None
    """What the bonus token is drawn from, by the token before it; None: the target."""
    raw: list[torch.Tensor] | None = None
    """Where the last logits lie before the processors of `generate` saw them."""

    def __call__(self, target_logits, draft_tokens, draft_logits, uniforms, *, mode, lengths, draft_to_target,
                 target_temperature, draft_temperature, target_threshold, draft_threshold, backend):  # fmt: skip
        batch, positions, _ = target_logits.shape
        tokens = torch.full((batch, positions), -1)
        accepted = torch.zeros(batch, dtype=torch.int64)
        for row in range(batch):
            drafted = positions - 1 if lengths is None else int(lengths[row])
            for place in range(drafted + 1):
                threshold = -math.inf if target_threshold is None else float(target_threshold[row, place])
                target = _probs(target_logits[row, place], target_temperature, threshold)
                if place == drafted:
                    weights = target if self.bonus is None or place == 0 else self.bonus[tokens[row, place - 1]]
                    tokens[row, place] = _draw(weights, uniforms[row, -1])
                    break
                token = int(draft_tokens[row, place])
                draft = np.zeros(V)
                if mode == "argmax":
                    draft[token] = 1
                else:
                    threshold = -math.inf if draft_threshold is None else float(draft_threshold[row, place])
                    mapping = slice(None) if draft_to_target is None else draft_to_target.view(-1, draft_logits.shape[2])
                    mapping = mapping if draft_to_target is None else mapping[row % len(mapping)].numpy()
                    draft[mapping] = _probs(draft_logits[row, place], draft_temperature, threshold)
                judged = target
                if not self.processes:
                    judged = _probs(self.raw[0][0] if self.raw else target_logits[row, place], target_temperature, -math.inf)
                if self.accepts(float(uniforms[row, place]), draft[token], judged[token]):
                    tokens[row, place], accepted[row] = token, place + 1
                    continue
                weights = self.residual(target, draft)
                weights = weights if weights.any() else target
                tokens[row, place] = _draw(weights, uniforms[row, -1], None if self.renormalises else 1.0)
                break
        return Verdict(accepted, tokens)


def _probs(logits: torch.Tensor, temperature: float, threshold: float) -> np.ndarray:
    logits = logits.double().masked_fill(logits < threshold, -math.inf)
    return (logits / temperature).softmax(-1).numpy()


def _draw(weights: np.ndarray, uniform, total: float | None = None) -> int:
    cumulative = np.cumsum(weights)
    above = np.flatnonzero(cumulative > float(uniform) * (cumulative[-1] if total is None else total))
    return int(above[0]) if len(above) else int(np.flatnonzero(weights)[-1])


HONEST = Rule()
MUTANTS = {
    "accepts with p and q swapped": Rule(accepts=lambda uniform, draft, target: uniform * target < draft),
    "recovers with p and q swapped": Rule(residual=lambda target, draft: np.maximum(draft - target, 0)),
    "does not renormalise the residual": Rule(renormalises=False),
    "recovers from p": Rule(residual=lambda target, draft: target),
    "accepts everything": Rule(accepts=lambda uniform, draft, target: target > 0),
    "accepts unprocessed": Rule(processes=False),
}
SAMPLING = {"temperature": 1.2, "top_k": 4}


def rule_is_noticed(monkeypatch, target, rule: Rule, mode: str) -> bool:
    """Whether the chi-squares reject 2880 draws, all drafted by one fair drafter."""
    monkeypatch.setattr(importlib.import_module("hedgespec.decoder.verification"), "verify", rule)
    config = DecodeConfig(draft_length=3, learner="fixed", proposal=mode)
    return min(direct(target, pool(target, "good"), config, 60, 48, **SAMPLING)) < SMALLEST_P_VALUE


@pytest.mark.parametrize("mode", ["sampled", "argmax"])
def test_the_rule_written_anew_passes(monkeypatch, target, mode):
    assert not rule_is_noticed(monkeypatch, target, HONEST, mode)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_noticed(monkeypatch, target, mutant):
    assert rule_is_noticed(monkeypatch, target, MUTANTS[mutant], "sampled")


@pytest.mark.parametrize("mutant", ["recovers from p", "does not renormalise the residual", "accepts everything"])
def test_mutants_are_noticed_in_mode_argmax(monkeypatch, target, mutant):
    assert rule_is_noticed(monkeypatch, target, MUTANTS[mutant], "argmax")


def test_a_bonus_token_from_the_drafter_is_noticed(monkeypatch, target):
    [good] = pool(target, "good")
    assert rule_is_noticed(monkeypatch, target, Rule(bonus=law_of(good.table, **SAMPLING)[0]), "sampled")


@pytest.mark.parametrize("processes", [True, False])
def test_a_token_accepted_without_the_users_processors_is_noticed(monkeypatch, target, processes):
    raw: list[torch.Tensor] = []
    process = Recorder.process

    def noting(self, processors):
        inner = process(self, processors)

        def note(tokens, logits):
            raw[:] = [logits]
            return inner(tokens, logits)

        return note

    monkeypatch.setattr(Recorder, "process", noting)
    rule = Rule(processes=processes, raw=raw)
    monkeypatch.setattr(importlib.import_module("hedgespec.decoder.verification"), "verify", rule)
    config = DecodeConfig(draft_length=3, learner="fixed")
    [p_by_offset, p_by_pair] = through_generate(target, pool(target, "good"), config, 50, 48, temperature=1.2)
    assert (min(p_by_offset, p_by_pair) > SMALLEST_P_VALUE) == processes


class Zeros:
    """A source of uniforms that are all 0: as likely as any other, and where a rule that is not strict goes wrong."""

    def random(self, count: int) -> np.ndarray:
        return np.zeros(count)


@pytest.mark.parametrize("mode", ["sampled", "argmax"])
def test_a_uniform_of_0_accepts_nothing_impossible(monkeypatch, target, mode):
    law = law_of(table_of(target), temperature=1.0, top_k=2)[0]
    impossible = TableDrafter("impossible", torch.where(torch.from_numpy(law) > 0, -math.inf, 0.0).float())
    decoder = Decoder(target, [impossible], DecodeConfig(draft_length=2, proposal=mode))

    def says_the_impossible() -> bool:
        request = Request(torch.tensor([0]), 0, 12, Zeros())
        [row] = decoder.decode([request], Sampling(1.0, top_k=2))
        assert not row.stats.failures
        return any(law[before, now] == 0 for before, now in zip(row.sequence.tolist(), row.sequence[1:].tolist()))

    with torch.no_grad():
        assert not says_the_impossible()
        lax = Rule(accepts=lambda uniform, draft_prob, target_prob: uniform * draft_prob <= target_prob)
        monkeypatch.setattr(importlib.import_module("hedgespec.decoder.verification"), "verify", lax)
        assert says_the_impossible()
