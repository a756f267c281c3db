"""Two questions that the paper leaves open: whether a prompt can tell the first drafter, and why AdaNormalHedge does worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hedgespec import learners
from hedgespec.config import DecodeConfig
from hedgespec.experiments import Experiment
from hedgespec.experiments.hindsight import best_of, fixed_mats, length_losses, long_enough, tokens_behind
from hedgespec.experiments.laboratory import Laboratory
from hedgespec.experiments.measures import signature
from hedgespec.experiments.shift import BEGINNING, within
from hedgespec.experiments.statistics import mat, mean_interval, ratio_interval, told
from hedgespec.experiments.telling import band, figure, titled
from hedgespec.experiments.traces import Trace, alone, replay
from hedgespec.learners import AdaNormalHedge, Learner, NormalHedge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPLAYED = ("NormalHedge", "Hedge", "AdaNormalHedge", "losses x 4", "losses x 16", "losses x 16, one C")
SETS = ("greedy", "reworded")
DRAFT_LENGTH = 5
WARM_STARTS = (0, 8, 16, 32, 64)
SCALES = (2, 4, 8, 16)
"""What AdaNormalHedge's losses are multiplied by."""
MOMENTS = (8, 16, 32, 64)
"""Losses after which weights are told."""


class ScaledAdaNormalHedge(AdaNormalHedge):
    """AdaNormalHedge whose losses are multiplied: against regret in larger numbers its own unit, 1, is smaller."""

    def __init__(self, num_drafters: int, prior: ArrayLike | None = None, *, scale: float = 1.0) -> None:
        self.scale = scale
        super().__init__(num_drafters, prior)

    def _learn(self, losses: NDArray[np.float64], chosen: int | None, chosen_weight: float | None) -> None:
        super()._learn(self.scale * losses, chosen, chosen_weight)


class SecondOrderAdaNormalHedge(AdaNormalHedge):
    """AdaNormalHedge with C = sum of r^2, which hardly grows while losses are nearly tied."""

    def _learn(self, losses: NDArray[np.float64], chosen: int | None, chosen_weight: float | None) -> None:
        instantaneous = self._weights.dot(losses) - losses
        self.regrets += instantaneous
        self.absolute_regrets += instantaneous**2


class SharedScaleAdaNormalHedge(ScaledAdaNormalHedge):
    """AdaNormalHedge with one C for all, the least: a drafter whose losses vary is not slowed for it."""

    def _weigh(self) -> NDArray[np.float64]:
        own = self.absolute_regrets
        self.absolute_regrets = np.full_like(own, own.min())
        weights = super()._weigh()
        self.absolute_regrets = own
        return weights


class AheadAdaNormalHedge(AdaNormalHedge):
    """AdaNormalHedge that gives nothing to a drafter whose regret is not positive, as NormalHedge does."""

    def _weigh(self) -> NDArray[np.float64]:
        weights = super()._weigh()
        ahead = self.regrets > 0
        return np.where(ahead, weights, 0.0) / weights[ahead].sum() if ahead.any() else self.prior.copy()


LEARNERS: dict[str, Callable[..., Learner]] = {
    "NormalHedge": NormalHedge,
    "Hedge": lambda count: learners.make("hedge", count),
    "AdaNormalHedge": AdaNormalHedge,
    "C = sum r^2": SecondOrderAdaNormalHedge,
    "one C for all": SharedScaleAdaNormalHedge,
    "0 unless ahead": AheadAdaNormalHedge,
    **{f"losses x {scale}": lambda count, scale=scale: ScaledAdaNormalHedge(count, scale=scale) for scale in SCALES},
    f"losses x {SCALES[-1]}, one C": lambda count: SharedScaleAdaNormalHedge(count, scale=SCALES[-1]),
}
"""By what they are called; from the fourth on AdaNormalHedge with one thing changed, a hypothesis each."""


def beginning_of(trace: Trace, positions: int) -> Trace:
    """The first positions of a text, of a request that goes on."""
    cut = {name: getattr(trace, name)[:, :positions] for name in ("prob", "ratio", "drafted")}
    return replace(trace, **cut, tokens=trace.tokens[: trace.prompt_length + 1 + cut["prob"].shape[1]])


def warm_starts(traces: Sequence[Trace], seeds: int, track: Callable[..., Any]) -> dict[str, Any]:
    """By M and domain: weight at the first round on the drafters that are best in hindsight, the share of requests whose first
    pick is one of them, and MAT over the first `BEGINNING` tokens, over that of the best fixed drafter there; and every
    drafter's weight at the first round, mean of each domain's texts at the default M, [domains, N]."""
    domains = list(dict.fromkeys(trace.domain for trace in traces))
    known = [(best_of(fixed), int(fixed.argmax())) for fixed in (fixed_mats(trace, DRAFT_LENGTH, seeds) for trace in traces)]
    rows: dict[str, Any] = {}
    first_weights: dict[str, Any] = {}
    for most in WARM_STARTS:
        config = DecodeConfig(draft_length=DRAFT_LENGTH, warm_start=most)
        values = []
        for trace, (best, leader) in track(list(zip(traces, known)), f"warm start of {most}"):
            short = beginning_of(trace, BEGINNING + DRAFT_LENGTH + 1)  # no round that begins early enough sees the cut
            every = [replay(short, config, seed=1000 * seed + trace.number) for seed in range(seeds)]
            start = slice(0, BEGINNING)
            tokens, rounds = np.sum([within(stats, start) for stats in every], axis=0)
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
    """The weights before each loss, [F, N], of a learner that hears them all without delay."""
    weights = []
    for loss in losses:
        weights.append(learner.weights())
        learner.update(loss)
    return np.array(weights)


def compared(traces: Sequence[Trace]) -> dict[str, Any]:
    """Every learner of `LEARNERS` on the same losses from nothing: tokens a round behind the best; after some of the losses the
    weight on it, that on drafters with no positive regret, and the entropy; and how far losses lie from their mean."""
    found: dict[str, Any] = {}
    every = [length_losses(trace, DRAFT_LENGTH) for trace in traces]
    for name, make in LEARNERS.items():
        behind, on_best, entropy, on_losers = [], [], [], []
        for losses in every:
            weights = weights_along(make(losses.shape[1]), losses)
            behind.append(tokens_behind(weights, losses, DRAFT_LENGTH))
            best = int(losses.sum(0).argmin())
            regrets = np.cumsum((weights * losses).sum(1, keepdims=True) - losses, axis=0)
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
    spread = [np.abs(losses - losses.mean(1, keepdims=True)).mean() for losses in every]
    return {"texts": len(traces), "learners": found, "loss_spread": float(np.mean(spread))}


def replayed(traces: Sequence[Trace], seeds: int, track: Callable[..., Any]) -> dict[str, Any]:
    """MAT of some of the learners over the best fixed drafter's, decoded from nothing, with delay; and how much more that is
    than NormalHedge's."""
    best = [fixed_mats(trace, DRAFT_LENGTH, seeds).max() for trace in traces]
    config = DecodeConfig(draft_length=DRAFT_LENGTH, warm_start=0)
    found: dict[str, list[float]] = {}
    for name in REPLAYED:
        shares = found[name] = []
        for trace, of in track(list(zip(traces, best)), f"{name}, replayed"):
            runs = [replay(trace, config, seed=1000 * seed + trace.number, learner=LEARNERS[name](len(trace.drafters)))
                    for seed in range(seeds)]  # fmt: skip
            shares.append(mat(runs) / of)
    reference = found["NormalHedge"]
    return {name: {"of_best": mean_interval(shares), "less_normal_hedge": mean_interval(np.subtract(shares, reference))}
            for name, shares in found.items()}  # fmt: skip


def measure(lab: Laboratory) -> dict[str, Any]:
    result: dict[str, Any] = {"draft_length": DRAFT_LENGTH, "warm": {}}
    for name in SETS:
        traces = long_enough(lab.traces(name), DRAFT_LENGTH)
        key = f"{name}: {signature(traces)}, K {DRAFT_LENGTH}, {lab.seeds} seeds"
        result["warm"][name] = lab.once(
            f"warm {key}, M {WARM_STARTS}, {BEGINNING}",
            lambda traces=traces: warm_starts(traces, lab.seeds, lab.track),
        )
    traces = long_enough(lab.traces("greedy"), DRAFT_LENGTH)
    key = f"{signature(traces)}, K {DRAFT_LENGTH}, {list(LEARNERS)}"
    result["learners"] = lab.once(f"compared: {key}, {MOMENTS}", lambda: compared(traces))
    result["replayed"] = lab.once(f"replayed: {key}, {lab.seeds} seeds", lambda: replayed(traces, lab.seeds, lab.track))
    return result


def closed(result: dict[str, Any], name: str) -> float:
    """Share of AdaNormalHedge's lag behind NormalHedge that one of the changes makes up; NaN where it does not lag."""
    of = result["learners"]["learners"]
    gap = of["AdaNormalHedge"]["less_normal_hedge"]["mean"]
    return (of["AdaNormalHedge"]["behind"]["mean"] - of[name]["behind"]["mean"]) / gap if gap > 0 else float("nan")


def tell(result: dict[str, Any]) -> str:
    warm, compared_, replays = result["warm"], result["learners"], result["replayed"]
    domains = list(next(iter(warm.values()))["first_weights"])
    first = next(iter(warm.values()))

    def about(of: dict[str, Any]) -> list[str]:
        return [told(of["behind"], 3), told(of["less_normal_hedge"], 3), *(f"{one['mean']:.2f}" for one in of["on_best"]),
                f"{of['on_losers'][-1]:.3f}", f"{of['entropy'][-1]:.2f}"]  # fmt: skip

    return "\n".join([
        titled(
            "Open question 1, a prompt's last M positions are heard before the first round, 0 being the paper's. First pick: "
            "share of requests whose first drafter is the best in hindsight, or equal to it; weight: on those at the first "
            f"round; MAT: over the first {BEGINNING} tokens, of the best fixed drafter's there:",
            ["texts", "M", "first pick", "weight", "MAT of best", *(f"first pick, {domain}" for domain in domains)],
            ([f"{of['texts']} {name}", most, *(told(row[key]) for key in ("picked", "weight")), told(row["of_best"], 3),
              *(f"{row['domains'][domain][1]:.2f}" if domain in row["domains"] else "" for domain in domains)]
             for name, of in warm.items() for most, row in of["warm_starts"].items()),
        ),
        titled(
            f"Weights at the first round after {DecodeConfig.warm_start} positions, {next(iter(warm))} texts:",
            ["texts of", *first["drafters"]],
            ([domain, *(f"{weight:.2f}" for weight in weights)] for domain, weights in first["first_weights"].items()),
        ),
        titled(
            f"Open question 3, learners on the same losses of {compared_['texts']} texts, from nothing and without delay; "
            "below AdaNormalHedge the same with one thing changed:",
            ["learner", "tokens a round behind the best", "less NormalHedge's", *(f"weight on best, {at}" for at in MOMENTS),
             "weight on those not ahead", "entropy", "MAT of best, replayed", "less NormalHedge's"],
            ([name, *about(of), *([told(one, 3) for one in replays[name].values()] if name in replays else ["", ""])]
             for name, of in compared_["learners"].items()),
        ),
        _sense(result),
        "",
    ])  # fmt: skip


def _sense(result: dict[str, Any]) -> str:
    compared_ = result["learners"]
    words = []
    for name, of in result["warm"].items():
        rows = of["warm_starts"]
        cold, default = rows["0"], rows[str(DecodeConfig.warm_start)]
        most = max(rows, key=lambda one: rows[one]["of_best"]["mean"])
        verdict = "beyond the intervals" if default["of_best"]["low"] > cold["of_best"]["high"] else "the intervals overlap"
        words.append(
            f"On {name} texts the first pick is the best in hindsight in {100 * cold['picked']['mean']:.0f}% of requests "
            f"without and {100 * default['picked']['mean']:.0f}% with {DecodeConfig.warm_start} positions of the prompt, and "
            f"MAT over the first {BEGINNING} tokens goes from {100 * cold['of_best']['mean']:.1f} to "
            f"{100 * default['of_best']['mean']:.1f}% of the best drafter's ({verdict}); M = {most} does best."
        )
    gap = compared_["learners"]["AdaNormalHedge"]["less_normal_hedge"]
    if gap["low"] <= 0:
        words.append(f"AdaNormalHedge is {gap['mean']:+.3f} tokens a round behind NormalHedge, which chance explains.")
        return " ".join(words)
    changes = {name: closed(result, name) for name in list(compared_["learners"])[3:]}
    both, alone_ = list(changes)[-1], list(changes)[:-1]
    best = max(alone_, key=changes.__getitem__)
    others = ", ".join(f"`{name}` {100 * changes[name]:.0f}%" for name in alone_ if name != best)
    words.append(
        f"AdaNormalHedge is {told(gap, 3)} tokens a round behind NormalHedge where both hear the same losses at once. Of "
        f"single changes `{best}` makes up {100 * changes[best]:.0f}% of that ({others}); `{both}` makes up "
        f"{100 * changes[both]:.0f}%."
    )
    replayed_ = result["replayed"]["AdaNormalHedge"]["less_normal_hedge"]
    chance = "which chance explains" if replayed_["low"] <= 0 <= replayed_["high"] else "which chance does not explain"
    words.append(
        f"Decoding, where losses come late, MAT differs by {100 * replayed_['mean']:+.2f}% of the best drafter's, {chance}."
    )
    if changes[both] > max(0.8, 1.2 * changes[best]):
        words.append(
            "So it takes two things. The potential compares R + 1 with R - 1, as if losses filled [0, 1], while drafters lie "
            f"{compared_['loss_spread']:.2f} from their mean: until regret has grown past 1 the weights stay near the prior. "
            "And the drafter that is ahead has the largest |r| and so the largest C, which holds back just the one to "
            "follow. NormalHedge has neither a unit nor a scale for each: its c is shared and grows with the regrets."
        )
    return " ".join(words)


def draw(result: dict[str, Any]) -> Figure:
    made, (pick, begin, prior, along, mass, replays) = figure(3, 2)
    marks = range(len(WARM_STARTS))
    for number, (name, of) in enumerate(result["warm"].items()):
        rows = of["warm_starts"].values()
        band(pick, marks, [row["picked"] for row in rows], label=f"{name}, first pick", color=f"C{number}")
        band(pick, marks, [row["weight"] for row in rows], label=f"{name}, weight", color=f"C{number}", linestyle="--")
        band(begin, marks, [row["of_best"] for row in rows], label=name)
    pick.set(
        title="the first round's drafter is the best in hindsight", xlabel="M, positions of the prompt heard", ylabel="share"
    )
    begin.set(title=f"MAT over the first {BEGINNING} tokens", xlabel="M, positions of the prompt heard",
              ylabel="of the best fixed drafter's")  # fmt: skip
    for axes in (pick, begin):
        axes.set_xticks(marks, [str(count) for count in WARM_STARTS])
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
    along.set(title="weight on the drafter that is best in the end", xlabel="losses heard", ylim=(0, 1))
    for axes, values, title, unit in (
        (
            mass,
            {name: of["behind"] for name, of in result["learners"]["learners"].items()},
            "behind the best drafter",
            "tokens a round",
        ),
        (
            replays,
            {name: of["of_best"] for name, of in result["replayed"].items()},
            "MAT, replayed from nothing",
            "of the best fixed drafter's",
        ),
    ):
        mean, low, high = (np.array([one[key] for one in values.values()]) for key in ("mean", "low", "high"))
        axes.errorbar(mean, range(len(values)), xerr=[mean - low, high - mean], fmt="o", capsize=2)
        axes.set_yticks(range(len(values)), values)
        axes.set(title=title, xlabel=unit)
        axes.invert_yaxis()
    along.legend(fontsize=7)
    return made


EXPERIMENT = Experiment(
    name="open-questions",
    title="Two of the paper's open questions",
    question="The paper asks whether the first drafter could be chosen better than blindly, and why AdaNormalHedge, whose "
    "bound is the better one, does worse. Our hypothesis on the first: acceptance on the prompt's own tokens tells the expert. "
    "On the second: (a) its C = sum of |r| grows where losses are nearly tied, or holds back a drafter whose losses vary, (b) "
    "it leaves weight on drafters that are behind, (c) its unit steps are too coarse for losses that hardly differ.",
    measure=measure,
    tell=tell,
    draw=draw,
)
