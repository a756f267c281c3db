"""Which estimate of the accepted length: exact, the paper's product, a control variate, and sums that are cut short.

The paper multiplies acceptance probabilities along the verified text, which is biased where acceptance is correlated with later
acceptance; HedgeSpec uses the emitted tokens' own ratios. How far is each from what drafters really do, which of them orders
drafters correctly, and what happens to a learner that does not wait until sums are complete?
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from table import interval, markdown

from hedgespec.config import DecodeConfig
from hedgespec.experiments.measures import (
    best_of,
    losses,
    mean_interval,
    ratio_interval,
    realised_lengths,
    tokens_behind,
    tokens_per_round,
    tokens_per_round_alone,
    weights_by_position,
)
from hedgespec.experiments.recording import Trace
from hedgespec.experiments.replay import alone, replay
from hedgespec.ops.evaluate import expected_accepted_length
from hedgespec.stats import DecodeStats
from studies import Study
from studies.lab import Lab, signature
from studies.plots import band, bars, figure
from studies.variants import CutShort, cut_short, product

SETS = ("greedy", "coupled", "sampled")
DRAFT_LENGTH = 5
SEEN = (8, 16, 32, 64, None)
"""Positions after which drafters are ordered; None is all."""
PAIRS, BRANCH, DEPTH = 200, 4, 3
FEEDS = ("exact", "product", "cut short")
ESTIMATES = ("exact", "product", "steadied")


def steadied(prob: np.ndarray, ratio: np.ndarray, draft_length: int, usual: np.ndarray) -> np.ndarray:
    """Returns the exact estimate with a control variate, [..., T-K+1].

    From the draft's last token to its first, length_j = prob_j * (1 + rest_j) + ratio_j * (length_{j+1} - rest_j); plus 1.
    rest_j is what a drafter of the usual acceptance would add after j. It is known before the token is, and prob is the mean of
    ratio, so it cancels in the mean whatever it is. The estimate is not bounded by 1 and K + 1.

    Args:
        prob: acceptance_prob, [..., T].
        ratio: acceptance_ratio, [..., T].
        draft_length: K.
        usual: a guess of the acceptance from what precedes each round, [..., T-K+1].
    """
    starts = prob.shape[-1] - draft_length + 1
    length = np.zeros_like(usual)
    for k in reversed(range(draft_length)):
        rest = sum((usual**power for power in range(1, draft_length - k)), np.zeros_like(usual))
        length = prob[..., k : k + starts] * (1 + rest) + ratio[..., k : k + starts] * (length - rest)
    return 1 + length


def predicted(prob: np.ndarray, ratio: np.ndarray, draft_length: int, estimate: str) -> np.ndarray:
    """Returns one of `ESTIMATES` of the tokens of a round from each position, [N, T-K+1]."""
    if estimate == "exact":
        return expected_accepted_length(prob, ratio, draft_length)
    if estimate == "product":
        return expected_accepted_length(prob, prob, draft_length)
    before = np.cumsum(prob, axis=1) - prob
    usual = (0.5 + before) / (1 + np.arange(prob.shape[1]))
    return steadied(prob, ratio, draft_length, usual[:, : prob.shape[1] - draft_length + 1])


def enumerated(pairs: int, branch: int, depth: int, seed: int = 7) -> dict[str, Any]:
    """Returns bias and spread of each estimate over every text of `depth` tokens out of `branch`, for random pairs of target
    and drafter: by estimate {"bias": tokens, by pair; "spread": standard deviation over texts, mean of the pairs}."""
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
            lengths = predicted(prob, ratio, depth, estimate)[..., 0]
        mean = (law * lengths).sum(1)
        spread = np.sqrt((law * (lengths - mean[:, None]) ** 2).sum(1))
        found[estimate] = {"bias": (mean - truth).tolist(), "spread": float(spread.mean())}
    return found


def fed(trace: Trace, config: DecodeConfig, feed: str, seed: int) -> DecodeStats:
    """Replays a text with a learner that gets one of `FEEDS`."""
    if feed == "cut short":
        return replay(trace, config, seed=seed, selector=CutShort(trace, config))
    return replay(product(trace) if feed == "product" else trace, config, seed=seed)


def predictions(traces: Sequence[Trace]) -> dict[str, Any]:
    """Returns predicted less realised tokens of a round, by estimate and drafter, and the spread over a text's positions."""
    realised = [realised_lengths(trace, DRAFT_LENGTH) for trace in traces]
    found = {}
    for estimate in ESTIMATES:
        lengths = [predicted(trace.prob, trace.ratio, DRAFT_LENGTH, estimate) for trace in traces]
        errors = np.array([(one - real).mean(1) for one, real in zip(lengths, realised)])
        found[estimate] = {
            "error": mean_interval(errors.mean(1)),
            "error_by_drafter": {name: mean_interval(errors[:, i]) for i, name in enumerate(traces[0].drafters)},
            "spread": float(np.mean([one.std(1) for one in lengths])),
        }
    return {"estimates": found, "realised": mean_interval([one.mean() for one in realised])}


def depths(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Returns, by depth, over drafts that reached it, the acceptance on verified tokens (forced) and of the draft itself
    (drafted)."""
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
    """Returns the share of the pairs of drafters with different tokens per round that scores order the same way (a tie counts
    half), and whether the highest score is a best drafter's, shared out among ties."""
    above = np.sign(mats[:, None] - mats[None])
    ranked = np.sign(scores[:, None] - scores[None])
    pairs = above > 0
    share = (1 + ranked[pairs]).mean() / 2 if pairs.any() else 1.0
    first = np.flatnonzero(scores >= scores.max() - 1e-12)
    return float(share), float(np.isin(first, best_of(mats)).mean())


def mean_cut_short(trace: Trace, drafter: int, seen: int | None) -> np.ndarray:
    """Returns the mean of the sums cut short over a text's first positions, [N], while one drafter drafts."""
    emitted = alone(trace, drafter, DRAFT_LENGTH)
    ends = np.cumsum(emitted)
    last = ends[-1] if seen is None else max(min(seen, ends[-1]), ends[0])
    rounds = [cut_short(trace.prob[:, end - count : end], trace.ratio[:, end - count : end], DRAFT_LENGTH)
              for count, end in zip(emitted, ends) if end <= last]  # fmt: skip
    return np.concatenate(rounds, axis=1).mean(1)


def rankings(traces: Sequence[Trace], mats: Sequence[np.ndarray]) -> dict[str, list[dict[str, Any]]]:
    """Returns how well each estimate's mean over the first positions, and that of the realised lengths there, orders the
    drafters by tokens per round: a row for each of `SEEN`."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*ESTIMATES, "cut short", "realised")}
    for seen in SEEN:
        values: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
        for trace, fixed in zip(traces, mats):
            count = trace.prob.shape[1] if seen is None else max(min(seen, trace.prob.shape[1]), DRAFT_LENGTH)
            for name in ESTIMATES:
                scores = predicted(trace.prob[:, :count], trace.ratio[:, :count], DRAFT_LENGTH, name).mean(1)
                values[name].append(agreement(scores, fixed))
            each = [agreement(mean_cut_short(trace, one, seen), fixed) for one in range(len(fixed))]
            values["cut short"].append(tuple(np.mean(each, axis=0)))
            values["realised"].append(
                agreement(realised_lengths(trace, DRAFT_LENGTH)[:, : count - DRAFT_LENGTH + 1].mean(1), fixed)
            )
        for name, of in values.items():
            pairs, top = zip(*of)
            found[name].append({"seen": seen, "pairs": mean_interval(pairs), "top": mean_interval(top)})
    return found


def margins(traces: Sequence[Trace], mats: Sequence[np.ndarray]) -> dict[str, Any]:
    """Returns how much longer the best drafter's rounds are estimated than the worst's, in tokens, by feed and by who
    drafts."""
    found: dict[str, list[float]] = {"waited for": [], "cut short, the best drafting": [], "cut short, the worst drafting": []}
    for trace, fixed in zip(traces, mats):
        best, worst = int(fixed.argmax()), int(fixed.argmin())
        whole = predicted(trace.prob, trace.ratio, DRAFT_LENGTH, "exact").mean(1)
        heard = (whole, mean_cut_short(trace, best, None), mean_cut_short(trace, worst, None))
        for name, lengths in zip(found, heard):
            found[name].append(float(lengths[best] - lengths[worst]))
    return {name: mean_interval(values) for name, values in found.items()}


def stops_early(cycles: int) -> Trace:
    """Returns a made-up trace: drafter 0 is right at every second token, drafter 1 at none of 40 and then at ten in a row."""
    positions = np.arange(50 * cycles)
    ratio = np.stack([positions % 2 == 0, positions % 50 >= 40]).astype(float)
    after = np.pad(ratio, ((0, 0), (0, DRAFT_LENGTH)))
    drafted = np.stack([after[:, depth : depth + len(positions)] for depth in range(DRAFT_LENGTH)], -1).cumprod(-1)
    tokens = np.zeros(len(positions) + 2, dtype=np.int64)
    return Trace("made up", 0, "sampled", 0.0, 0, len(positions) + 1, 1, ("every second", "in runs"), (True, True), tokens,
                 np.ones((2, 0)), ratio, ratio, drafted)  # fmt: skip


def made_up(seeds: int) -> dict[str, Any]:
    """Returns, of both drafters of `stops_early`, the mean tokens of a round from any position, those cut short while the first
    drafts, and tokens per round; and NormalHedge's tokens per round by feed."""
    trace = stops_early(8)
    config = DecodeConfig(draft_length=DRAFT_LENGTH, warm_start=0, evaluate_every=1)
    return {
        "drafters": trace.drafters,
        "waited for": predicted(trace.prob, trace.ratio, DRAFT_LENGTH, "exact").mean(1).tolist(),
        "cut short": mean_cut_short(trace, 0, None).tolist(),
        "mat": tokens_per_round_alone(trace, DRAFT_LENGTH).tolist(),
        "learner": {feed: tokens_per_round([fed(trace, config, feed, seed) for seed in range(seeds)])
                    for feed in ("exact", "cut short")},
    }  # fmt: skip


def replayed(traces: Sequence[Trace], mats: Sequence[np.ndarray], seeds: int) -> dict[str, Any]:
    """Returns NormalHedge's tokens per round over the best fixed drafter's and its tokens behind, by feed, without a warm
    start."""
    values: dict[str, dict[str, list[float]]] = {feed: {"of_best": [], "behind": [], "mat": []} for feed in FEEDS}
    for trace, fixed in zip(traces, mats):
        known = losses(trace, DRAFT_LENGTH)[: trace.prob.shape[1] - DRAFT_LENGTH + 1]
        config = DecodeConfig(draft_length=DRAFT_LENGTH, proposal=trace.mode, warm_start=0, evaluate_every=1)
        for feed, into in values.items():
            runs = [fed(trace, config, feed, 1000 * seed + trace.number) for seed in range(seeds)]
            into["mat"].append(tokens_per_round(runs))
            into["of_best"].append(into["mat"][-1] / fixed.max())
            behind = [tokens_behind(weights_by_position(run), known, DRAFT_LENGTH) for run in runs]
            into["behind"].append(float(np.mean(behind)))
    found = {feed: {name: mean_interval(each) for name, each in of.items()} for feed, of in values.items()}
    for feed in FEEDS[1:]:
        for name in ("of_best", "behind"):
            difference = np.subtract(values[feed][name], values["exact"][name])
            found[feed][f"{name}_less_exact"] = mean_interval(difference)
    return found


def measure(lab: Lab) -> dict[str, Any]:
    def of_set(name: str, traces: list[Trace]) -> dict[str, Any]:
        mats = [
            tokens_per_round_alone(trace, DRAFT_LENGTH, lab.seeds) for trace in lab.track(traces, f"{name}: drafters alone")
        ]
        return {
            "texts": len(traces), **predictions(traces), "depths": depths(traces), "rankings": rankings(traces, mats),
            "margins": margins(traces, mats), "replayed": replayed(traces, mats, lab.seeds),
        }  # fmt: skip

    key = f"{PAIRS} pairs, {BRANCH} tokens, depth {DEPTH}"
    result: dict[str, Any] = {"draft_length": DRAFT_LENGTH, "enumeration": lab.once(
        f"enumeration: {key}", lambda: enumerated(PAIRS, BRANCH, DEPTH)), "enumerated": key, "sets": {}}  # fmt: skip
    result["made_up"] = lab.once(f"made up: K {DRAFT_LENGTH}, {lab.seeds} seeds", lambda: made_up(lab.seeds))
    for name in SETS:
        traces = lab.traces(name, full_drafts=DRAFT_LENGTH)
        key = f"set {name}: {signature(traces)}, K {DRAFT_LENGTH}, seen {SEEN}, {lab.seeds} seeds"
        result["sets"][name] = lab.once(key, lambda name=name, traces=traces: of_set(name, traces))
    return result


def tables(result: dict[str, Any]) -> dict[str, str]:
    sets, seen = result["sets"], [one or "all" for one in SEEN]
    deepest = max(len(found["depths"]) for found in sets.values())
    biases = {name: np.array(found["bias"]) for name, found in result["enumeration"].items()}
    case = result["made_up"]

    def feeds(name: str, found: dict[str, Any]) -> list[list[str]]:
        rows = []
        for feed, row in found["replayed"].items():
            less = [interval(row[key], 3) if (key := f"{one}_less_exact") in row else "" for one in ("of_best", "behind")]
            behind = interval(row["behind"], 3)
            rows.append([f"{name}, {feed}", interval(row["mat"]), interval(row["of_best"], 3), less[0], behind, less[1]])
        return rows

    return {
        "enumeration": markdown(["estimate", "largest bias, tokens", "mean bias", "spread over texts"], [
            [name, _small(np.abs(bias).max()), _small(bias.mean()), f"{result['enumeration'][name]['spread']:.3f}"]
            for name, bias in biases.items()
        ]),
        "predictions": markdown(["texts", "realised", *ESTIMATES, *(f"spread, {one}" for one in ESTIMATES)], [
            [f"{found['texts']} {name}", interval(found["realised"]),
             *(interval(found["estimates"][one]["error"], 3) for one in ESTIMATES),
             *(f"{found['estimates'][one]['spread']:.2f}" for one in ESTIMATES)] for name, found in sets.items()
        ]),
        "depths": markdown(["texts", *(f"depth {depth + 1}" for depth in range(deepest))], [
            [name, *(f"{row['forced']['mean']:.2f} / {row['drafted']['mean']:.2f}" for row in found["depths"]),
             *[""] * (deepest - len(found["depths"]))] for name, found in sets.items()
        ]),
        "rankings": markdown(["texts, estimate", *seen], [
            [f"{name}, {estimate}", *(f"{100 * row['pairs']['mean']:.0f} ({100 * row['top']['mean']:.0f})" for row in rows)]
            for name, found in sets.items() for estimate, rows in found["rankings"].items()
        ]),
        "margins": markdown(["texts", *next(iter(sets.values()))["margins"]], [
            [name, *map(interval, found["margins"].values())] for name, found in sets.items()
        ]),
        "replayed": markdown(
            ["texts, feed", "tokens per round", "over the best fixed", "less exact's", "tokens behind", "less exact's"],
            itertools.chain.from_iterable(feeds(name, found) for name, found in sets.items()),
        ),
        "made-up": markdown(["made-up text", *case["drafters"], "NormalHedge"], [
            ["tokens of a round from any position", *(f"{one:.2f}" for one in case["waited for"]), ""],
            ["the same cut short, the first drafting", *(f"{one:.2f}" for one in case["cut short"]), ""],
            ["tokens per round, exact", *(f"{one:.2f}" for one in case["mat"]), f"{case['learner']['exact']:.2f}"],
            ["tokens per round, cut short", "", "", f"{case['learner']['cut short']:.2f}"],
        ]),
    }  # fmt: skip


def _small(value: float) -> str:
    return f"{value:.3f}" if abs(value) > 1e-4 else f"{value:.0e}"


def draw(result: dict[str, Any]):
    made, (bias, gap, errors, ranks, lead, behind) = figure(3, 2)
    for name, found in result["enumeration"].items():
        bias.hist(found["bias"], bins=np.linspace(-0.25, 0.25, 51), histtype="stepfilled", alpha=0.6, label=name)
    bias.set(title="bias, every text enumerated", xlabel="tokens per round", ylabel="pairs of distributions", yscale="log")
    bias.legend()
    sets = result["sets"]
    for number, (name, found) in enumerate(sets.items()):
        color, width = f"C{number}", 0.8 / len(sets)
        place = width * (number - (len(sets) - 1) / 2)
        depth = np.arange(1, len(found["depths"]) + 1)
        for key, style in (("forced", "--"), ("drafted", "-")):
            rows = [row[key] for row in found["depths"]]
            band(gap, depth, rows, linestyle=style, color=color, label=f"{name}, {key}")
        for axes, intervals in (
            (errors, [found["estimates"][one]["error"] for one in ESTIMATES]),
            (lead, list(found["margins"].values())),
            (behind, [found["replayed"][feed]["behind"] for feed in FEEDS]),
        ):
            bars(axes, np.arange(3) + place, intervals, width=width, color=color, label=name)
        marks = np.arange(len(SEEN))
        for estimate, style in (("exact", "-"), ("product", "--"), ("cut short", ":")):
            values = [100 * row["pairs"]["mean"] for row in found["rankings"][estimate]]
            ranks.plot(marks, values, style, color=color, label=f"{name}, {estimate}")
    gap.set(title="acceptance where a draft got there", xlabel="depth", ylabel="acceptance")
    errors.set(title="predicted less realised", ylabel="tokens per round")
    errors.set_xticks(range(len(ESTIMATES)), ESTIMATES)
    ranks.set(title="pairs of drafters ordered right", xlabel="positions seen", ylabel="%")
    ranks.set_xticks(range(len(SEEN)), [str(one or "all") for one in SEEN])
    lead.set(title="lead of the best drafter over the worst, as estimated", ylabel="tokens per round")
    lead.set_xticks(range(3), ["waited for", "cut short,\nbest drafts", "cut short,\nworst drafts"])
    behind.set(title="NormalHedge: behind the best drafter", ylabel="tokens per round", xlabel="feed")
    behind.set_xticks(range(len(FEEDS)), FEEDS)
    for axes in (gap, errors, ranks, lead, behind):
        axes.legend(fontsize=7)
    return made


STUDY = Study("estimator", "Which estimate of the accepted length", measure, tables, draw)
