"""Product against exact, and against sums that are cut short: which estimate of the accepted length ranks drafters right."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hedgespec.config import DecodeConfig
from hedgespec.delay import DelayQueue
from hedgespec.evaluate import expected_accepted_length, length_loss
from hedgespec.experiments import Experiment
from hedgespec.experiments.hindsight import (
    best_of,
    fixed_mats,
    length_losses,
    long_enough,
    realised_lengths,
    tokens_behind,
    weights_by_position,
)  # fmt: skip
from hedgespec.experiments.laboratory import Laboratory
from hedgespec.experiments.measures import signature
from hedgespec.experiments.statistics import mat, mean_interval, ratio_interval, told
from hedgespec.experiments.telling import band, bars, figure, titled
from hedgespec.experiments.traces import Trace, alone, replay
from hedgespec.records import Feedback

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = ("greedy", "coupled", "sampled")
DRAFT_LENGTH = 5
SEEN = (8, 16, 32, 64, None)
"""Positions after which drafters are ranked; None is all."""
PAIRS, BRANCH, DEPTH = 200, 4, 3
FEEDS = ("exact", "product", "cut short")
ESTIMATES = ("exact", "product", "steadied")


def steadied(prob: np.ndarray, ratio: np.ndarray, draft_length: int, usual: np.ndarray) -> np.ndarray:
    """length_j = prob_j * (1 + rest_j) + ratio_j * (length_{j+1} - rest_j), from the draft's last token to its first; plus 1.

    `exact` with a control variate: rest_j, what a drafter of the usual acceptance would add after j, is known before the token
    is, and prob is the mean of ratio, so that it drops out on average whatever it is. Not bounded by 1 and K + 1. Ours.

    Args:
        prob, ratio: acceptance_prob and acceptance_ratio, [..., T].
        draft_length: K.
        usual: an acceptance guessed from what precedes each round, [..., T-K+1].
    """
    starts = prob.shape[-1] - draft_length + 1
    length = np.zeros_like(usual)
    for k in reversed(range(draft_length)):
        rest = sum((usual**power for power in range(1, draft_length - k)), np.zeros_like(usual))
        length = prob[..., k : k + starts] * (1 + rest) + ratio[..., k : k + starts] * (length - rest)
    return 1 + length


def predicted(prob: np.ndarray, ratio: np.ndarray, draft_length: int, estimate: str) -> np.ndarray:
    """One of `ESTIMATES` of the tokens of a round from each position, [N, T-K+1]."""
    if estimate != "steadied":
        return expected_accepted_length(prob, ratio, draft_length, estimate)
    before = np.cumsum(prob, axis=1) - prob
    usual = (0.5 + before) / (1 + np.arange(prob.shape[1]))
    return steadied(prob, ratio, draft_length, usual[:, : prob.shape[1] - draft_length + 1])


def cut_short(prob: np.ndarray, ratio: np.ndarray, draft_length: int) -> np.ndarray:
    """`exact` from each position [N, T] of one round, summed over what the round revealed and no further, [N, T]."""
    length = np.zeros((len(prob), prob.shape[1] + 1))
    for position in reversed(range(prob.shape[1])):
        length[:, position] = prob[:, position] + ratio[:, position] * length[:, position + 1]
    return 1 + np.minimum(length[:, :-1], draft_length)


class CutShort(DelayQueue):
    """A queue that waits for nothing: the losses of a round's positions are those of sums cut at its end."""

    def push(self, acceptance_prob: np.ndarray | torch.Tensor, acceptance_ratio: np.ndarray | torch.Tensor) -> list[Feedback]:
        lengths = cut_short(np.asarray(acceptance_prob), np.asarray(acceptance_ratio), self.draft_length)
        first, self._position = self._position, self._position + lengths.shape[1]
        losses = length_loss(lengths, self.draft_length).clip(0).T
        return [Feedback(row, position) for position, row in enumerate(losses, first)]


def enumerated(pairs: int, branch: int, depth: int, seed: int = 7) -> dict[str, Any]:
    """Bias and spread of each estimate over every text of `depth` tokens out of `branch`, for random targets and drafters.

    Returns: by estimate {"bias": of each pair in tokens, "spread": standard deviation over texts, mean of the pairs}.
    """
    random = np.random.default_rng(seed)
    paths = np.array(list(itertools.product(range(branch), repeat=depth)))
    nodes = [(paths[:, :d] * branch ** np.arange(d - 1, -1, -1)).sum(1) for d in range(depth)]

    def model() -> np.ndarray:  # [pairs, paths, depth, branch]
        powers = [np.exp(1.5 * random.standard_normal((pairs, branch**d, branch))) for d in range(depth)]
        return np.stack([(one / one.sum(-1, keepdims=True))[:, node] for one, node in zip(powers, nodes)], axis=2)

    target, draft = model(), model()
    prob = np.minimum(target, draft).sum(-1)
    at = paths[None, :, :, None]
    target_prob, draft_prob = (np.take_along_axis(one, at, -1)[..., 0] for one in (target, draft))
    ratio, law = np.minimum(1, draft_prob / target_prob), target_prob.prod(-1)
    reach = np.minimum(target_prob, draft_prob).cumprod(-1)  # a prefix of k tokens is shared by branch ** (depth - k) paths
    truth = 1 + sum(reach[..., d].sum(1) / branch ** (depth - 1 - d) for d in range(depth))
    found = {}
    for estimate in ESTIMATES:
        if estimate == "steadied":  # nothing precedes these texts; the first position's own acceptance is known there, too
            lengths = steadied(prob, ratio, depth, prob[..., :1])[..., 0]
        else:
            lengths = expected_accepted_length(prob, ratio, depth, estimate)[..., 0]
        mean = (law * lengths).sum(1)
        spread = np.sqrt((law * (lengths - mean[:, None]) ** 2).sum(1))
        found[estimate] = {"bias": (mean - truth).tolist(), "spread": float(spread.mean())}
    return found


def predictions(traces: Sequence[Trace]) -> dict[str, Any]:
    """Predicted less realised tokens of a round, by estimate and drafter, and the spread of both over a text's positions."""
    realised = [realised_lengths(trace, DRAFT_LENGTH) for trace in traces]
    told = {}
    for estimate in ESTIMATES:
        lengths = [predicted(trace.prob, trace.ratio, DRAFT_LENGTH, estimate) for trace in traces]
        errors = np.array([(one - real).mean(1) for one, real in zip(lengths, realised)])
        told[estimate] = {
            "error": mean_interval(errors.mean(1)),
            "error_by_drafter": {name: mean_interval(errors[:, i]) for i, name in enumerate(traces[0].drafters)},
            "spread": float(np.mean([one.std(1) for one in lengths])),
        }
    return {"estimates": told, "realised": mean_interval([one.mean() for one in realised])}


def depths(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """By depth, over drafts that got there: acceptance of who reads verified tokens, and of who drafted them."""
    most = min(trace.drafted.shape[2] for trace in traces)
    rows = []
    for depth in range(most):
        forced, drafted, reached = [], [], []
        for trace in traces:
            starts = max(trace.drafted.shape[1] - depth, 0)
            arrived = trace.drafted[:, :starts, :depth].prod(-1)
            forced.append((arrived * trace.ratio[:, depth:]).sum())
            drafted.append((arrived * trace.drafted[:, :starts, depth]).sum())
            reached.append(arrived.sum())
        rows.append({"forced": ratio_interval(forced, reached), "drafted": ratio_interval(drafted, reached),
                     "gap": ratio_interval(np.subtract(forced, drafted), reached), "reached": float(sum(reached))})  # fmt: skip
    return rows


def agreement(scores: np.ndarray, mats: np.ndarray) -> tuple[float, float]:
    """Of the pairs of drafters whose MAT differs the share that scores order the same way, a tie for half a pair; and whether
    the highest score is a best drafter's, ties shared out."""
    above = np.sign(mats[:, None] - mats[None])
    ranked = np.sign(scores[:, None] - scores[None])
    pairs = above > 0
    share = (1 + ranked[pairs]).mean() / 2 if pairs.any() else 1.0
    first = np.flatnonzero(scores >= scores.max() - 1e-12)
    return float(share), float(np.isin(first, best_of(mats)).mean())


def heard_cut_short(trace: Trace, drafter: int, seen: int | None) -> np.ndarray:
    """Mean of the sums cut short over a text's first positions, [N], while one drafter drafts."""
    emitted = alone(trace, drafter, DRAFT_LENGTH)
    ends = np.cumsum(emitted)
    last = ends[-1] if seen is None else max(min(seen, ends[-1]), ends[0])
    rounds = [cut_short(trace.prob[:, end - count : end], trace.ratio[:, end - count : end], DRAFT_LENGTH)
              for count, end in zip(emitted, ends) if end <= last]  # fmt: skip
    return np.concatenate(rounds, axis=1).mean(1)


def rankings(traces: Sequence[Trace], mats: Sequence[np.ndarray]) -> dict[str, list[dict[str, Any]]]:
    """How well each estimate's mean over the first positions, and that of what drafters realise from there, orders them by
    MAT: a row for each of `SEEN`."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*ESTIMATES, "cut short", "realised")}
    for seen in SEEN:
        values: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
        for trace, fixed in zip(traces, mats):
            count = trace.prob.shape[1] if seen is None else max(min(seen, trace.prob.shape[1]), DRAFT_LENGTH)
            for name in ESTIMATES:
                scores = predicted(trace.prob[:, :count], trace.ratio[:, :count], DRAFT_LENGTH, name).mean(1)
                values[name].append(agreement(scores, fixed))
            each = [agreement(heard_cut_short(trace, one, seen), fixed) for one in range(len(fixed))]
            values["cut short"].append(tuple(np.mean(each, axis=0)))
            values["realised"].append(
                agreement(realised_lengths(trace, DRAFT_LENGTH)[:, : count - DRAFT_LENGTH + 1].mean(1), fixed)
            )
        for name, of in values.items():
            pairs, top = zip(*of)
            found[name].append({"seen": seen, "pairs": mean_interval(pairs), "top": mean_interval(top)})
    return found


def margins(traces: Sequence[Trace], mats: Sequence[np.ndarray]) -> dict[str, Any]:
    """How much longer the best drafter's rounds look than the worst's, in tokens, by what is heard and who drafts."""
    found: dict[str, list[float]] = {"waited for": [], "cut short, the best drafting": [], "cut short, the worst drafting": []}
    for trace, fixed in zip(traces, mats):
        best, worst = int(fixed.argmax()), int(fixed.argmin())
        whole = predicted(trace.prob, trace.ratio, DRAFT_LENGTH, "exact").mean(1)
        heard = (whole, heard_cut_short(trace, best, None), heard_cut_short(trace, worst, None))
        for name, lengths in zip(found, heard):
            found[name].append(float(lengths[best] - lengths[worst]))
    return {name: mean_interval(values) for name, values in found.items()}


def stops_early(cycles: int) -> Trace:
    """Made up: drafter 0 is right at every second of 50 tokens, drafter 1 at none of 40 and then at ten in a row."""
    positions = np.arange(50 * cycles)
    ratio = np.stack([positions % 2 == 0, positions % 50 >= 40]).astype(float)
    after = np.pad(ratio, ((0, 0), (0, DRAFT_LENGTH)))
    drafted = np.stack([after[:, depth : depth + len(positions)] for depth in range(DRAFT_LENGTH)], -1).cumprod(-1)
    tokens = np.zeros(len(positions) + 2, dtype=np.int64)
    return Trace("made up", 0, "sampled", 0.0, 0, len(positions) + 1, 1, ("every second", "in runs"), (True, True), tokens,
                 np.ones((2, 0)), ratio, ratio, drafted)  # fmt: skip


def made_up(seeds: int) -> dict[str, Any]:
    """Of both drafters of `stops_early`: tokens a round from any position, those heard cut short while the first drafts, and
    MAT; and NormalHedge's MAT by what it hears."""
    trace = stops_early(8)
    config = DecodeConfig(draft_length=DRAFT_LENGTH, warm_start=0, evaluate_every=1)
    queues = {"exact": lambda: None, "cut short": lambda: CutShort(2, DRAFT_LENGTH)}
    return {
        "drafters": trace.drafters,
        "waited for": predicted(trace.prob, trace.ratio, DRAFT_LENGTH, "exact").mean(1).tolist(),
        "cut short": heard_cut_short(trace, 0, None).tolist(),
        "mat": fixed_mats(trace, DRAFT_LENGTH, 1).tolist(),
        "learner": {name: mat([replay(trace, config, seed=seed, queue=make()) for seed in range(seeds)])
                    for name, make in queues.items()},
    }  # fmt: skip


def replayed(traces: Sequence[Trace], mats: Sequence[np.ndarray], seeds: int) -> dict[str, Any]:
    """NormalHedge by feed, from nothing: MAT over the best fixed drafter's, and tokens a round behind, a value a text."""
    values: dict[str, dict[str, list[float]]] = {feed: {"of_best": [], "behind": [], "mat": []} for feed in FEEDS}
    for trace, fixed in zip(traces, mats):
        losses = length_losses(trace, DRAFT_LENGTH)
        for feed, into in values.items():
            config = DecodeConfig(draft_length=DRAFT_LENGTH, mode=trace.mode, warm_start=0, evaluate_every=1,
                                  estimator="product" if feed == "product" else "exact")  # fmt: skip
            runs = [replay(trace, config, seed=1000 * seed + trace.number,
                           queue=CutShort(len(fixed), DRAFT_LENGTH) if feed == "cut short" else None)
                    for seed in range(seeds)]  # fmt: skip
            found = float(mat(runs))
            into["mat"].append(found)
            into["of_best"].append(found / fixed.max())
            behind = [tokens_behind(weights_by_position(run), losses, DRAFT_LENGTH) for run in runs]
            into["behind"].append(float(np.mean(behind)))
    told = {feed: {name: mean_interval(each) for name, each in of.items()} for feed, of in values.items()}
    for feed in FEEDS[1:]:
        for name in ("of_best", "behind"):
            difference = np.subtract(values[feed][name], values["exact"][name])
            told[feed][f"{name}_less_exact"] = mean_interval(difference)
    return told


def measure(lab: Laboratory) -> dict[str, Any]:
    def of_set(name: str, traces: list[Trace]) -> dict[str, Any]:
        mats = [fixed_mats(trace, DRAFT_LENGTH, lab.seeds) for trace in lab.track(traces, f"{name}: each drafter alone")]
        return {
            "texts": len(traces), **predictions(traces), "depths": depths(traces), "rankings": rankings(traces, mats),
            "margins": margins(traces, mats), "replayed": replayed(traces, mats, lab.seeds),
        }  # fmt: skip

    key = f"{PAIRS} pairs, {BRANCH} tokens, depth {DEPTH}"
    result: dict[str, Any] = {"draft_length": DRAFT_LENGTH, "enumeration": lab.once(
        f"enumeration: {key}", lambda: enumerated(PAIRS, BRANCH, DEPTH)), "enumerated": key, "sets": {}}  # fmt: skip
    result["made_up"] = lab.once(f"made up: K {DRAFT_LENGTH}, {lab.seeds} seeds", lambda: made_up(lab.seeds))
    for name in SETS:
        traces = long_enough(lab.traces(name), DRAFT_LENGTH)
        key = f"set {name}: {signature(traces)}, K {DRAFT_LENGTH}, seen {SEEN}, {lab.seeds} seeds"
        result["sets"][name] = lab.once(key, lambda name=name, traces=traces: of_set(name, traces))
    return result


def tell(result: dict[str, Any]) -> str:
    sets, length, seen = result["sets"], result["draft_length"], [str(one or "all") for one in SEEN]
    deepest = max(len(of["depths"]) for of in sets.values())
    biases = {name: np.array(of["bias"]) for name, of in result["enumeration"].items()}
    spreads = {name: f"{of['spread']:.3f}" for name, of in result["enumeration"].items()}

    def feeds(name: str, of: dict[str, Any]) -> list[list[str]]:
        rows = []
        for feed, row in of["replayed"].items():
            less = [told(row[key], 3) if (key := f"{one}_less_exact") in row else "" for one in ("of_best", "behind")]
            rows.append([name, feed, told(row["mat"]), told(row["of_best"], 3), less[0], told(row["behind"], 3), less[1]])
        return rows

    return "\n".join([
        titled(
            f"Every text of random pairs of distributions ({result['enumerated']}), tokens a round:",
            ["estimate", "largest bias", "mean bias", "spread over texts"],
            ([name, _small(np.abs(bias).max()), _small(bias.mean()), spreads[name]] for name, bias in biases.items()),
        ),
        titled(
            f"Real texts, K = {length}: predicted less realised tokens a round, mean of the drafters, 95% intervals:",
            ["texts", "realised", *ESTIMATES, f"spread: {' / '.join(ESTIMATES)}"],
            ([f"{of['texts']} {name}", told(of["realised"]),
              *(told(of["estimates"][one]["error"], 3) for one in ESTIMATES),
              " / ".join(f"{of['estimates'][one]['spread']:.2f}" for one in ESTIMATES)] for name, of in sets.items()),
        ),
        titled(
            "Acceptance by depth where a draft got there, reading verified tokens / drafting by itself (the paper's B.4: "
            "a head at depth 3 is worse than a teacher-forced pass says):",
            ["texts", *range(1, deepest + 1)],
            ([name, *(f"{row['forced']['mean']:.2f} / {row['drafted']['mean']:.2f}" for row in of["depths"]),
              *[""] * (deepest - len(of["depths"]))] for name, of in sets.items()),
        ),
        titled(
            "Pairs of drafters ordered as their MAT is (the best drafter found), %, by how many positions were seen:",
            ["texts", "estimate", *seen],
            ([name, estimate, *(f"{100 * row['pairs']['mean']:.0f} ({100 * row['top']['mean']:.0f})" for row in rows)]
             for name, of in sets.items() for estimate, rows in of["rankings"].items()),
        ),
        titled(
            "How much longer the best drafter's rounds look than the worst's, tokens:",
            ["texts", *next(iter(sets.values()))["margins"]],
            ([name, *map(told, of["margins"].values())] for name, of in sets.items()),
        ),
        titled(
            "NormalHedge, fresh and without a warm start, by what it hears:",
            ["texts", "heard", "MAT", "over the best fixed drafter's", "less exact's", "tokens a round behind", "less exact's"],
            itertools.chain.from_iterable(feeds(name, of) for name, of in sets.items()),
        ),
        _sense(result),
        "",
    ])  # fmt: skip


def _small(value: float) -> str:
    return f"{value:.3f}" if abs(value) > 1e-4 else f"{value:.0e}"


def _sense(result: dict[str, Any]) -> str:
    enumeration, sets = result["enumeration"], result["sets"]
    worst = {name: float(np.abs(of["bias"]).max()) for name, of in enumeration.items()}
    spread = {name: f"{of['spread']:.2f}" for name, of in enumeration.items()}
    words = [
        f"Enumerated, `product` is off by up to {worst['product']:.2f} tokens and `exact` by {worst['exact']:.0e}, which is "
        f"rounding; the control variate (steadied) keeps that and spreads {spread['steadied']} tokens over texts, against "
        f"{spread['exact']} of `exact` and {spread['product']} of `product`."
    ]
    same = [name for name, of in sets.items() if _difference(of) == 0]
    if same:
        words.append(f"On {' and '.join(same)} texts a proposal is right or wrong, so that all estimates are one.")
    for name, of in sets.items():
        if name in same:
            continue
        pairs = [f"{100 * of['rankings'][one][-1]['pairs']['mean']:.0f}" for one in ESTIMATES]
        gain = of["replayed"]["product"]["of_best_less_exact"]
        words.append(
            f"On {name} texts `product` predicts {_difference(of):+.3f} tokens more than `exact`; over whole texts they order "
            f"{pairs[0]} (`exact`), {pairs[1]} (`product`) and {pairs[2]}% (steadied) of the pairs right, and fed with "
            f"`product` the learner's MAT, over the best drafter's, moves by {100 * gain['mean']:+.2f} points, "
            f"{_chance(gain)}."
        )
    every = list(sets.values())
    deep = [of["depths"][min(2, len(of["depths"]) - 1)] for of in every]
    words.append(
        f"What a head's own features cost no estimate on verified tokens sees: on {' / '.join(sets)} texts `exact` promises "
        f"{_each(of['estimates']['exact']['error']['mean'] for of in every)} tokens more than a round has, and at depth 3 "
        f"acceptance is {_each((row['drafted']['mean'] for row in deep), '.2f')}, where a forced pass has "
        f"{_each((row['forced']['mean'] for row in deep), '.2f')}."
    )
    kept = [of["margins"]["cut short, the worst drafting"]["mean"] / of["margins"]["waited for"]["mean"] for of in every]
    changes = [of["replayed"]["cut short"]["of_best_less_exact"] for of in every]
    lost = [name for name, change in zip(sets, changes) if change["high"] < 0]
    verdict = f"a loss beyond chance on {' and '.join(lost)} texts" if lost else "on none of them a loss beyond chance"
    words.append(
        f"Cut short, {_each((100 * share for share in kept), '.0f')}% of the best drafter's lead over the worst is heard "
        f"while the worst drafts; the learner's MAT moves by {_each((100 * one['mean'] for one in changes), '+.2f')} points, "
        f"{verdict}, since NormalHedge does not mind a lead that is told smaller, only one that changes sides."
    )
    case = result["made_up"]
    words.append(
        "It can be made to: a drafter that is right at every second token and one that is right in rare long runs have "
        f"{_each(case['waited for'], '.2f')} tokens a round from any position, but {_each(case['cut short'], '.2f')} are "
        f"heard cut short while the first drafts. Even there MAT is {_each(case['mat'], '.2f')}, since rounds begin where the "
        f"last one ended and not anywhere, and a learner has {case['learner']['exact']:.2f} that waits and "
        f"{case['learner']['cut short']:.2f} that does not: the loss of the theory, a mean over all positions, is not quite "
        "what MAT counts."
    )
    return " ".join(words)


def _each(values: Iterable[float], digits: str = "+.2f") -> str:
    return " / ".join(format(value, digits) for value in values)


def _difference(of: dict[str, Any]) -> float:
    """Tokens that `product` predicts more than `exact`; 0 where they are the same but for rounding."""
    difference = of["estimates"]["product"]["error"]["mean"] - of["estimates"]["exact"]["error"]["mean"]
    return difference if abs(difference) > 1e-9 else 0.0


def _chance(interval: dict[str, float]) -> str:
    return "no more than chance explains" if interval["low"] <= 0 <= interval["high"] else "more than chance explains"


def draw(result: dict[str, Any]) -> Figure:
    made, (bias, gap, errors, ranks, lead, behind) = figure(3, 2)
    for name, of in result["enumeration"].items():
        bias.hist(of["bias"], bins=np.linspace(-0.25, 0.25, 51).tolist(), histtype="stepfilled", alpha=0.6, label=name)
    bias.set(title="bias, every text enumerated", xlabel="tokens a round", ylabel="pairs of distributions", yscale="log")
    bias.legend()
    sets = result["sets"]
    for number, (name, of) in enumerate(sets.items()):
        color, width = f"C{number}", 0.8 / len(sets)
        place = width * (number - (len(sets) - 1) / 2)
        depth = np.arange(1, len(of["depths"]) + 1)
        for key, style in (("forced", "--"), ("drafted", "-")):
            rows = [row[key] for row in of["depths"]]
            band(gap, depth, rows, linestyle=style, color=color, label=f"{name}, {key}")
        for axes, intervals in (
            (errors, [of["estimates"][one]["error"] for one in ESTIMATES]),
            (lead, list(of["margins"].values())),
            (behind, [of["replayed"][feed]["behind"] for feed in FEEDS]),
        ):
            bars(axes, np.arange(3) + place, intervals, width=width, color=color, label=name)
        marks = np.arange(len(SEEN))
        for estimate, style in (("exact", "-"), ("product", "--"), ("cut short", ":")):
            values = [100 * row["pairs"]["mean"] for row in of["rankings"][estimate]]
            ranks.plot(marks, values, style, color=color, label=f"{name}, {estimate}")
    gap.set(title="acceptance where a draft got there", xlabel="depth", ylabel="acceptance")
    errors.set(title="predicted less realised", ylabel="tokens a round")
    errors.set_xticks(range(len(ESTIMATES)), ESTIMATES)
    ranks.set(title="pairs of drafters ordered right", xlabel="positions seen", ylabel="%")
    ranks.set_xticks(range(len(SEEN)), [str(one or "all") for one in SEEN])
    lead.set(title="lead of the best drafter over the worst, as heard", ylabel="tokens a round")
    lead.set_xticks(range(3), ["waited for", "cut short,\nbest drafts", "cut short,\nworst drafts"])
    behind.set(title="NormalHedge: behind the best drafter", ylabel="tokens a round", xlabel="what it hears")
    behind.set_xticks(range(len(FEEDS)), FEEDS)
    for axes in (gap, errors, ranks, lead, behind):
        axes.legend(fontsize=7)
    return made


EXPERIMENT = Experiment(
    name="estimator",
    title="Which estimate of the accepted length",
    question="The paper multiplies acceptance probabilities along the verified text, which is biased where acceptance is "
    "correlated with later acceptance; we use the emitted tokens' own ratios. How far is each from what drafters really do, "
    "which of them ranks drafters right, and what happens to a learner that does not wait for sums to be complete?",
    measure=measure,
    tell=tell,
    draw=draw,
)
