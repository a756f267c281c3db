"""Recorded acceptance: every drafter at every position of real texts, and learners replayed over them.

A trace is what a decoder would see of one text, whoever drafts. Where the text does not depend on who drafts, which is so at
temperature 0 and in mode "coupled", a replay does round for round what the decoder did: `Selector` decides in both. For sampled
proposals a trace holds probabilities, and a replay draws who is accepted: the same law, without a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hedgespec.config import DecodeConfig
from hedgespec.coupled import gumbel, key_of, perturb
from hedgespec.decoder import Decoder
from hedgespec.decoder.arms import Seconds
from hedgespec.decoder.batch import WARM
from hedgespec.decoder.request import generator
from hedgespec.decoder.selector import Selector, new_learner
from hedgespec.delay import DelayQueue
from hedgespec.drafters import Drafter
from hedgespec.evaluate import evaluate
from hedgespec.learners import Learner
from hedgespec.metrics import DecodeStats
from hedgespec.sampling import Sampling
from hedgespec.zoo import replay as texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ARRAYS = ("tokens", "prompt_prob", "prob", "ratio", "drafted")


@dataclass(frozen=True)
class Trace:
    """One text. N drafters; T positions, those of its tokens after the first; D depths of a draft."""

    domain: str
    """Of the prompt."""
    number: int
    """Of the text in its set."""
    mode: str
    """How drafters propose, as in `DecodeConfig`."""
    temperature: float
    seed: int
    """With which the text was decoded; in mode "coupled" it decides what the text is."""
    max_new_tokens: int
    prompt_length: int
    drafters: tuple[str, ...]
    """Names, [N]."""
    own_features: tuple[bool, ...]
    """Whether each drafts on features of its own, [N]."""
    tokens: np.ndarray
    """int64 [P + 1 + T], prompt and text."""
    prompt_prob: np.ndarray
    """What a warm start hears, float64 [N, M]: acceptance_prob at temperature 1, at the last M positions before the first
    round."""
    prob: np.ndarray
    """acceptance_prob, float64 [N, T]."""
    ratio: np.ndarray
    """acceptance_ratio, float64 [N, T]."""
    drafted: np.ndarray
    """At [i, t, d] the acceptance_ratio of token t + d where drafter i drafted all from t on by itself, so that a head read its
    own features over the d tokens before; 0 past one that is 0. float64 [N, T, D]."""

    def of(self, drafters: Sequence[int]) -> Trace:
        """The same text with a pool of some of the drafters."""
        which = list(drafters)
        cut = {name: getattr(self, name)[which] for name in ("prompt_prob", "prob", "ratio", "drafted")}
        cut |= {name: tuple(getattr(self, name)[one] for one in which) for name in ("drafters", "own_features")}
        return Trace(**{**vars(self), **cut})

    def save(self, path: Path) -> None:
        """One .npz file, written whole or not at all."""
        head = {name: value for name, value in vars(self).items() if name not in _ARRAYS}
        arrays: dict[str, Any] = {name: _small(getattr(self, name)) for name in _ARRAYS}
        path.parent.mkdir(parents=True, exist_ok=True)
        with (scratch := path.with_suffix(".part")).open("wb") as file:
            np.savez_compressed(file, head=np.array(json.dumps(head)), **arrays)
        scratch.rename(path)

    @staticmethod
    def load(path: Path) -> Trace:
        with np.load(path) as file:
            head = json.loads(str(file["head"]))
            arrays: dict[str, Any] = {name: file[name].astype(np.int64 if name == "tokens" else np.float64) for name in _ARRAYS}
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in head.items()}
        return Trace(**fields, **arrays)


def _small(values: np.ndarray) -> np.ndarray:
    """The values in the smallest dtype that holds them exactly, of those that are tried."""
    for dtype in (np.uint8, np.uint16, np.float16, np.float32):
        with np.errstate(over="ignore", invalid="ignore"):
            if np.array_equal(values.astype(dtype), values):
                return values.astype(dtype)
    return values


@torch.inference_mode()
def record(target: PreTrainedModel, drafters: Sequence[Drafter], prompt_ids: torch.Tensor, *, domain: str, number: int,
           seed: int, mode: str, temperature: float, max_new_tokens: int, depth: int, warm_start: int = 64,
           writer: Drafter | None = None) -> Trace:  # fmt: skip
    """Decodes one text and records what each drafter would have made of it.

    Args:
        target, drafters: as of `Decoder`.
        prompt_ids: int64 [P].
        domain, number: kept in the trace.
        seed, mode, temperature, max_new_tokens: of the text.
        depth: D, longest draft that can be replayed.
        warm_start: most positions of the prompt that can be replayed.
        writer: the drafter that the text is decoded with; None takes the first. At temperature 0 and in mode "coupled" the text
            does not depend on it.
    """
    config = DecodeConfig(mode=mode, learner="fixed", warm_start=0)
    decoder = Decoder(target, [writer or drafters[0]], config)
    out = decoder.generate(prompt_ids, seed=seed, temperature=temperature, max_new_tokens=max_new_tokens)
    tokens, length = out.sequences[0], len(prompt_ids)
    first = max(length + 1 - warm_start, 2)  # a head says nothing of its first two tokens
    text = texts.read(target, tokens, first, drafters)
    count = length + 1 - first
    rule, noise = Sampling(temperature), None
    if mode == "coupled" and temperature > 0:
        key = key_of(generator(seed, 0).random(1)[0])
        positions = range(length + 1, len(tokens))
        noise = gumbel([key] * len(positions), positions, text.logits.shape[1], text.logits.device)
        rule = Sampling()
    target_logits = text.logits[count:]
    if noise is not None and len(noise):
        target_logits = perturb(target_logits, noise, temperature=temperature)

    def scores(drafter: Drafter, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """acceptance_prob and acceptance_ratio [2, T] of a drafter's logits [T, Vd] at some positions."""
        mapping = drafter.draft_to_target
        if noise is not None:
            logits = perturb(logits, noise[rows], temperature=temperature, draft_to_target=mapping)
        found = evaluate(
            target_logits[None, rows], logits[None, None], tokens[None, length + 1 :][:, rows],
            draft_to_target=None if mapping is None else mapping[None],
            target_temperature=rule.temperature, drafter_temperature=rule.temperature,
        ).scores[:, 0, 0]  # fmt: skip
        return found[:2] if mode == "sampled" else found[2:4]

    every = [_judge(drafter, text, tokens, first, count, depth, scores) for drafter in drafters]
    arrays = dict(zip(("prompt_prob", "prob", "ratio", "drafted"), map(np.stack, zip(*every, strict=True)), strict=True))
    return Trace(domain, number, mode, temperature, seed, max_new_tokens, length, tuple(one.name for one in drafters),
                 tuple(bool(one.aux_layers) for one in drafters), tokens.cpu().numpy(), **arrays)  # fmt: skip


def _judge(drafter: Drafter, text: texts.Text, tokens: torch.Tensor, first: int, count: int, depth: int,
           scores: Callable[..., torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """prompt_prob [M], prob [T], ratio [T] and drafted [T, D] of one drafter."""
    features = text.features.get(drafter.aux_layers)
    start = first + count  # of the first position
    mapping = drafter.draft_to_target
    forced = drafter.session().prefill(tokens[:-1], None if features is None else features[:-1], len(tokens) - first)
    warm = evaluate(
        text.logits[None, :count], forced[None, None, :count], tokens[None, first:start],
        draft_to_target=None if mapping is None else mapping[None],
        target_temperature=WARM.temperature, drafter_temperature=WARM.temperature,
    ).acceptance_prob[0, 0]  # fmt: skip
    positions = len(tokens) - start
    drafted = np.zeros((positions, depth))
    if not positions:
        return warm.double().cpu().numpy(), np.zeros(0), np.zeros(0), drafted
    prob, ratio = scores(drafter, forced[count:], slice(0, positions)).double().cpu().numpy()
    drafted[:, 0] = ratio
    session = drafter.session()
    for position in np.flatnonzero(ratio):
        if depth == 1 or position == positions - 1:
            continue
        new = slice(session.verified, start + int(position))
        session.prefill(tokens[new], None if features is None else features[new], 1)
        for d in range(1, min(depth, positions - int(position))):
            here = int(position) + d
            logits = session.step(tokens[start + here - 1 : start + here])
            drafted[position, d] = float(scores(drafter, logits[None], slice(here, here + 1))[1, 0])
            if drafted[position, d] == 0:
                break
    return warm.double().cpu().numpy(), prob, ratio, drafted


def replay(
    trace: Trace, config: DecodeConfig, *, seed: int | None = None, latency: int = 0, state: dict | None = None,
    seconds: Seconds | None = None, learner: Learner | None = None, queue: DelayQueue | None = None,
) -> DecodeStats:  # fmt: skip
    """Decodes a recorded text again with a learner of one's choice, without a model.

    Args:
        trace: of the text; its drafters are the pool.
        config: as of the decoder; `mode` has to be the trace's, `draft_length` at most its depth. No trees.
        seed: of the uniforms; None takes the trace's.
        latency: rounds after which an evaluation is heard, >= 0; `DecodeConfig.overlap` is 1.
        state: a `Learner.state_dict()` to go on from.
        seconds: what rounds are taken to cost, which objective "throughput" needs: to draft a token, by drafter [N], and to
            verify a round, by drafted length [K+1].
        learner, queue: fresh ones, in place of those of the configuration.

    Returns: the statistics that `Decoder` gives, without times.

    Raises: ValueError for a trace that cannot be replayed so.
    """
    length, (count, positions, depth) = config.draft_length, trace.drafted.shape
    if config.mode != trace.mode and trace.temperature > 0:
        raise ValueError(f"mode: expected the trace's, {trace.mode!r}, got {config.mode!r}")
    if config.tree is not None:
        raise ValueError(f"tree: expected None, since traces are of chains, got {config.tree}")
    if length > depth:
        raise ValueError(f"draft_length: expected at most the trace's depth {depth}, got {length}")
    if (config.objective == "throughput") != (seconds is not None):
        raise ValueError(f"seconds: expected them with objective 'throughput' alone, got objective {config.objective!r}")
    learner = learner or new_learner(config, count)
    selector = Selector(trace.drafters, config, learner, state, trace.own_features, queue)
    random = generator(trace.seed if seed is None else seed, 0)
    random.random(2 if trace.mode == "coupled" and trace.temperature > 0 else 1)  # the noise's key, the first token
    warm = min(config.warm_start, trace.prompt_prob.shape[1])
    if warm and positions and state is None and selector.hears_all:
        selector.warm_up(trace.prompt_prob[:, -warm:], seconds)
    on_the_way: list[tuple[int, np.ndarray, np.ndarray, int, int]] = []
    """Of an evaluation: its round, whom it scores, up to where each was scored, and the positions on which nobody was."""
    at = scored = 0
    known = np.zeros(count, dtype=np.int64)  # up to where each drafter is scored
    while at < positions:
        uniforms = random.random(2 * length + 2)
        weights = selector.weights()
        choice = selector.select(weights, uniforms.item(0), trace.max_new_tokens - 1 - at)
        accepted, longest = 0, min(choice.draft_length, positions - at)
        while accepted < longest and uniforms[1 + length + accepted] < trace.drafted[choice.drafter, at, accepted]:
            accepted += 1
        emitted = min(accepted + 1, positions - at)
        at += emitted
        finished = at == positions
        now = selector.stats.rounds
        if selector.evaluation_is_due(finished):
            asked = selector.to_score(finished, at - known)
            on_the_way.append((now, asked, known.copy(), scored, at))
            known[asked] = scored = at
        while on_the_way and (finished or now - on_the_way[0][0] >= latency):
            _, asked, since, begin, end = on_the_way.pop(0)
            for drafter in np.flatnonzero(asked & (since < begin)).tolist():
                missed = slice(since[drafter], begin)
                selector.catch_up(drafter, trace.prob[drafter, missed], trace.ratio[drafter, missed])
            prob, ratio = (np.where(asked[:, None], of[:, begin:end], np.nan) for of in (trace.prob, trace.ratio))
            selector.observe(prob, ratio, seconds)
        drafted = choice.draft_length
        tested = min(drafted, emitted - finished)  # as the decoder knows it
        selector.end_round(choice.drafter if drafted else None, weights, emitted, drafted, tested)
    selector.close()
    selector.stats.emitted_tokens = positions + 1
    selector.stats.learner_state = learner.state_dict()
    return selector.stats


def alone(trace: Trace, drafter: int, draft_length: int, seed: int | None = None) -> list[int]:
    """Tokens emitted by each round, [R], if one drafter had drafted the whole text."""
    config = DecodeConfig(draft_length=draft_length, mode=trace.mode, learner="fixed", warm_start=0)
    return replay(trace.of([drafter]), config, seed=seed).emitted_by_round
