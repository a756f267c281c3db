"""Two of the paper's open questions: can the first drafter be chosen better than blindly, and why does AdaNormalHedge do worse?

Hypothesis on the first: acceptance on the prompt's own tokens identifies the expert. On the second, AdaNormalHedge's bound is
the better one, but (a) its C = sum of |r| grows where losses are nearly tied, or slows a drafter whose losses vary, (b) it
leaves weight on drafters that are behind, (c) its unit steps are too coarse for losses that hardly differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from table import interval, markdown

from hedgespec import learners
from hedgespec.config import DecodeConfig
from hedgespec.experiments.measures import (
    best_of,
    losses,
    mean_interval,
    ratio_interval,
    tokens_behind,
    tokens_per_round,
    tokens_per_round_alone,
    tokens_within,
)
from hedgespec.experiments.recording import Trace
from hedgespec.experiments.replay import alone, replay
from hedgespec.learners import AdaNormalHedge, Learner, NormalHedge
from studies import Study
from studies.lab import Lab, signature
from studies.plots import band, bounds, figure
from studies.shift import BEGINNING

REPLAYED = ("NormalHedge", "Hedge", "AdaNormalHedge", "losses x 4", "losses x 16", "losses x 16, one C")
SETS = ("greedy", "reworded")
DRAFT_LENGTH = 5
WARM_STARTS = (0, 8, 16, 32, 64)
SCALES = (2, 4, 8, 16)
"""Factors of AdaNormalHedge's losses."""
MOMENTS = (8, 16, 32, 64)
"""Numbers of losses after which weights are compared."""


class ScaledAdaNormalHedge(AdaNormalHedge):
    """AdaNormalHedge on losses times `scale`, which makes its own unit, 1, smaller in comparison."""

    def __init__(self, num_drafters: int, prior=None, *, scale: float = 1.0):
        self.scale = scale
        super().__init__(num_drafters, prior)

    def _learn(self, losses, chosen, chosen_weight) -> None:
        super()._learn(self.scale * losses, chosen, chosen_weight)


class SecondOrderAdaNormalHedge(AdaNormalHedge):
    """AdaNormalHedge with C = sum of r^2, which hardly grows while losses are nearly tied."""

    def _learn(self, losses, chosen, chosen_weight) -> None:
        instantaneous = self._weights.dot(losses) - losses
        self.regrets += instantaneous
        self.absolute_regrets += instantaneous**2


class SharedScaleAdaNormalHedge(ScaledAdaNormalHedge):
    """AdaNormalHedge with the smallest C for all drafters, so that a drafter whose losses vary is not slowed."""

    def _weigh(self):
        own = self.absolute_regrets
        self.absolute_regrets = np.full_like(own, own.min())
        weights = super()._weigh()
        self.absolute_regrets = own
        return weights


class AheadAdaNormalHedge(AdaNormalHedge):
    """AdaNormalHedge with weight 0 for drafters without positive regret, as in NormalHedge."""

    def _weigh(self):
        weights = super()._weigh()
        ahead = self.regrets > 0
        return np.where(ahead, weights, 0.0) / weights[ahead].sum() if ahead.any() else self.prior.copy()


LEARNERS: dict[str, Callable[[int], Learner]] = {
    "NormalHedge": NormalHedge,
    "Hedge": lambda count: learners.make("hedge", count),
    "AdaNormalHedge": AdaNormalHedge,
    "C = sum r^2": SecondOrderAdaNormalHedge,
    "one C for all": SharedScaleAdaNormalHedge,
    "0 unless ahead": AheadAdaNormalHedge,
    **{f"losses x {scale}": lambda count, scale=scale: ScaledAdaNormalHedge(count, scale=scale) for scale in SCALES},
    f"losses x {SCALES[-1]}, one C": lambda count: SharedScaleAdaNormalHedge(count, scale=SCALES[-1]),
}
"""Constructors by name. From the fourth on, each is AdaNormalHedge with one change, which tests a hypothesis."""


def beginning_of(trace: Trace, positions: int) -> Trace:
    """Returns the first positions of a text whose request goes on."""
    cut = {name: getattr(trace, name)[:, :positions] for name in ("prob", "ratio", "drafted")}
    return replace(trace, **cut, tokens=trace.tokens[: trace.prompt_length + 1 + cut["prob"].shape[1]])


def warm_starts(traces: Sequence[Trace], seeds: int, track: Callable[..., Any]) -> dict[str, Any]:
    """Returns, by M and domain, the first round's weight on the drafters that are best in hindsight, the share of requests
    whose first drafter is one of them, and tokens per round over the first `BEGINNING` tokens relative to the best fixed
    drafter's there; and by domain every drafter's mean weight at the first round with the default M."""
    domains = list(dict.fromkeys(trace.domain for trace in traces))
    known = [
        (best_of(fixed), int(fixed.argmax()))
        for fixed in (tokens_per_round_alone(trace, DRAFT_LENGTH, seeds) for trace in traces)
    ]
    rows, first_weights = {}, {}
    for most in WARM_STARTS:
        config = DecodeConfig(draft_length=DRAFT_LENGTH, warm_start=most)
        values = []
        for trace, (best, leader) in track(list(zip(traces, known)), f"warm start of {most}"):
            short = beginning_of(trace, BEGINNING + DRAFT_LENGTH + 1)  # no round that begins early enough sees the cut
            every = [replay(short, config, seed=1000 * seed + trace.number) for seed in range(seeds)]
            start = slice(0, BEGINNING)
            tokens, rounds = np.sum([tokens_within(stats, start) for stats in every], axis=0)
            emitted = alone(short, leader, DRAFT_LENGTH)
            began = np.cumsum([0, *emitted[:-1]]) < BEGINNING
            values.append((
                every[0].weights[0][best].sum(), np.mean([stats.choices[0] in best for stats in every]),
                tokens / rounds / np.mean(np.array(emitted)[began]),
            ))  # fmt: skip
            if most == DecodeConfig.warm_start:
                first_weights.setdefault(trace.domain, []).append(every[0].weights[0])
        table = np.array(values)
        rows[str(most)] = {
            **{
                name: ratio_interval(table[:, column], np.ones(len(table)))
                for column, name in enumerate(("weight", "picked", "of_best"))
            },
            "domains": {domain: table[[one.domain == domain for one in traces]].mean(0).tolist() for domain in domains},
        }
    return {"texts": len(traces), "warm_starts": rows, "drafters": list(traces[0].drafters),
            "first_weights": {domain: np.mean(each, axis=0).tolist() for domain, each in first_weights.items()}}  # fmt: skip


def weights_along(learner: Learner, losses: np.ndarray) -> np.ndarray:
    """Returns the weights before each loss, [F, N], of a learner that gets all losses [F, N] without delay."""
    weights = []
    for loss in losses:
        weights.append(learner.weights())
        learner.update(loss)
    return np.array(weights)


def compared(traces: Sequence[Trace]) -> dict[str, Any]:
    """Returns, for every learner of `LEARNERS` on the same losses, tokens behind the best drafter; after some of the losses the
    weight on it, the weight on drafters without positive regret, and the entropy; and how far losses lie from their mean."""
    found: dict[str, Any] = {}
    every = [losses(trace, DRAFT_LENGTH)[: trace.prob.shape[1] - DRAFT_LENGTH + 1] for trace in traces]
    for name, make in LEARNERS.items():
        behind, on_best, entropy, on_losers = [], [], [], []
        for known in every:
            weights = weights_along(make(known.shape[1]), known)
            behind.append(tokens_behind(weights, known, DRAFT_LENGTH))
            best = int(known.sum(0).argmin())
            regrets = np.cumsum((weights * known).sum(1, keepdims=True) - known, axis=0)
            moments = [min(moment, len(weights) - 1) for moment in MOMENTS]
            on_best.append(weights[moments, best])
            entropy.append([-sum(w * np.log(w) for w in weights[moment] if w > 0) for moment in moments])
            on_losers.append([weights[moment][regrets[moment - 1] <= 0].sum() for moment in moments])
        found[name] = {"behind": mean_interval(behind), "behind_by_text": behind, "entropy": np.mean(entropy, axis=0).tolist(),
                       "on_losers": np.mean(on_losers, axis=0).tolist(),
                       "on_best": [mean_interval(column) for column in np.transpose(on_best)]}  # fmt: skip
    reference = found["NormalHedge"]["behind_by_text"]
    for of in found.values():
        of["less_normal_hedge"] = mean_interval(np.subtract(of.pop("behind_by_text"), reference))
    spread = [np.abs(known - known.mean(1, keepdims=True)).mean() for known in every]
    return {"texts": len(traces), "learners": found, "loss_spread": float(np.mean(spread))}


def replayed(traces: Sequence[Trace], seeds: int, track: Callable[..., Any]) -> dict[str, Any]:
    """Returns the tokens per round of some learners over the best fixed drafter's, replayed with delay and without a warm
    start, and how much more that is than NormalHedge's."""
    best = [tokens_per_round_alone(trace, DRAFT_LENGTH, seeds).max() for trace in traces]
    config = DecodeConfig(draft_length=DRAFT_LENGTH, warm_start=0)
    found: dict[str, list[float]] = {}
    for name in REPLAYED:
        shares = found[name] = []
        for trace, of in track(list(zip(traces, best)), f"{name}, replayed"):
            runs = [replay(trace, config, seed=1000 * seed + trace.number, learner=LEARNERS[name](len(trace.drafters)))
                    for seed in range(seeds)]  # fmt: skip
            shares.append(tokens_per_round(runs) / of)
    reference = found["NormalHedge"]
    return {name: {"of_best": mean_interval(shares), "less_normal_hedge": mean_interval(np.subtract(shares, reference))}
            for name, shares in found.items()}  # fmt: skip


def measure(lab: Lab) -> dict[str, Any]:
    result: dict[str, Any] = {"draft_length": DRAFT_LENGTH, "warm": {}}
    for name in SETS:
        traces = lab.traces(name, full_drafts=DRAFT_LENGTH)
        key = f"{name}: {signature(traces)}, K {DRAFT_LENGTH}, {lab.seeds} seeds"
        result["warm"][name] = lab.once(
            f"warm {key}, M {WARM_STARTS}, {BEGINNING}",
            lambda traces=traces: warm_starts(traces, lab.seeds, lab.track),
        )
    traces = lab.traces("greedy", full_drafts=DRAFT_LENGTH)
    key = f"{signature(traces)}, K {DRAFT_LENGTH}, {list(LEARNERS)}"
    result["learners"] = lab.once(f"compared: {key}, {MOMENTS}", lambda: compared(traces))
    result["replayed"] = lab.once(f"replayed: {key}, {lab.seeds} seeds", lambda: replayed(traces, lab.seeds, lab.track))
    return result


def closed(result: dict[str, Any], name: str) -> float:
    """Returns the share of AdaNormalHedge's lag behind NormalHedge that a change makes up; NaN if there is no lag."""
    of = result["learners"]["learners"]
    gap = of["AdaNormalHedge"]["less_normal_hedge"]["mean"]
    return (of["AdaNormalHedge"]["behind"]["mean"] - of[name]["behind"]["mean"]) / gap if gap > 0 else float("nan")


def tables(result: dict[str, Any]) -> dict[str, str]:
    warm, compared_, replays = result["warm"], result["learners"], result["replayed"]
    first = next(iter(warm.values()))
    domains = list(first["first_weights"])

    def row_of(name: str, of: dict[str, Any]) -> list[str]:
        replayed_ = [interval(one, 3) for one in replays[name].values()] if name in replays else ["", ""]
        share = f"{100 * closed(result, name):.0f}" if name in list(compared_["learners"])[3:] else ""
        return [name, interval(of["behind"], 3), interval(of["less_normal_hedge"], 3), share,
                *(f"{one['mean']:.2f}" for one in of["on_best"]), f"{of['on_losers'][-1]:.3f}", f"{of['entropy'][-1]:.2f}",
                *replayed_]  # fmt: skip

    return {
        "warm-start": markdown(
            ["texts, M", "first pick", "weight", "tokens per round, of best", *(f"first pick, {domain}" for domain in domains)],
            [[f"{of['texts']} {name}, {most}", interval(row["picked"]), interval(row["weight"]), interval(row["of_best"], 3),
              *(f"{row['domains'][domain][1]:.2f}" if domain in row["domains"] else "" for domain in domains)]
             for name, of in warm.items() for most, row in of["warm_starts"].items()],
        ),
        "first-weights": markdown(["texts of", *first["drafters"]], [
            [domain, *(f"{weight:.2f}" for weight in weights)] for domain, weights in first["first_weights"].items()
        ]),
        "learners": markdown(
            ["learner", "tokens behind the best", "less NormalHedge's", "lag made up, %",
             *(f"weight on best, {at}" for at in MOMENTS), "weight on those not ahead", "entropy", "replayed, of best",
             "less NormalHedge's"],
            [row_of(name, of) for name, of in compared_["learners"].items()],
        ),
        "spread": markdown(
            ["", "loss"], [["mean distance of a drafter's loss from the drafters' mean", f"{compared_['loss_spread']:.2f}"]]
        ),
    }  # fmt: skip


def draw(result: dict[str, Any]):
    made, (pick, begin, prior, along, mass, replays) = figure(3, 2)
    marks = range(len(WARM_STARTS))
    for number, (name, of) in enumerate(result["warm"].items()):
        rows = of["warm_starts"].values()
        band(pick, marks, [row["picked"] for row in rows], label=f"{name}, first pick", color=f"C{number}")
        band(pick, marks, [row["weight"] for row in rows], label=f"{name}, weight", color=f"C{number}", linestyle="--")
        band(begin, marks, [row["of_best"] for row in rows], label=name)
    pick.set(
        title="the first round's drafter is the best in hindsight", xlabel="M, prompt positions learned from", ylabel="share"
    )
    begin.set(title=f"tokens per round, first {BEGINNING} tokens", xlabel="M, prompt positions learned from",
              ylabel="of the best fixed drafter's")  # fmt: skip
    for axes in (pick, begin):
        axes.set_xticks(marks, WARM_STARTS)
        axes.legend()
    first = next(iter(result["warm"].values()))
    shown = prior.imshow(list(first["first_weights"].values()), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    prior.set_xticks(range(len(first["drafters"])), first["drafters"], rotation=45, ha="right")
    prior.set_yticks(range(len(first["first_weights"])), first["first_weights"])
    prior.set(title=f"weights after {DecodeConfig.warm_start} positions, by domain")
    made.colorbar(shown, ax=prior)
    for name, of in result["learners"]["learners"].items():
        style = "-" if name in ("NormalHedge", "Hedge", "AdaNormalHedge") else ":"
        along.plot(MOMENTS, [one["mean"] for one in of["on_best"]], style, marker=".", label=name)
    along.set(title="weight on the drafter that is best in the end", xlabel="losses", ylim=(0, 1))
    for axes, values, title, unit in (
        (
            mass,
            {name: of["behind"] for name, of in result["learners"]["learners"].items()},
            "behind the best drafter",
            "tokens per round",
        ),
        (
            replays,
            {name: of["of_best"] for name, of in result["replayed"].items()},
            "tokens per round, replayed",
            "of the best fixed drafter's",
        ),
    ):
        mean, low, high = bounds(list(values.values()))
        axes.errorbar(mean, range(len(values)), xerr=[mean - low, high - mean], fmt="o", capsize=2)
        axes.set_yticks(range(len(values)), values)
        axes.set(title=title, xlabel=unit)
        axes.invert_yaxis()
    along.legend(fontsize=7)
    return made


STUDY = Study("open-questions", "Two of the paper's open questions", measure, tables, draw)
