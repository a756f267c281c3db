"""The production loop: select, draft, verify, evaluate, learn, with caches that are never recomputed.

With the default configuration it emits what `hedgespec/algorithm.py` says, token for token and weight for weight.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hedgespec import learners
from hedgespec.config import DecodeConfig
from hedgespec.delay import DelayQueue
from hedgespec.drafters import Drafter, DrafterSession
from hedgespec.errors import VocabularyMismatchError
from hedgespec.evaluate import evaluate
from hedgespec.linear import few_row_view
from hedgespec.metrics import DecodeStats
from hedgespec.records import Choice, Draft, Verdict
from hedgespec.sampling import Sampling
from hedgespec.selection import select
from hedgespec.target import TargetSession
from hedgespec.verify import sample, verify


@dataclass(frozen=True)
class DecodeOutput:
    """What `Decoder.generate` returns."""

    sequences: torch.Tensor
    """Prompt and continuation, int64 [1, L]."""
    stats: DecodeStats


EAGER_ROUNDS = 8
"""Rounds at the start of a request after each of which the drafters are scored, whatever the cadence."""


class Decoder:
    """Speculative decoding of a target with a pool of drafters, one of which a learner picks for every round.

    Args:
        target: a transformers decoder-only causal language model in eval mode; it is not modified.
        drafters: N >= 1 drafters (`hedgespec.drafters.Drafter`) over the target's tokens, with distinct names.
        config: a `DecodeConfig`; None is the default one.

    Raises:
        ValueError: no drafters, names that repeat, a prior of the wrong size, an unknown learner.
        VocabularyMismatchError: a drafter that can name tokens the target does not have, or whose logits are not its.

    Output is the target's own distribution, whatever the drafters; at temperature 0 the target's own greedy text.
    """

    def __init__(self, target, drafters: Sequence[Drafter], config: DecodeConfig | None = None):
        self.target, self.drafters, self.config = target, tuple(drafters), config or DecodeConfig()
        if not self.drafters:
            raise ValueError("drafters: expected at least 1, got 0")
        self.names = tuple(drafter.name for drafter in self.drafters)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"drafters: expected distinct names, got {self.names}")
        vocabulary = target.config.vocab_size
        for drafter in self.drafters:
            if drafter.vocab_size > vocabulary or (drafter.draft_to_target is None and drafter.vocab_size < vocabulary):
                raise VocabularyMismatchError(
                    f"drafter {drafter.name}: expected the target's vocabulary of {vocabulary} tokens, or a map into it, "
                    f"got {drafter.vocab_size}"
                )
        self.view = few_row_view(target)
        self.groups = _groups(self.drafters, target.device)
        self._new_learner()  # a wrong name, prior or option is refused here, not at the first request

    def _new_learner(self) -> learners.Learner:
        config = self.config
        return learners.make(config.learner, len(self.drafters), prior=config.prior, **config.learner_options)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        learner_state: dict | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> DecodeOutput:
        """Continues a prompt.

        Args:
            input_ids: the prompt, int64 [1, P] or [P], P >= 1.
            max_new_tokens: most tokens to emit, >= 1.
            temperature, top_k, top_p, min_p: see `hedgespec.sampling.Sampling`; temperature 0 is greedy.
            seed: of the uniforms that select, draft and verify; None draws a fresh one.
            eos_token_id: ids that end the text; the one that did is its last token. None takes those of the target's
                generation config, an empty sequence takes none.
            learner_state: a `Learner.state_dict()` to go on from; None starts fresh.
            on_tokens: called with the first token, then with each round's tokens, as they come.

        Returns: a `DecodeOutput`.

        Raises:
            TypeError: input_ids of another dtype than int64.
            ValueError: an empty prompt, one that does not fit the target's context, or an argument outside its range.
        """
        prompt = _check_prompt(input_ids, max_new_tokens, self.target)
        sampling = Sampling(temperature, top_k, top_p, min_p)
        learner = self._new_learner()
        if learner_state is not None:
            learner.load_state_dict(learner_state)
        began = time.perf_counter()
        request = _Request(self, prompt, max_new_tokens, sampling, learner, _eos(self.target, eos_token_id), seed)
        emitted = request.begin()
        while True:
            if on_tokens is not None:
                on_tokens(emitted)
            if request.finished:
                break
            emitted = request.round()
        stats = request.stats
        stats.emitted_tokens = request.length - len(prompt)
        stats.learner_state = learner.state_dict()
        stats.seconds = time.perf_counter() - began
        return DecodeOutput(request.tokens[None, : request.length].clone(), stats)


class _Request:
    """The state of one request, batch 1, and the stages of its rounds.

    Between rounds the target's cache holds every token but the last, whose forward is the next round's; the features,
    kept at the position before their token, have a row for every token.
    """

    def __init__(self, decoder: Decoder, prompt: torch.Tensor, max_new_tokens: int, sampling: Sampling,
                 learner: learners.Learner, eos: frozenset[int], seed: int | None):  # fmt: skip
        self.config, self.drafters, self.groups = decoder.config, decoder.drafters, decoder.groups
        self.sampling, self.learner, self.eos = sampling, learner, eos
        self.widths = [_width(drafter) for drafter in self.drafters]
        self.stats = DecodeStats(decoder.names, self.config.draft_length)
        self.random = np.random.default_rng(seed)
        self.tokens = torch.cat([prompt, prompt.new_zeros(max_new_tokens)])
        self.length = len(prompt)
        self.finished = False
        self.target = TargetSession(decoder.view, (drafter.aux_layers for drafter in self.drafters))
        self.sessions: list[DrafterSession] = [drafter.session() for drafter in self.drafters]
        self.given: list[list[torch.Tensor]] = [[] for _ in self.drafters]
        """Each drafter's logits, chunks [T, Vd], from the first unscored token to the one after the last it has taken in."""
        self.unscored: list[torch.Tensor] = []
        """The target's logits, chunks [T, V], of the verified tokens on which the drafters are not scored yet."""
        self.scores_all = learner.feedback == "full" or self.config.track_regret
        self.queue = DelayQueue(
            len(self.drafters), self.config.draft_length, estimator=self.config.estimator, loss=self.config.loss
        )

    def begin(self) -> list[int]:
        """Reads the prompt and emits the first token, the target's own: a head needs it before it can draft."""
        with self.stats.timed("prefill"):
            logits = self.target.forward(self.tokens[: self.length], 1)
            emitted = self._emit(self._verify(logits, None, Draft(self.tokens.new_empty(1, 0), None), self._uniforms(1)))
            for drafter in range(len(self.drafters)) if self.scores_all and not self.finished else ():
                try:
                    self._take_in(drafter)
                except Exception as error:
                    self._quarantine(drafter, error)
        return emitted

    def round(self) -> list[int]:
        """One target forward and everything around it; returns the tokens it emitted."""
        length = self.config.draft_length
        uniforms = self._uniforms(2 * length + 2)  # one selects, K draft, K + 1 verify
        with self.stats.timed("select"):
            weights = self._weights()
            choice = self._select(weights, float(uniforms[0]))
        with self.stats.timed("draft"):
            draft = self._draft(choice, uniforms[1 : length + 1])
        with self.stats.timed("verify"):
            drafted = draft.tokens.shape[1]
            last = self.tokens[self.length - 1 : self.length]
            logits = self.target.forward(torch.cat([last, draft.tokens[0]]), drafted + 1)
            tests = torch.cat([uniforms[length + 1 :][:drafted], uniforms[-1:]])
            emitted = self._emit(self._verify(logits, choice, draft, tests))
            self.target.keep(len(emitted))
        with self.stats.timed("evaluate"):
            if self.scores_all:
                self.unscored.append(logits[: len(emitted)])
            scores = self._evaluate() if self._evaluation_is_due() else None
        with self.stats.timed("learn"):
            self._learn(choice if drafted else None, weights, len(emitted), scores)
        self.stats.record_round(choice.drafter if drafted else None, weights, len(emitted))
        return emitted

    def _uniforms(self, count: int) -> torch.Tensor:
        return torch.from_numpy(self.random.random(count)).to(self.tokens.device)

    def _weights(self) -> np.ndarray:
        """The learner's weights [N], what failed drafters hold shared out among the others; all 0 if all failed."""
        weights = self.learner.weights()
        if self.stats.failures:
            alive = np.array([drafter.name not in self.stats.failures for drafter in self.drafters])
            weights = np.where(alive, weights, 0.0)
            weights = weights / weights.sum() if weights.any() else alive / max(alive.sum(), 1)
        return weights

    def _select(self, weights: np.ndarray, uniform: float) -> Choice:
        room = len(self.tokens) - self.length - 1  # the recovered or bonus token comes on top of the draft
        if room == 0 or not weights.any():
            return Choice(drafter=-1, draft_length=0)
        choice = select(weights, uniform, draft_length=self.config.draft_length, rule=self.config.selection)
        return replace(choice, draft_length=min(choice.draft_length, room))

    def _draft(self, choice: Choice, uniforms: torch.Tensor) -> Draft:
        """What the chosen drafter proposes; nothing if it fails."""
        tokens, logits = [], []
        try:
            for position in range(choice.draft_length):
                if position == 0:
                    self._take_in(choice.drafter)
                    row = self.given[choice.drafter][-1][-1]
                else:
                    row = self._checked(choice.drafter, self.sessions[choice.drafter].step(tokens[-1])[None], 1)[0]
                token = self._propose(row, uniforms[position])
                mapping = self.drafters[choice.drafter].draft_to_target
                tokens.append((token if mapping is None else mapping[token]).view(1))
                logits.append(row)
        except Exception as error:
            self._quarantine(choice.drafter, error)
            tokens, logits = [], []
        if not tokens:
            return Draft(self.tokens.new_empty(1, 0), None)
        one_hot = self.config.mode == "argmax" or self.sampling.temperature == 0
        return Draft(torch.cat(tokens)[None], None if one_hot else torch.stack(logits)[None])

    def _propose(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """A draft id, 0-dim, from logits [Vd]."""
        if self.config.mode == "argmax" or self.sampling.temperature == 0:
            return logits.argmax()
        threshold = self.sampling.threshold(logits)
        return sample(logits, uniform, temperature=self.sampling.temperature, threshold=threshold)

    def _verify(self, logits: torch.Tensor, choice: Choice | None, draft: Draft, uniforms: torch.Tensor) -> Verdict:
        sampled = draft.logits is not None
        return verify(
            logits[None],
            draft.tokens,
            draft.logits,
            uniforms[None],
            mode=self.config.mode,
            draft_to_target=self.drafters[choice.drafter].draft_to_target if sampled else None,
            target_temperature=self.sampling.temperature,
            draft_temperature=self.sampling.temperature,
            target_threshold=self.sampling.threshold(logits[None]),
            draft_threshold=self.sampling.threshold(draft.logits) if sampled else None,
            backend=self.config.backend,
        )

    def _emit(self, verdict: Verdict) -> list[int]:
        """Appends the verified tokens up to the first that ends the text."""
        emitted = verdict.tokens[0, : int(verdict.accepted_length[0]) + 1].tolist()
        for index, token in enumerate(emitted):
            if token in self.eos:
                emitted = emitted[: index + 1]
                self.finished = True
                break
        self.tokens[self.length : self.length + len(emitted)] = torch.tensor(emitted)
        self.length += len(emitted)
        self.finished |= self.length == len(self.tokens)
        return emitted

    def _take_in(self, drafter: int) -> None:
        """Feeds a drafter the verified tokens it lacks, all in one chunk; of a fresh session only the last row is kept."""
        session, layers = self.sessions[drafter], self.drafters[drafter].aux_layers
        lacking = slice(session.verified, self.length)
        if lacking.start == lacking.stop:
            return
        keep = 1 if lacking.start == 0 else lacking.stop - lacking.start
        features = self.target.features[layers][lacking] if layers else None
        logits = self._checked(drafter, session.prefill(self.tokens[lacking], features, keep), keep)
        if not self.scores_all:
            self.given[drafter].clear()  # nobody will ask for what lies behind
        self.given[drafter].append(logits)

    def _checked(self, drafter: int, logits: torch.Tensor, rows: int) -> torch.Tensor:
        """The logits [rows, Vd] themselves, if they are what a drafter owes. A row's maximum tells NaN, +inf and no mass."""
        if logits.shape != (rows, self.widths[drafter]):
            raise ValueError(f"expected logits of shape {(rows, self.widths[drafter])}, got {tuple(logits.shape)}")
        if not logits.amax(-1).isfinite().all():
            raise ValueError("expected logits with a finite maximum, got NaN, +inf or -inf throughout")
        return logits

    def _evaluation_is_due(self) -> bool:
        """Every round while there is much to learn, later as the configuration says, and at the end."""
        rounds = self.stats.rounds + 1
        return self.scores_all and (rounds <= EAGER_ROUNDS or rounds % self.config.evaluate_every == 0 or self.finished)

    def _evaluate(self) -> tuple[np.ndarray, np.ndarray]:
        """Lets every drafter take in what it lacks; acceptance_prob and acceptance_ratio float64 [N, T] on unscored tokens.

        A drafter's logits for the first of them are those it ended the last evaluation with.
        """
        target_logits = torch.cat(self.unscored)
        self.unscored.clear()
        count = target_logits.shape[0]
        rows: dict[int, torch.Tensor] = {}
        for drafter, spec in enumerate(self.drafters):
            if spec.name in self.stats.failures:
                continue
            try:
                self._take_in(drafter)
                logits = torch.cat(self.given[drafter])
                rows[drafter], self.given[drafter] = logits[:-1], [logits[-1:]]
            except Exception as error:
                self._quarantine(drafter, error)
        prob, ratio = np.zeros((2, len(self.drafters), count))
        target_threshold = self.sampling.threshold(target_logits[None])
        for members, mapping in self.groups:
            present = [place for place, drafter in enumerate(members) if drafter in rows]
            if not present:
                continue
            alive = [members[place] for place in present]
            drafter_logits = torch.stack([rows[drafter] for drafter in alive])[:, None]
            if mapping is not None and len(present) < len(members):
                mapping = mapping[present]
            result = evaluate(
                target_logits[None],
                drafter_logits,
                self.tokens[None, self.length - count : self.length],
                draft_to_target=mapping,
                target_temperature=self.sampling.temperature,
                drafter_temperature=self.sampling.temperature,
                target_threshold=target_threshold,
                drafter_threshold=self.sampling.threshold(drafter_logits),
                backend=self.config.backend,
            )
            scores = result.scores[:, :, 0].double().cpu()
            prob[alive], ratio[alive] = scores[2:4] if self.config.mode == "argmax" else scores[:2]
        return prob, ratio

    def _learn(self, choice: Choice | None, weights: np.ndarray, emitted: int, scores) -> None:
        """Hands the learner what it asks for: every drafter's completed losses, or the chosen one's own round."""
        full = self.learner.feedback == "full"
        for feedback in self.queue.push(*scores) if scores is not None else ():
            self.stats.record_loss(feedback.losses, self.learner.weights())
            if full:
                self.learner.update(feedback.losses)
        if self.learner.feedback == "bandit" and choice is not None:
            losses = np.full(len(self.drafters), np.nan)
            losses[choice.drafter] = 1 - emitted / (self.config.draft_length + 1)
            self.learner.update(losses, chosen=choice.drafter, chosen_weight=float(weights[choice.drafter]))

    def _quarantine(self, drafter: int, error: Exception) -> None:
        """Takes a drafter out of the request: whatever it does, the request goes on and its text stays the same."""
        name = self.drafters[drafter].name
        if name not in self.stats.failures:
            self.stats.failures[name] = f"{type(error).__name__}: {error}"
            warnings.warn(f"drafter {name} is out of this request: {self.stats.failures[name]}", stacklevel=2)


def _width(drafter: Drafter) -> int:
    """Vd: how many logits the drafter gives."""
    return drafter.vocab_size if drafter.draft_to_target is None else len(drafter.draft_to_target)


def _groups(drafters: Sequence[Drafter], device: torch.device) -> list[tuple[list[int], torch.Tensor | None]]:
    """Drafters evaluated in one call, because their logits stack: (indices, int64 map [n, Vd] or None)."""
    members: dict[tuple[int, bool], list[int]] = {}
    for index, drafter in enumerate(drafters):
        members.setdefault((_width(drafter), drafter.draft_to_target is not None), []).append(index)
    return [
        (indices, torch.stack([drafters[i].draft_to_target for i in indices]).to(device) if mapped else None)
        for (_, mapped), indices in members.items()
    ]


def _check_prompt(input_ids: torch.Tensor, max_new_tokens: int, target) -> torch.Tensor:
    """The prompt as int64 [P] on the target's device."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids: expected an int64 tensor, got {getattr(input_ids, 'dtype', type(input_ids).__name__)}")
    if input_ids.ndim == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
    if input_ids.ndim != 1 or input_ids.shape[0] == 0:
        raise ValueError(f"input_ids: expected a prompt of shape [1, P] or [P] with P >= 1, got {tuple(input_ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    context = getattr(target.config, "max_position_embeddings", None)
    if context is not None and max_new_tokens >= context:
        raise ValueError(f"max_new_tokens: expected less than the target's context of {context}, got {max_new_tokens}")
    if context is not None and input_ids.shape[0] + max_new_tokens > context:
        raise ValueError(
            f"input_ids: expected a prompt of at most {context - max_new_tokens} tokens, so that {max_new_tokens} more fit "
            f"the target's context of {context}, got {input_ids.shape[0]}"
        )
    low, high = (bound.item() for bound in input_ids.aminmax())
    if low < 0 or high >= target.config.vocab_size:
        raise ValueError(f"input_ids: expected ids in 0..{target.config.vocab_size - 1}, got {low if low < 0 else high}")
    return input_ids.to(target.device)


def _eos(target, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        eos_token_id = target.generation_config.eos_token_id
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
