"""Records the acceptance of every drafter at every position of a decoded text.

A `Trace` holds what a decoder would see of one text, whichever drafter drafts. `hedgespec.experiments.replay` runs selection
and learning over it again without a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.decoder.request import generator
from hedgespec.decoder.scoring import PROMPT_SAMPLING
from hedgespec.drafters import Drafter, open_session
from hedgespec.ops.evaluate import evaluate
from hedgespec.ops.gumbel import gumbel, key_of, perturb
from hedgespec.ops.sampling import Sampling
from hedgespec.zoo.replay import Text, read

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hedgespec.records import Evaluation

ARRAYS = ("tokens", "prompt_prob", "prob", "ratio", "drafted")
"""Fields of `Trace` that are stored as arrays."""
DTYPES = (np.uint8, np.uint16, np.float16, np.float32)
"""Dtypes tried for a stored array, smallest first. One is used if it holds all values exactly; otherwise float64."""


@dataclass(frozen=True)
class Trace:
    """The recorded acceptance of one text.

    N is the number of drafters, T the number of positions (the text's tokens after the first), D the longest draft that can be
    replayed, M the number of recorded prompt positions.
    """

    domain: str
    """Domain of the prompt."""
    number: int
    """Index of the text in its set."""
    mode: str
    """Proposal mode, as in `DecodeConfig.proposal`."""
    temperature: float
    """Temperature of the target."""
    seed: int
    """Seed the text was decoded with. In mode "coupled" it determines the text."""
    max_new_tokens: int
    """Limit the text was decoded with."""
    prompt_length: int
    """P, number of prompt tokens."""
    drafters: tuple[str, ...]
    """Names, [N]."""
    own_features: tuple[bool, ...]
    """Whether each drafter drafts from features of its own from the second token on (EAGLE heads do), [N]."""
    tokens: NDArray[np.int64]
    """int64 [P + 1 + T]: prompt and text."""
    prompt_prob: NDArray[np.float64]
    """float64 [N, M]: acceptance_prob at temperature 1 at the last M positions before the first round."""
    prob: NDArray[np.float64]
    """float64 [N, T]: acceptance_prob."""
    ratio: NDArray[np.float64]
    """float64 [N, T]: acceptance_ratio."""
    drafted: NDArray[np.float64]
    """float64 [N, T, D]: `drafted[i, t, d]` is the acceptance_ratio of token t + d if drafter i drafts alone from position t
    on, on its own features where it has any; 0 after the first 0."""

    def of(self, drafters: Sequence[int]) -> Trace:
        """Returns the trace of the same text with a pool of some of the drafters, in the order given."""
        chosen = list(drafters)
        arrays: dict[str, Any] = {name: getattr(self, name)[chosen] for name in ("prompt_prob", "prob", "ratio", "drafted")}
        names: dict[str, Any] = {
            name: tuple(getattr(self, name)[index] for index in chosen) for name in ("drafters", "own_features")
        }
        return replace(self, **arrays, **names)

    def save(self, path: Path) -> None:
        """Writes one .npz file. The file appears under its name only when it is complete."""
        head = {name: value for name, value in vars(self).items() if name not in ARRAYS}
        arrays: dict[str, Any] = {name: _smallest(getattr(self, name)) for name in ARRAYS}
        path.parent.mkdir(parents=True, exist_ok=True)
        with (scratch := path.with_suffix(".part")).open("wb") as file:
            np.savez_compressed(file, head=np.array(json.dumps(head)), **arrays)
        scratch.rename(path)

    @staticmethod
    def load(path: Path) -> Trace:
        """Reads a file that `save` wrote; every value is restored exactly."""
        with np.load(path) as file:
            head = json.loads(str(file["head"]))
            arrays: dict[str, Any] = {name: file[name].astype(np.int64 if name == "tokens" else np.float64) for name in ARRAYS}
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in head.items()}
        return Trace(**fields, **arrays)


def _smallest(values: np.ndarray) -> np.ndarray:
    """Returns the values in the smallest of `DTYPES` that holds all of them exactly, or unchanged."""
    for dtype in DTYPES:
        with np.errstate(over="ignore", invalid="ignore"):
            if np.array_equal(values.astype(dtype), values):
                return values.astype(dtype)
    return values


@torch.inference_mode()
def record(
    target: PreTrainedModel,
    drafters: Sequence[Drafter],
    prompt_ids: torch.Tensor,
    *,
    domain: str,
    number: int,
    seed: int,
    mode: str,
    temperature: float,
    max_new_tokens: int,
    depth: int,
    warm_start: int = 64,
    writer: Drafter | None = None,
) -> Trace:
    """Decodes one text and records what would have been accepted of each drafter at each position.

    Args:
        target: a causal language model, as for `Decoder`.
        drafters: the pool, N >= 1.
        prompt_ids: int64 [P].
        domain: stored in the trace.
        number: stored in the trace.
        seed: seed of the text.
        mode: "sampled" or "coupled", as in `DecodeConfig.proposal`.
        temperature: of the target, >= 0.
        max_new_tokens: most tokens of the text, >= 1.
        depth: D >= 1, longest draft that can be replayed.
        warm_start: M, most prompt positions that can be replayed.
        writer: drafter used to decode the text; None is the first of the pool. At temperature 0 and in mode "coupled" the text
            does not depend on it.

    Returns: the trace.
    """
    decoder = Decoder(target, [writer or drafters[0]], DecodeConfig(proposal=cast(Any, mode), learner="fixed", warm_start=0))
    out = decoder.generate(prompt_ids, seed=seed, temperature=temperature, max_new_tokens=max_new_tokens)
    tokens, length = out.sequences[0], len(prompt_ids)
    first = max(length + 1 - warm_start, 2)  # EAGLE heads predict no token before the third
    text = read(target, tokens, first, drafters)
    scores = _Scores(text, tokens, length, first, mode, temperature, seed)
    recorded = [_record_drafter(drafter, scores, depth) for drafter in drafters]
    prompt_prob, prob, ratio, drafted = map(np.stack, zip(*recorded, strict=True))
    return Trace(
        domain, number, mode, temperature, seed, max_new_tokens, length, tuple(drafter.name for drafter in drafters),
        tuple(bool(drafter.aux_layers) for drafter in drafters), tokens.cpu().numpy(), prompt_prob, prob, ratio, drafted,
    )  # fmt: skip


class _Scores:
    """Compares drafters with the target along one text.

    Args:
        text: the target's logits and features over the text from token `first` on.
        tokens: int64 [L], prompt and text.
        length: P.
        first: first token that is scored, in the prompt.
        mode, temperature, seed: as for `record`.
    """

    def __init__(self, text: Text, tokens: torch.Tensor, length: int, first: int, mode: str, temperature: float, seed: int):
        self.text, self.tokens, self.first, self.mode = text, tokens, first, mode
        self.start = length + 1
        """First token that a round emits."""
        self.positions = len(tokens) - self.start
        """T."""
        self.temperature, self.noise = temperature, None
        self.rule = Sampling(temperature)
        self.target_logits = text.logits[self.start - first :]
        if mode == "coupled" and temperature > 0 and self.positions:
            key = key_of(generator(seed, 0).random(1)[0])
            places = range(self.start, len(tokens))
            self.noise = gumbel([key] * len(places), places, text.logits.shape[1], text.logits.device)
            self.target_logits = perturb(self.target_logits, self.noise, temperature=temperature)
            self.rule = Sampling()

    def of_prompt(self, drafter: Drafter, logits: torch.Tensor) -> torch.Tensor:
        """Returns acceptance_prob [M] at the prompt's positions at temperature 1, given the drafter's logits [M, Vd]."""
        count = self.start - self.first
        return self._evaluate(
            drafter, self.text.logits[:count], logits, slice(self.first, self.start), PROMPT_SAMPLING
        ).acceptance_prob[0, 0]

    def of_text(self, drafter: Drafter, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """Returns acceptance_prob and acceptance_ratio [2, R] at some of the text's positions, given logits [R, Vd]."""
        if self.noise is not None:
            mapping = drafter.draft_to_target
            logits = perturb(logits, self.noise[rows], temperature=self.temperature, draft_to_target=mapping)
        tokens = slice(self.start + rows.start, self.start + rows.stop)
        scores = self._evaluate(drafter, self.target_logits[rows], logits, tokens, self.rule).scores[:, 0, 0]
        return scores[:2] if self.mode == "sampled" else scores[2:4]

    def _evaluate(
        self, drafter: Drafter, target_logits: torch.Tensor, logits: torch.Tensor, tokens: slice, rule: Sampling
    ) -> Evaluation:
        mapping = drafter.draft_to_target
        return evaluate(
            target_logits[None], logits[None, None], self.tokens[None, tokens],
            draft_to_target=None if mapping is None else mapping[None],
            target_temperature=rule.temperature, drafter_temperature=rule.temperature,
        )  # fmt: skip


def _record_drafter(drafter: Drafter, scores: _Scores, depth: int) -> tuple[np.ndarray, ...]:
    """Returns prompt_prob [M], prob [T], ratio [T] and drafted [T, D] of one drafter."""
    tokens, start, positions = scores.tokens, scores.start, scores.positions
    features = scores.text.features.get(drafter.aux_layers)
    count = start - scores.first
    forced = open_session(drafter).consume(tokens[:-1], None if features is None else features[:-1], len(tokens) - scores.first)
    prompt_prob = scores.of_prompt(drafter, forced[:count]).double().cpu().numpy()
    drafted = np.zeros((positions, depth))
    if not positions:
        return prompt_prob, np.zeros(0), np.zeros(0), drafted
    prob, ratio = scores.of_text(drafter, forced[count:], slice(0, positions)).double().cpu().numpy()
    drafted[:, 0] = ratio
    session = open_session(drafter)
    for position in np.flatnonzero(ratio).tolist():
        if depth == 1 or position == positions - 1:
            continue
        new = slice(session.verified, start + position)
        session.consume(tokens[new], None if features is None else features[new], 1)
        for d in range(1, min(depth, positions - position)):
            at = position + d
            logits = session.step(tokens[start + at - 1 : start + at])
            drafted[position, d] = float(scores.of_text(drafter, logits[None], slice(at, at + 1))[1, 0])
            if drafted[position, d] == 0:
                break
    return prompt_prob, prob, ratio, drafted
