"""HedgeSpec on one page: no cache, no batch, loops, any dtype. `hedgespec/decoder/` must equal it token for token where all
drafters are scored after every round, `evaluate_every=1`, and the learner hears nothing of the prompt, `warm_start=0`.

Models here are functions. `target(tokens)` is the target's logits [V] for the token after `tokens`. `drafter(verified,
drafted)` is a drafter's logits [V] for the token after both; a head reads true features over `verified` and its own over
`drafted`. Source: "Not-a-Bandit", arXiv 2510.20064; lines marked "ours" go past it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

Tokens = list[int]


@dataclass
class Trace:
    """What one run did: all tokens, and by round the drafter (-1: none), the weights, and how many tokens were emitted."""

    tokens: Tokens
    choices: list[int] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)


def decode(
    target: Callable[[Tokens], torch.Tensor],
    drafters: Sequence[Callable[[Tokens, Tokens], torch.Tensor]],
    prompt: Tokens,
    *,
    max_new_tokens: int,
    draft_length: int,
    temperature: float,
    random: np.random.Generator,
    proposal: str = "sampled",
    eos: frozenset[int] = frozenset(),
) -> Trace:
    """Decodes with NormalHedge on full information, losses from the exact estimator, drafters sampled from the weights."""
    num_drafters, K = len(drafters), draft_length
    regrets = np.zeros(num_drafters)  # R
    probs_seen, ratios_seen, next_loss = [], [], 0  # the QPM-D queue: the position whose loss leaves next

    def p(tokens: Tokens) -> torch.Tensor:
        return distribution(target(tokens), temperature)

    def q(i: int, verified: Tokens, drafted: Tokens) -> torch.Tensor:
        dist = distribution(drafters[i](verified, drafted), temperature)
        return dist if proposal == "sampled" else point_mass(dist)

    # The prompt's own forward gives the first token: a head needs it before it can draft.
    trace = Trace([*prompt, inverse_cdf(p(list(prompt)), random.random(1)[0])])
    end = len(prompt) + max_new_tokens
    while len(trace.tokens) < end and trace.tokens[-1] not in eos:
        x = trace.tokens
        uniforms = random.random(2 * K + 2)  # one selects, K draft, K + 1 verify

        # Select: i ~ w. The recovered or bonus token comes on top of the draft, so the last rounds draft less.
        weights = normal_hedge(regrets)
        length = min(K, end - len(x) - 1)
        chosen = inverse_cdf(torch.from_numpy(weights), uniforms[0]) if length else -1

        # Draft: d_k ~ q_i.
        drafted: Tokens = []
        for k in range(length):
            drafted.append(inverse_cdf(q(chosen, x, drafted), uniforms[1 + k]))

        # Verify: accept d while u q(d) < p(d); then recover from max(0, p - q), or take the bonus from p.
        emitted: Tokens = []
        final = None
        for k, d in enumerate(drafted):
            target_dist, draft_dist = p(x + drafted[:k]), q(chosen, x, drafted[:k])
            if not uniforms[1 + K + k] * draft_dist[d] < target_dist[d]:
                residual = (target_dist - draft_dist).clamp(min=0)
                final = residual if residual.sum() > 0 else target_dist
                break
            emitted.append(d)
        emitted.append(inverse_cdf(p(x + emitted) if final is None else final, uniforms[2 * K + 1]))
        for k, token in enumerate(emitted):
            if token in eos:
                emitted = emitted[: k + 1]
                break

        # Evaluate: every drafter on the verified tokens, full information, no further target forward.
        for k, token in enumerate(emitted):
            target_dist = p(x + emitted[:k])
            dists = [q(i, x + emitted[:k], []) for i in range(num_drafters)]
            probs_seen.append([float(torch.minimum(target_dist, dist).sum()) for dist in dists])  # gamma_t[i]
            ratios_seen.append([min(1.0, float(dist[token] / target_dist[token])) for dist in dists])  # ours
        trace.tokens = x + emitted
        trace.choices.append(chosen)
        trace.weights.append(weights)
        trace.emitted.append(len(emitted))

        # Learn: losses leave the queue in order, complete after K positions, or once every product of ratios is 0 (ours).
        while next_loss < len(probs_seen):
            g, a = (np.array(seen[next_loss : next_loss + K]) for seen in (probs_seen, ratios_seen))
            if len(g) < K and a.prod(axis=0).any():
                break
            survival = np.concatenate([np.ones((1, num_drafters)), a[:-1].cumprod(axis=0)])
            expected_length = 1 + (survival * g).sum(axis=0)  # L_t, the exact estimator (ours)
            losses = 1 - expected_length / (K + 1)  # f_t
            regrets += normal_hedge(regrets) @ losses - losses
            next_loss += 1
    return trace


def normal_hedge(regrets: np.ndarray) -> np.ndarray:
    """w_i proportional to [R_i]_+ / c * exp([R_i]_+^2 / 2c), where mean_i exp([R_i]_+^2 / 2c) = e; uniform if no R_i > 0."""
    n, positive = len(regrets), np.maximum(regrets, 0)
    if not positive.any():
        return np.full(n, 1 / n)
    squares = (positive / positive.max()) ** 2
    low, high = 1 / (2 * (1 + np.log(n))), 0.5  # brackets c / Rmax^2
    for _ in range(100):
        c = (low + high) / 2
        low, high = (c, high) if np.log(np.mean(np.exp(squares / (2 * c)))) > 1 else (low, c)
    weights = positive * np.exp((squares - 1) / (2 * c))
    return weights / weights.sum()


def distribution(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return point_mass(logits) if temperature == 0 else (logits / temperature).softmax(-1)


def point_mass(scores: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(scores).index_fill(0, scores.argmax(), 1.0)


def inverse_cdf(weights: torch.Tensor, uniform: float) -> int:
    """The first token whose cumulative weight exceeds `uniform` times the total."""
    cumulative = weights.double().cumsum(0)
    return int((cumulative > uniform * cumulative[-1]).nonzero()[0])
