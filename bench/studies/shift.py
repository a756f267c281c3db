"""Changes of the domain: inside a request, from request to request, and in the words around a prompt, which mislead a router.

The paper's learner starts from nothing in every request, and an offline router is what it replaces. How fast is a new domain's
expert found in the middle of a request and from one request to the next, with and without what was learned before? And how does
a router fare when a prompt is put in other words?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from table import interval, markdown

from hedgespec.config import DecodeConfig
from hedgespec.experiments.measures import (
    best_of,
    mean_interval,
    ratio_interval,
    tokens_per_round,
    tokens_per_round_alone,
    tokens_within,
    weights_by_position,
)
from hedgespec.experiments.recording import Trace
from hedgespec.experiments.replay import replay
from hedgespec.stats import DecodeStats
from hedgespec.zoo import EXPERTS, Prompt, load_prompts
from studies import Study
from studies.lab import Lab, signature
from studies.plots import bars, figure
from studies.sets import FRAMES, SETS, frame_of, prompts_of
from studies.variants import ForgetfulNormalHedge

DRAFT_LENGTH = 5
SEGMENTS = 3
"""Texts that are joined into one request."""
LEARNERS = ("normal_hedge", "hedge", "ada_normal_hedge", "exp3", "uniform")
KEEP = 0.9
"""Factor of a forgetful learner's regrets at each position."""
FORGETFUL = "forgetful"
CARRIED = 0.1
"""Factor of a carried state's regrets in the policy that keeps a tenth."""
BEGINNING = 32
"""Tokens that count as the beginning of a request or a segment."""
HELD_OUT = 48
"""Prompts of the mixed stream that the router is not trained on: the first ones, of which texts are recorded."""
DECOYS = {
    "python": "def answer(self, value):\n    import math, sys\n    return self.table[value]",
    "sql": "SELECT id, name FROM users WHERE total > 10 ORDER BY name;",
    "math": "Let n be a natural number. We compute the sum and divide both sides by 2.",
    "scripture": "And it came to pass in those days, that the LORD spake unto the people, saying,",
    "legal": "The parties hereby agree that this Agreement shall be governed by the laws of the State.",
    "french": "Il était une fois, dans un pays lointain, un homme qui ne savait pas lire.",
}
"""A line of each domain, put before a prompt of another one."""


def joined(traces: Sequence[Trace]) -> Trace:
    """Returns several texts as one request, each text a segment. Drafts end where a text does.

    The tokens are those of the recordings: a segment was written after its own prompt, not after the segment that precedes it.
    """
    arrays = {name: np.concatenate([getattr(one, name) for one in traces], axis=1) for name in ("prob", "ratio", "drafted")}
    texts = [one.tokens[one.prompt_length + 1 :] for one in traces[1:]]
    length = arrays["prob"].shape[1] + 1
    return replace(traces[0], **arrays, tokens=np.concatenate([traces[0].tokens, *texts]), max_new_tokens=length,
                   domain=" + ".join(one.domain for one in traces))  # fmt: skip


def tokens_until(stats: DecodeStats, drafters: np.ndarray, positions: slice) -> int:
    """Returns the positions of a segment until one of some drafters is selected; the segment's length if none is."""
    began = np.cumsum([0, *stats.emitted_by_round[:-1]])
    found = [at for at, choice in zip(began, stats.choices) if positions.start <= at < positions.stop and choice in drafters]
    return int(found[0] if found else positions.stop) - positions.start


def chains(traces: Sequence[Trace]) -> list[list[Trace]]:
    """Returns runs of `SEGMENTS` texts of different domains in the order of the set. A run starts at every second text."""
    runs = [list(traces[first : first + SEGMENTS]) for first in range(0, len(traces) - SEGMENTS + 1, 2)]
    return [run for run in runs if len({one.domain for one in run}) == SEGMENTS]


def inside_a_request(traces: Sequence[Trace], mats: Mapping[int, np.ndarray], seeds: int,
                     track: Callable[..., Any]) -> dict[str, Any]:  # fmt: skip
    """Returns, by learner and segment, tokens per round over the segment's best fixed drafter's, tokens until that one is
    selected, and its weight along the segment's first tokens, at most `BEGINNING` * 2."""
    runs = chains(traces)
    shown = min(2 * BEGINNING, *(one.prob.shape[1] for run in runs for one in run))
    found = {}
    for learner in (*LEARNERS, FORGETFUL):
        config = DecodeConfig(draft_length=DRAFT_LENGTH, learner="normal_hedge" if learner == FORGETFUL else learner)
        of_best, until, weight = ([[] for _ in range(SEGMENTS)] for _ in range(3))
        for run in track(runs, f"{learner}, texts joined"):
            trace = joined(run)
            ends = np.cumsum([0, *(one.prob.shape[1] for one in run)])
            every = [replay(trace, config, seed=1000 * seed + trace.number,
                            learner=ForgetfulNormalHedge(len(trace.drafters), KEEP) if learner == FORGETFUL else None)
                     for seed in range(seeds)]  # fmt: skip
            for number, one in enumerate(run):
                positions, fixed = slice(int(ends[number]), int(ends[number + 1])), mats[one.number]
                best = best_of(fixed)
                tokens, rounds = np.sum([tokens_within(stats, positions) for stats in every], axis=0)
                of_best[number].append(tokens / rounds / fixed.max())
                until[number].append(np.mean([tokens_until(stats, best, positions) for stats in every]))
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
    """Returns NormalHedge's tokens per round over the set as a stream of requests, by what each request starts from. The first
    request of each domain is left out."""
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
                tokens, rounds = np.sum([tokens_within(stats, start) for stats in every], axis=0)
                values["of_best"].append(tokens_per_round(every) / fixed.max())
                values["beginning"].append(tokens / rounds / fixed.max())
                whole = slice(0, trace.prob.shape[1])
                values["until"].append(np.mean([tokens_until(stats, best_of(fixed), whole) for stats in every]))
            known.add(trace.domain)
    return {
        policy: {name: ratio_interval(each, np.ones(len(each))) for name, each in of.items()} for policy, of in found.items()
    }


def train_router(prompts: Sequence[Prompt]):
    """Returns a classifier from a prompt's text to its domain: logistic regression on TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    router = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=30, max_iter=1000))
    return router.fit([prompt.text for prompt in prompts], [prompt.domain for prompt in prompts])


def rewordings(prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    """Returns the prompts' texts as they are and reworded in five ways."""
    other = [EXPERTS[(EXPERTS.index(prompt.domain) + 1 + number % (len(EXPERTS) - 1)) % len(EXPERTS)]
             for number, prompt in enumerate(prompts)]  # fmt: skip
    texts = [prompt.text for prompt in prompts]
    return {
        "as it is": texts,
        "framed": [frame_of(number).format(text) for number, text in enumerate(texts)],
        "last 60 characters": [text[-60:] for text in texts],
        "framed, last 60 characters": [FRAMES[number % len(FRAMES)].format(text[-60:]) for number, text in enumerate(texts)],
        "after a line of another domain": [f"{DECOYS[domain]}\n\n{text}" for domain, text in zip(other, texts)],
        "that, last 60 characters": [f"{DECOYS[domain]}\n\n{text[-60:]}" for domain, text in zip(other, texts)],
    }


def routed(name: str, traces: Sequence[Trace], mats: Mapping[int, np.ndarray], router, seeds: int) -> dict[str, Any]:
    """Returns, of a recorded set, how often the router errs; the tokens per round of its drafter, of the domain's expert and of
    HedgeSpec over the best fixed drafter's of each text; and HedgeSpec's over the router's, over the router's where it errs,
    and over those of the experts of other domains, which is what a router that always errs would select."""
    prompts = prompts_of(SETS[name])
    config = DecodeConfig(draft_length=DRAFT_LENGTH)
    shares: dict[str, list[float]] = {key: [] for key in ("router", "domain's expert", "hedgespec")}
    ratios, erred, over_wrong = [], [], []
    for trace in traces:
        fixed = dict(zip(trace.drafters, mats[trace.number]))
        found = str(router.predict([prompts[trace.number].text])[0])
        ours = tokens_per_round([replay(trace, config, seed=1000 * seed + trace.number) for seed in range(seeds)])
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


def measure(lab: Lab) -> dict[str, Any]:
    sets = {name: lab.traces(name, full_drafts=DRAFT_LENGTH) for name in ("greedy", "reworded")}
    mats = {
        name: {one.number: tokens_per_round_alone(one, DRAFT_LENGTH) for one in lab.track(traces, f"{name}, drafters alone")}
        for name, traces in sets.items()
    }
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


def tables(result: dict[str, Any]) -> dict[str, str]:
    inside, between, router = result["inside"], result["between"], result["router"]
    segments = [f"segment {number + 1}" for number in range(SEGMENTS)]
    return {
        "inside": markdown(
            ["learner", *(f"{one}, of best" for one in segments), *(f"{one}, found after" for one in segments)],
            [[learner, *(interval(row["of_best"], 3) for row in rows), *(interval(row["until"], 1) for row in rows)]
             for learner, rows in inside["learners"].items()],
        ),
        "between": markdown(
            ["a request starts from", "tokens per round, of best", f"in the first {BEGINNING} tokens", "found after, tokens"],
            [[name, interval(of["of_best"], 3), interval(of["beginning"], 3), interval(of["until"], 1)]
             for name, of in between.items()],
        ),
        "router": markdown(["prompt", "misrouted, %"], [
            *([words, f"{100 * share:.0f}"] for words, share in router["misrouted"].items()),
            ["paper, BERT, lightly reworded", "90 to 98"],
        ]),
        "routed": markdown(
            ["texts", "misrouted, %", "router's drafter", "domain's expert", "HedgeSpec", "HedgeSpec over router", "most",
             "where misrouted", "over other domains' experts", "most"],
            [*([f"{of['texts']} {name}", f"{100 * of['misrouted']:.0f}", *(interval(one, 3) for one in of["of_best"].values()),
                interval(of["over_router"], 3), f"{of['over_router_most']:.2f}",
                "none" if of["over_router_misrouted"] is None else f"{of['over_router_misrouted']:.2f}",
                interval(of["over_wrong"]), f"{of['over_wrong_most']:.2f}"] for name, of in router["sets"].items()),
             ["paper, reworded", "90 to 98", "", "", "", "", "2.34 (speed)", "", "", ""]],
        ),
    }  # fmt: skip


def draw(result: dict[str, Any]):
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
    until.set(title="tokens until a segment's best drafter is selected", ylabel="tokens", xlabel="segment")
    until.set_xticks(np.arange(SEGMENTS) + 0.4, range(1, SEGMENTS + 1))
    for number, key in enumerate(("beginning", "of_best")):
        words = f"first {BEGINNING} tokens" if key == "beginning" else "whole text"
        places = np.arange(len(POLICIES)) + 0.4 * number
        bars(policies, places, [of[key] for of in result["between"].values()], width=0.4, label=words)
    policies.set(title="a stream of requests: over the best fixed", ylim=(0.7, 1.05))
    words = [policy.replace(", ", ",\n").replace(" of ", "\nof ") for policy in POLICIES]
    policies.set_xticks(np.arange(len(POLICIES)) + 0.2, words, fontsize=7)
    for number, (name, of) in enumerate(result["router"]["sets"].items()):
        label = f"{name} ({100 * of['misrouted']:.0f}% misrouted)"
        bars(routing, np.arange(3) + 0.4 * number, list(of["of_best"].values()), width=0.4, label=label)
    routing.set(title="tokens per round over the best fixed drafter's", ylim=(0.7, 1.05))
    routing.set_xticks(np.arange(3) + 0.2, ["router", "domain's expert", "HedgeSpec"])
    for axes in (until, policies, routing):
        axes.legend(fontsize=7)
    return made


STUDY = Study("shift", "When the domain changes", measure, tables, draw)
