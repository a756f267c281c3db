"""A pool of heads, small language models and prompt lookup, whose drafts cost very differently, under both objectives."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.experiments import Experiment
from hedgespec.experiments.hindsight import fixed_mats, long_enough
from hedgespec.experiments.laboratory import Laboratory
from hedgespec.experiments.measures import signature
from hedgespec.experiments.recordings import EXIT_LAYERS, POOLS
from hedgespec.experiments.statistics import mat, mean_interval, ratio_interval, told
from hedgespec.experiments.telling import bars, figure, titled
from hedgespec.experiments.traces import Trace, replay
from hedgespec.zoo import NAMES, Prompt, Zoo, load_prompts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POOL = "mixed"
DRAFT_LENGTH = 5
LIVE_TEXTS = 6
LIVE_TOKENS = 48
LIVE_FIRST = 96
"""Number of the first prompt that is decoded live: none of the recorded ones."""
LIVE_WARM = 4
"""Prompts before it that pools decode untimed: an objective that measures costs begins by trying every drafter and length."""
TOKENS, THROUGHPUT = "HedgeSpec, tokens a round", "HedgeSpec, tokens a second"
EXPERT = "head of the domain"
PLAIN = "target alone"
KINDS = {
    "heads": lambda name: name in NAMES,
    "heads and prompt lookup": lambda name: name in NAMES or not name.startswith("first"),
    "all": lambda name: True,
}
"""Parts of the pool, by the drafters' names."""


def replayed(traces: Sequence[Trace], seeds: int, track: Callable[..., Any]) -> dict[str, Any]:
    """MAT of each drafter alone, and of HedgeSpec with parts of the pool; picks, as shares of rounds, with all of it."""
    names = traces[0].drafters
    fixed = np.array([fixed_mats(trace, DRAFT_LENGTH, seeds) for trace in track(traces, "each drafter alone")])
    domains = list(dict.fromkeys(trace.domain for trace in traces))
    config = DecodeConfig(draft_length=DRAFT_LENGTH)
    pools, picks = {}, {}
    for kind, belongs in KINDS.items():
        which = [number for number, name in enumerate(names) if belongs(name)]
        mats, chosen = [], []
        for trace in track(traces, f"HedgeSpec, {kind}"):
            runs = [replay(trace.of(which), config, seed=1000 * seed + trace.number) for seed in range(seeds)]
            mats.append(mat(runs))
            chosen.append(np.sum([run.picks for run in runs], axis=0) / sum(run.rounds for run in runs))
        pools[kind] = {"drafters": len(which), "mat": mean_interval(mats),
                       "of_best": mean_interval(mats / fixed[:, which].max(1)),
                       "best_fixed": mean_interval(fixed[:, which].max(1))}  # fmt: skip
        picks = dict(zip((names[one] for one in which), np.mean(chosen, axis=0).tolist()))
    return {
        "texts": len(traces), "pools": pools, "picks": picks,
        "fixed": {name: mean_interval(fixed[:, number]) for number, name in enumerate(names)},
        "fixed_by_domain": {domain: fixed[[one.domain == domain for one in traces]].mean(0).tolist() for domain in domains},
    }  # fmt: skip


def live_configs() -> dict[str, DecodeConfig]:
    """Both objectives, by the words of a row."""
    return {
        TOKENS: DecodeConfig(draft_length=DRAFT_LENGTH),
        THROUGHPUT: DecodeConfig(draft_length=DRAFT_LENGTH, objective="throughput"),
    }


class Live:
    """The decoders of all rows, made once: an objective that measures costs keeps what it measured from text to text."""

    def __init__(self, zoo: Zoo) -> None:
        self.zoo, drafters = zoo, POOLS[POOL](zoo)
        alone = DecodeConfig(draft_length=DRAFT_LENGTH, learner="fixed", warm_start=0)
        self.fixed = {drafter.name: Decoder(zoo.target, [drafter], alone) for drafter in drafters}
        self.pools = {name: Decoder(zoo.target, drafters, config) for name, config in live_configs().items()}

    def rows(self, domain: str) -> dict[str, Decoder | None]:
        """What decodes a text of this domain, by the words of a row."""
        others = {name: decoder for name, decoder in self.fixed.items() if name not in NAMES}
        return {PLAIN: None, EXPERT: self.fixed[domain], **others, **self.pools}

    def ids(self, prompt: Prompt) -> torch.Tensor:
        return self.zoo.tokenizer(prompt.text, return_tensors="pt").input_ids[0].to(self.zoo.target.device)

    @torch.inference_mode()
    def warm_up(self, prompts: Sequence[Prompt]) -> None:
        """What is done once, measuring included, before anything is timed: every row a text, and the pools some more."""
        self.text(prompts[0], 0)
        for prompt in prompts[1:]:
            for decoder in self.pools.values():
                self.decode(decoder, self.ids(prompt), 0)

    @torch.inference_mode()
    def text(self, prompt: Prompt, number: int) -> dict[str, dict[str, Any]]:
        """Every row's text, one after another, each text beginning with another row: tokens, seconds, rounds, picks."""
        ids = self.ids(prompt)
        rows = list(self.rows(prompt.domain).items())
        turn = number % len(rows)
        return {name: self.decode(decoder, ids, number) for name, decoder in rows[turn:] + rows[:turn]}

    def decode(self, decoder: Decoder | None, ids: torch.Tensor, seed: int) -> dict[str, Any]:
        start = time.perf_counter()
        if decoder is None:
            mask = torch.ones_like(ids)[None]
            text = self.zoo.target.generate(ids[None], attention_mask=mask, max_new_tokens=LIVE_TOKENS, do_sample=False)[0]
            return {"tokens": len(text) - len(ids), "seconds": time.perf_counter() - start}
        stats = decoder.generate(ids, seed=seed, max_new_tokens=LIVE_TOKENS).stats[0]
        return {
            "tokens": stats.emitted_tokens, "seconds": time.perf_counter() - start, "rounds": stats.rounds,
            "emitted": sum(stats.emitted_by_round), "picks": dict(zip(stats.drafters, stats.picks.tolist())),
            "drafted": sum(stats.lengths),
        }  # fmt: skip


def summed(texts: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By row: tokens a second, how many times the target's own in each text, MAT, mean draft length, and picks as shares."""
    found = {}
    for name in sorted(texts[0], key=_order):
        every = [text[name] for text in texts]
        speeds = [one["tokens"] / one["seconds"] for one in every]
        times = np.divide(speeds, [text[PLAIN]["tokens"] / text[PLAIN]["seconds"] for text in texts])
        found[name] = {"tokens_per_second": sum(one["tokens"] for one in every) / sum(one["seconds"] for one in every),
                       "times_plain": ratio_interval(times, np.ones(len(times)))}  # fmt: skip
        if name != PLAIN:
            rounds = sum(one["rounds"] for one in every)
            shares = {drafter: sum(one["picks"].get(drafter, 0) for one in every) / rounds for drafter in every[0]["picks"]}
            found[name] |= {"mat": sum(one["emitted"] for one in every) / rounds, "picks": shares,
                            "draft_length": sum(one["drafted"] for one in every) / rounds}  # fmt: skip
    return found


def _order(name: str) -> int:
    """Of a row: the target, then single drafters, then pools."""
    return (PLAIN, EXPERT).index(name) if name in (PLAIN, EXPERT) else 3 + (TOKENS, THROUGHPUT).index(name) if name in (
        TOKENS, THROUGHPUT) else 2  # fmt: skip


def measure(lab: Laboratory) -> dict[str, Any]:
    traces = long_enough(lab.traces(POOL), DRAFT_LENGTH)
    result = {"draft_length": DRAFT_LENGTH, "replayed": lab.once(
        f"replayed: {signature(traces)}, K {DRAFT_LENGTH}, {lab.seeds} seeds",
        lambda: replayed(traces, lab.seeds, lab.track))}  # fmt: skip
    prompts = load_prompts()[LIVE_FIRST : LIVE_FIRST + LIVE_TEXTS]
    live: Live | None = None

    def decoded(number: int) -> dict[str, dict[str, Any]]:
        nonlocal live
        if live is None:
            live = Live(lab.zoo)
            live.warm_up(load_prompts()[LIVE_FIRST - LIVE_WARM : LIVE_FIRST])
        return live.text(prompts[number], number)

    key = f"{LIVE_TOKENS} tokens, K {DRAFT_LENGTH}, rows {list(live_configs())}, layers {EXIT_LAYERS}, warm {LIVE_WARM}"
    texts = [lab.once(f"live {LIVE_FIRST + number}: {key}", lambda number=number: decoded(number))
             for number in lab.track(range(len(prompts)), "live")]  # fmt: skip
    result["live"] = {"texts": len(texts), "tokens": LIVE_TOKENS, "rows": summed(texts) if len(texts) > 1 else {}}
    return result


def tell(result: dict[str, Any]) -> str:
    replays, live = result["replayed"], result["live"]
    domains = list(replays["fixed_by_domain"])
    parts = [
        titled(
            f"{replays['texts']} recorded texts, K = {result['draft_length']}: MAT of each drafter alone, and its share of the "
            "rounds where HedgeSpec picks for the most tokens a round:",
            ["drafter", "MAT", *domains, "picks, %"],
            ([name, told(interval), *(f"{replays['fixed_by_domain'][domain][number]:.2f}" for domain in domains),
              f"{100 * replays['picks'][name]:.0f}"] for number, (name, interval) in enumerate(replays["fixed"].items())),
        ),
        titled(
            "HedgeSpec with parts of the pool, objective tokens a round:",
            ["pool", "drafters", "MAT", "best fixed of each text", "over it"],
            ([kind, of["drafters"], told(of["mat"]), told(of["best_fixed"]), told(of["of_best"], 3)]
             for kind, of in replays["pools"].items()),
        ),
    ]  # fmt: skip
    if live["rows"]:
        parts.append(titled(
            f"Decoded live, {live['texts']} other texts of {live['tokens']} tokens, every row in turns on each text:",
            ["", "tokens/s", "times the target alone", "MAT", "mean draft length", "picks"],
            ([name, f"{of['tokens_per_second']:.1f}", told(of["times_plain"]),
              *([f"{of['mat']:.2f}", f"{of['draft_length']:.1f}", _picks(of["picks"])] if "mat" in of else ["1", "0", ""])]
             for name, of in live["rows"].items()),
        ))  # fmt: skip
    return "\n".join([*parts, _sense(result), ""])


def _picks(shares: dict[str, float]) -> str:
    """The drafters with a twentieth of the rounds or more, the most picked first."""
    most = sorted(shares, key=shares.__getitem__, reverse=True)
    return ", ".join(f"{name} {100 * shares[name]:.0f}%" for name in most if shares[name] >= 0.05) if len(shares) > 1 else ""


def _sense(result: dict[str, Any]) -> str:
    replays, rows = result["replayed"], result["live"]["rows"]
    fixed = replays["fixed"]
    best = max(fixed, key=lambda name: fixed[name]["mean"])
    heads, whole = replays["pools"]["heads"], replays["pools"]["all"]
    words = [
        f"By tokens a round `{best}` is the best single drafter with {fixed[best]['mean']:.2f}; HedgeSpec gives it "
        f"{100 * replays['picks'][best]:.0f}% of the rounds and has {whole['mat']['mean']:.2f}, against "
        f"{heads['mat']['mean']:.2f} with the heads alone."
    ]
    if not rows:
        return words[0]
    quickest = max((name for name in rows if name not in (TOKENS, THROUGHPUT)), key=lambda one: rows[one]["tokens_per_second"])
    tokens = rows[TOKENS]
    pays = "pays" if tokens["times_plain"]["low"] > 1 else "does not pay"
    words.append(
        f"Whether that pays is another matter: live, that objective gives {told(tokens['times_plain'])} times the target's "
        f"own speed, which {pays}; of what needs no choice `{quickest}` is the quickest, "
        f"{told(rows[quickest]['times_plain'])} times."
    )
    if THROUGHPUT in rows:
        of = rows[THROUGHPUT]
        better = "ahead of" if of["tokens_per_second"] > tokens["tokens_per_second"] else "behind"
        words.append(
            f"The objective that counts tokens a second is {better} it with {told(of['times_plain'])} times, at a MAT of "
            f"{of['mat']:.2f} against {tokens['mat']:.2f} and drafts of {of['draft_length']:.1f} tokens on average; it picks "
            f"{_picks(of['picks']) or 'no drafter much'}."
        )
    words.append("The paper's pools are heads alone, and it maximises tokens a round.")
    return " ".join(words)


def draw(result: dict[str, Any]) -> Figure:
    replays, rows = result["replayed"], result["live"]["rows"]
    made, (alone, share, speed) = figure(3)
    names = list(replays["fixed"])
    marks = np.arange(len(names))
    bars(alone, marks, list(replays["fixed"].values()))
    for number, (kind, of) in enumerate(replays["pools"].items()):
        alone.axhline(of["mat"]["mean"], color=f"C{number + 1}", linestyle="--", label=f"HedgeSpec, {kind}")
    alone.set(title="each drafter alone", ylabel="MAT")
    alone.legend(fontsize=7)
    picked = {"recorded": replays["picks"]} | {name: of["picks"] for name, of in rows.items() if name in (TOKENS, THROUGHPUT)}
    for number, (label, shares) in enumerate(picked.items()):
        places = marks + 0.27 * (number - (len(picked) - 1) / 2)
        share.bar(places, [100 * shares.get(name, 0.0) for name in names], 0.26, label=label)
    share.set(title="who drafts", ylabel="% of rounds")
    share.legend(fontsize=7)
    for axes in (alone, share):
        axes.set_xticks(marks, names, rotation=45, ha="right")
    if rows:
        bars(speed, np.arange(len(rows)), [of["times_plain"] for of in rows.values()])
        speed.axhline(1.0, color="black", linewidth=0.8)
    speed.set_xticks(range(len(rows)), [name.replace(", ", ",\n") for name in rows], rotation=45, ha="right")
    speed.set(title="speed, decoded live", ylabel="times the target alone")
    return made


EXPERIMENT = Experiment(
    name="heterogeneous",
    title="Heads, small models and prompt lookup in one pool",
    question="The paper's pools are EAGLE heads, which all cost alike. With drafters of very different costs the most tokens a "
    "round and the most tokens a second are different aims. What does HedgeSpec pick for each, and what comes of it?",
    measure=measure,
    tell=tell,
    draw=draw,
)
