"""The domain changes: inside a request, from request to request, and in the words around a prompt, which misleads a router."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hedgespec.config import DecodeConfig
from hedgespec.experiments import Experiment
from hedgespec.experiments.hindsight import best_of, fixed_mats, long_enough, weights_by_position
from hedgespec.experiments.laboratory import Laboratory
from hedgespec.experiments.measures import signature
from hedgespec.experiments.recordings import FRAMES, RECORDINGS, prompts_of
from hedgespec.experiments.statistics import mat, mean_interval, ratio_interval, told
from hedgespec.experiments.telling import bars, figure, titled
from hedgespec.experiments.traces import Trace, replay
from hedgespec.learners import NormalHedge
from hedgespec.metrics import DecodeStats
from hedgespec.zoo import EXPERTS, NAMES, Prompt, load_prompts

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from sklearn.pipeline import Pipeline

DRAFT_LENGTH = 5
SEGMENTS = 3
"""Texts that are joined into one request."""
LEARNERS = ("normal_hedge", "hedge", "ada_normal_hedge", "exp3", "uniform")
KEEP = 0.9
"""What a forgetful learner keeps of its regrets at each position, so that it looks back over some 1 / (1 - KEEP) of them."""
FORGETFUL = "forgetful"
CARRIED = 0.1
"""Share of a carried state's regrets that the last policy keeps."""
BEGINNING = 32
"""Tokens over which a request's or a segment's beginning is told."""
HELD_OUT = 48
"""Prompts of the mixed stream that a router is not trained on: the first, of which texts are recorded."""
DECOYS = {
    "python": "def answer(self, value):\n    import math, sys\n    return self.table[value]",
    "sql": "SELECT id, name FROM users WHERE total > 10 ORDER BY name;",
    "math": "Let n be a natural number. We compute the sum and divide both sides by 2.",
    "scripture": "And it came to pass in those days, that the LORD spake unto the people, saying,",
    "legal": "The parties hereby agree that this Agreement shall be governed by the laws of the State.",
    "french": "Il était une fois, dans un pays lointain, un homme qui ne savait pas lire.",
}
"""A line of each domain, to stand before a prompt of another one."""


class ForgetfulNormalHedge(NormalHedge):
    """NormalHedge on discounted regrets: what it heard long ago counts less. No part of the library; a bound is not claimed."""

    def _learn(self, losses: NDArray[np.float64], chosen: int | None, chosen_weight: float | None) -> None:
        self.regrets *= KEEP
        super()._learn(losses, chosen, chosen_weight)


def joined(traces: Sequence[Trace]) -> Trace:
    """Several texts as one request, each a segment of it: drafts end where a text does, and so does what is known of them.

    The words at a seam are those of the recordings: what follows was written after its own prompt, not after what now precedes.
    """
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(one, name) for one in traces], axis=1) for name in ("prob", "ratio", "drafted")
    }
    texts = [one.tokens[one.prompt_length + 1 :] for one in traces[1:]]
    length = arrays["prob"].shape[1] + 1
    return replace(traces[0], **arrays, tokens=np.concatenate([traces[0].tokens, *texts]), max_new_tokens=length,
                   domain=" + ".join(one.domain for one in traces))  # fmt: skip


def within(stats: DecodeStats, positions: slice) -> tuple[int, int]:
    """Tokens and number of the rounds that begin at some positions of a text."""
    began = np.cumsum([0, *stats.emitted_by_round[:-1]])
    inside = (began >= positions.start) & (began < positions.stop)
    return int(np.asarray(stats.emitted_by_round)[inside].sum()), int(inside.sum())


def tokens_until(stats: DecodeStats, drafters: np.ndarray, positions: slice) -> int:
    """Positions of a segment until one of some drafters is picked; the segment's length if none is."""
    began = np.cumsum([0, *stats.emitted_by_round[:-1]])
    found = [at for at, choice in zip(began, stats.choices) if positions.start <= at < positions.stop and choice in drafters]
    return int(found[0] if found else positions.stop) - positions.start


def chains(traces: Sequence[Trace]) -> list[list[Trace]]:
    """Runs of `SEGMENTS` texts of different domains in the order of the set, one beginning at every second text."""
    runs = [list(traces[first : first + SEGMENTS]) for first in range(0, len(traces) - SEGMENTS + 1, 2)]
    return [run for run in runs if len({one.domain for one in run}) == SEGMENTS]


def inside_a_request(traces: Sequence[Trace], mats: Mapping[int, np.ndarray], seeds: int,
                     track: Callable[..., Any]) -> dict[str, Any]:  # fmt: skip
    """By learner and segment: MAT over the segment's best fixed drafter, tokens until that one is picked, and its weight along
    the segment, at most `BEGINNING` * 2 tokens of it."""
    runs = chains(traces)
    shown = min(2 * BEGINNING, *(one.prob.shape[1] for run in runs for one in run))
    found = {}
    for learner in (*LEARNERS, FORGETFUL):
        config = DecodeConfig(draft_length=DRAFT_LENGTH, learner="normal_hedge" if learner == FORGETFUL else learner)
        tables: list[list[list[float]]] = [[[] for _ in range(SEGMENTS)] for _ in range(3)]
        of_best, until, weight = tables
        for run in track(runs, f"{learner}, texts joined"):
            trace = joined(run)
            ends = np.cumsum([0, *(one.prob.shape[1] for one in run)])
            every = [replay(trace, config, seed=1000 * seed + trace.number,
                            learner=ForgetfulNormalHedge(len(trace.drafters)) if learner == FORGETFUL else None)
                     for seed in range(seeds)]  # fmt: skip
            for number, one in enumerate(run):
                positions, fixed = slice(int(ends[number]), int(ends[number + 1])), mats[one.number]
                best = best_of(fixed)
                tokens, rounds = np.sum([within(stats, positions) for stats in every], axis=0)
                of_best[number].append(tokens / rounds / fixed.max())
                until[number].append(float(np.mean([tokens_until(stats, best, positions) for stats in every])))
                held = np.mean([weights_by_position(stats)[positions][:, best].sum(1) for stats in every], axis=0)
                weight[number].append(held[:shown])
        found[learner] = [
            {"of_best": mean_interval(of_best[number]), "until": ratio_interval(until[number], np.ones(len(runs))),
             "weight": np.mean(weight[number], axis=0).tolist()}
            for number in range(SEGMENTS)
        ]  # fmt: skip
    return {"requests": len(runs), "learners": found}


POLICIES = ("fresh, no warm start", "fresh, warm start", "state of the last request", "a tenth of it",
            "state of the last of its domain")  # fmt: skip


def between_requests(traces: Sequence[Trace], mats: Mapping[int, np.ndarray], seeds: int,
                     track: Callable[..., Any]) -> dict[str, Any]:  # fmt: skip
    """NormalHedge over the set as a stream of requests, by what each starts from; the first of each domain is left out."""
    found: dict[str, dict[str, list[float]]] = {policy: {"of_best": [], "beginning": [], "until": []} for policy in POLICIES}
    for policy, values in found.items():
        config = DecodeConfig(draft_length=DRAFT_LENGTH, warm_start=0 if policy == POLICIES[0] else DecodeConfig.warm_start)
        streams: list[list[DecodeStats]] = []
        for seed in track(range(seeds), policy):
            states: dict[str, Any] = {}
            streams.append([])
            for trace in traces:
                of = trace.domain if policy == POLICIES[4] else ""
                state = states.get(of) if policy in POLICIES[2:] else None
                if state and policy == POLICIES[3]:
                    state = {**state, "regrets": [CARRIED * regret for regret in state["regrets"]]}
                stats = replay(trace, config, seed=1000 * seed + trace.number, state=state)
                states[of] = stats.learner_state
                streams[-1].append(stats)
        known: set[str] = set()
        for trace, every in zip(traces, zip(*streams)):
            if trace.domain in known:
                fixed = mats[trace.number]
                start = slice(0, BEGINNING)
                tokens, rounds = np.sum([within(stats, start) for stats in every], axis=0)
                values["of_best"].append(mat(every) / fixed.max())
                values["beginning"].append(tokens / rounds / fixed.max())
                whole = slice(0, trace.prob.shape[1])
                values["until"].append(float(np.mean([tokens_until(stats, best_of(fixed), whole) for stats in every])))
            known.add(trace.domain)
    return {
        policy: {name: ratio_interval(each, np.ones(len(each))) for name, each in of.items()} for policy, of in found.items()
    }


def train_router(prompts: Sequence[Prompt]) -> Pipeline:
    """TF-IDF of words and pairs of them under logistic regression, from a prompt's text to its domain."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    router = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=30, max_iter=1000))
    return router.fit([prompt.text for prompt in prompts], [prompt.domain for prompt in prompts])


def rewordings(prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    """The prompts' texts as they are and in other words, the mildest first."""
    other = [EXPERTS[(EXPERTS.index(prompt.domain) + 1 + number % (len(EXPERTS) - 1)) % len(EXPERTS)]
             for number, prompt in enumerate(prompts)]  # fmt: skip
    texts = [prompt.text for prompt in prompts]
    return {
        "as it is": texts,
        "framed": [FRAMES[number // len(NAMES) % len(FRAMES)].format(text) for number, text in enumerate(texts)],
        "last 60 characters": [text[-60:] for text in texts],
        "framed, last 60 characters": [FRAMES[number % len(FRAMES)].format(text[-60:]) for number, text in enumerate(texts)],
        "after a line of another domain": [f"{DECOYS[domain]}\n\n{text}" for domain, text in zip(other, texts)],
        "that, last 60 characters": [f"{DECOYS[domain]}\n\n{text[-60:]}" for domain, text in zip(other, texts)],
    }


def routed(name: str, traces: Sequence[Trace], mats: Mapping[int, np.ndarray], router: Pipeline, seeds: int) -> dict[str, Any]:
    """Of a recorded set: how often the router errs, and the MAT of its drafter, of the domain's expert, and of HedgeSpec, over
    the best fixed drafter's of each text; HedgeSpec's over the router's, that where the router erred, and over the experts of
    other domains, as if it erred everywhere."""
    prompts = prompts_of(RECORDINGS[name])
    config = DecodeConfig(draft_length=DRAFT_LENGTH)
    shares: dict[str, list[float]] = {key: [] for key in ("router", "domain's expert", "hedgespec")}
    ratios, erred, over_wrong = [], [], []
    for trace in traces:
        fixed = dict(zip(trace.drafters, mats[trace.number]))
        found = str(router.predict([prompts[trace.number].text])[0])
        ours = mat([replay(trace, config, seed=1000 * seed + trace.number) for seed in range(seeds)])
        best = max(fixed.values())
        for key, value in zip(shares, (fixed[found], fixed[trace.domain], ours)):
            shares[key].append(value / best)
        ratios.append(ours / fixed[found])
        erred.append(found != trace.domain)
        over_wrong.append([ours / fixed[one] for one in EXPERTS if one != trace.domain])
    lost = [ratio for ratio, wrong in zip(ratios, erred) if wrong]
    return {
        "texts": len(traces), "misrouted": float(np.mean(erred)),
        "of_best": {key: mean_interval(each) for key, each in shares.items()},
        "over_router": mean_interval(ratios), "over_router_most": max(ratios),
        "over_router_misrouted": float(np.mean(lost)) if lost else None,
        "over_wrong": mean_interval(np.mean(over_wrong, axis=1)), "over_wrong_most": float(np.max(over_wrong)),
        "worst_of_best": {key: min(each) for key, each in shares.items()},
    }  # fmt: skip


def measure(lab: Laboratory) -> dict[str, Any]:
    sets = {name: long_enough(lab.traces(name), DRAFT_LENGTH) for name in ("greedy", "reworded")}
    mats = {name: {one.number: fixed_mats(one, DRAFT_LENGTH, 1) for one in lab.track(traces, f"{name}: each drafter alone")}
            for name, traces in sets.items()}  # fmt: skip
    prompts = load_prompts()
    router = train_router(prompts[HELD_OUT:])
    test = prompts[:HELD_OUT]
    domains = [prompt.domain for prompt in test]
    greedy = sets["greedy"]
    key = f"{signature(greedy)}, K {DRAFT_LENGTH}, {lab.seeds} seeds"
    return {
        "inside": lab.once(f"inside: {key}, {SEGMENTS} segments, {LEARNERS}, {KEEP}, {BEGINNING}",
                           lambda: inside_a_request(greedy, mats["greedy"], lab.seeds, lab.track)),
        "between": lab.once(f"between: {key}, {CARRIED}, {BEGINNING}",
                            lambda: between_requests(greedy, mats["greedy"], lab.seeds, lab.track)),
        "router": {
            "trained_on": len(prompts) - HELD_OUT, "tested_on": HELD_OUT,
            "misrouted": {words: float(np.mean(router.predict(texts) != domains)) for words, texts in rewordings(test).items()},
            "sets": {name: lab.once(f"routed {name}: {signature(traces)}, K {DRAFT_LENGTH}, {lab.seeds} seeds, {HELD_OUT}",
                                    lambda name=name, traces=traces: routed(name, traces, mats[name], router, lab.seeds))
                     for name, traces in sets.items()},
        },
    }  # fmt: skip


def tell(result: dict[str, Any]) -> str:
    inside, between, router = result["inside"], result["between"], result["router"]
    ordinals = [f"segment {number + 1}" for number in range(SEGMENTS)]
    return "\n".join([
        titled(
            f"{inside['requests']} requests of {SEGMENTS} recorded texts, each of another domain: MAT over that of the "
            "segment's best fixed drafter, and tokens until that one is picked:",
            ["learner", *(f"{one}: MAT of best" for one in ordinals), *(f"{one}: tokens until picked" for one in ordinals)],
            ([learner, *(told(row["of_best"], 3) for row in rows), *(told(row["until"], 1) for row in rows)]
             for learner, rows in inside["learners"].items()),
        ),
        titled(
            "The stream of requests, whose domain changes every time, NormalHedge:",
            ["a request starts", "MAT of the best fixed", f"in the first {BEGINNING} tokens", "tokens until it is picked"],
            ([name, told(of["of_best"], 3), told(of["beginning"], 3), told(of["until"], 1)] for name, of in between.items()),
        ),
        titled(
            f"A router trained on {router['trained_on']} prompts, tested on {router['tested_on']} others:",
            ["prompt", "misrouted, %"],
            [*([words, f"{100 * share:.0f}"] for words, share in router["misrouted"].items()),
             ["paper, BERT, lightly reworded", "90 to 98"]],
        ),
        titled(
            "MAT over the best fixed drafter's of each text; HedgeSpec's over the router's:",
            ["texts", "misrouted, %", "router's drafter", "domain's expert", "HedgeSpec", "HedgeSpec over router", "most",
             "where misrouted", "over another domain's expert", "most"],
            [*([f"{of['texts']} {name}", f"{100 * of['misrouted']:.0f}", *(told(one, 3) for one in of["of_best"].values()),
                told(of["over_router"], 3), f"{of['over_router_most']:.2f}", _or_none(of["over_router_misrouted"]),
                told(of["over_wrong"]), f"{of['over_wrong_most']:.2f}"]
               for name, of in router["sets"].items()),
             ["paper, reworded", "90 to 98", "", "", "", "", "2.34 (speed)", "", "", ""]],
        ),
        _sense(result),
        "",
    ])  # fmt: skip


def _or_none(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _sense(result: dict[str, Any]) -> str:
    inside, between, router = result["inside"]["learners"], result["between"], result["router"]
    first, *later = inside["normal_hedge"]
    forgets = inside[FORGETFUL]
    last = max(later, key=lambda row: row["until"]["mean"])
    quickest = min(LEARNERS[:3], key=lambda learner: inside[learner][-1]["until"]["mean"])
    words = [
        f"NormalHedge reaches {100 * first['of_best']['mean']:.1f}% of the best fixed drafter in a request's first segment "
        f"and {100 * later[-1]['of_best']['mean']:.1f}% in the last, since regret of the segments before has to be paid back: "
        f"the best is picked after {first['until']['mean']:.0f} tokens at first and after up to {last['until']['mean']:.0f} "
        f"later; in the last segment {quickest} is the quickest of those that hear all drafters. One that forgets (regrets "
        f"times {KEEP} at each position; ours, not in the library) has {100 * forgets[0]['of_best']['mean']:.1f}% and "
        f"{100 * forgets[-1]['of_best']['mean']:.1f}%, and picks the last segment's best after "
        f"{forgets[-1]['until']['mean']:.0f} tokens."
    ]
    fresh, warm, stream, tenth, domain = (between[policy] for policy in POLICIES)
    carried = stream["of_best"]["mean"] - warm["of_best"]["mean"]
    words.append(
        f"A state carried from request to request of other domains moves MAT by {100 * carried:+.1f} points against a fresh, "
        f"warm start, a tenth of it by {100 * (tenth['of_best']['mean'] - warm['of_best']['mean']):+.1f}, one carried within "
        f"a domain by {100 * (domain['of_best']['mean'] - warm['of_best']['mean']):+.1f}, and without the warm start a fresh "
        f"request has {100 * (fresh['of_best']['mean'] - warm['of_best']['mean']):+.1f}."
    )
    plain, framed = (router["misrouted"][words] for words in ("as it is", "framed"))
    worst = max(router["misrouted"], key=router["misrouted"].__getitem__)
    verdict = "as badly as the paper's does" if framed >= 0.9 else "where the paper's errs on 90 to 98"
    words.append(
        f"The router errs on {100 * plain:.0f}% of plain prompts and on {100 * framed:.0f}% of framed ones, {verdict}: these "
        f"prompts begin texts, so that their own words tell the domain. Of the rewordings `{worst}` is the hardest "
        f"({100 * router['misrouted'][worst]:.0f}%)."
    )
    for name, of in router["sets"].items():
        ratio = of["over_router"]
        verdict = "ahead" if ratio["low"] > 1 else "behind" if ratio["high"] < 1 else "level within the interval"
        lost = of["over_router_misrouted"]
        there = "none was misrouted" if lost is None else f"{lost:.2f} where it erred"
        words.append(
            f"On {name} texts HedgeSpec has {told(ratio, 3)} times the MAT of the router's drafter, {verdict}; {there}. "
            f"Were it to err everywhere, that would be {told(of['over_wrong'])} times, up to {of['over_wrong_most']:.2f}."
        )
    return " ".join(words)


def draw(result: dict[str, Any]) -> Figure:
    made, panels = figure(3, 2)
    for number, axes in enumerate(panels[:SEGMENTS]):
        for learner, rows in result["inside"]["learners"].items():
            axes.plot(rows[number]["weight"], label=learner)
        axes.set(title=f"segment {number + 1}: weight on its best drafter", xlabel="tokens since it began", ylim=(0, 1))
        axes.legend(fontsize=7)
    until, policies, routing = panels[SEGMENTS:]
    width = 0.8 / (len(LEARNERS) + 1)
    for number, (learner, rows) in enumerate(result["inside"]["learners"].items()):
        bars(until, np.arange(SEGMENTS) + width * number, [row["until"] for row in rows], width=width, label=learner)
    until.set(title="tokens until a segment's best drafter is picked", ylabel="tokens", xlabel="segment")
    until.set_xticks(np.arange(SEGMENTS) + 0.4, [str(segment) for segment in range(1, SEGMENTS + 1)])
    for number, key in enumerate(("beginning", "of_best")):
        words = f"first {BEGINNING} tokens" if key == "beginning" else "whole text"
        places = np.arange(len(POLICIES)) + 0.4 * number
        bars(policies, places, [of[key] for of in result["between"].values()], width=0.4, label=words)
    policies.set(title="a stream of requests: MAT over the best fixed", ylim=(0.7, 1.05))
    names = [policy.replace(", ", ",\n").replace(" of ", "\nof ") for policy in POLICIES]
    policies.set_xticks(np.arange(len(POLICIES)) + 0.2, names, fontsize=7)
    for number, (name, of) in enumerate(result["router"]["sets"].items()):
        label = f"{name} ({100 * of['misrouted']:.0f}% misrouted)"
        bars(routing, np.arange(3) + 0.4 * number, list(of["of_best"].values()), width=0.4, label=label)
    routing.set(title="MAT over the best fixed drafter of each text", ylim=(0.7, 1.05))
    routing.set_xticks(np.arange(3) + 0.2, ["router", "domain's expert", "HedgeSpec"])
    for axes in (until, policies, routing):
        axes.legend(fontsize=7)
    return made


EXPERIMENT = Experiment(
    name="shift",
    title="When the domain changes",
    question="The paper's learner starts afresh with every request, and an offline router is what it replaces. How fast is a "
    "new domain's expert found in the middle of a request and from one request to the next, with and without what was learned "
    "before; and how does a router fare when a prompt is put in other words?",
    measure=measure,
    tell=tell,
    draw=draw,
)
