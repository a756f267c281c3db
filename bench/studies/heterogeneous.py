"""A pool of heads, small language models and prompt lookup, whose drafts cost very differently, under both objectives.

The paper's pools are EAGLE heads, which all cost alike. With drafters of different costs, the most tokens per round and the
most tokens per second are different goals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from table import interval, markdown

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.experiments.measures import mean_interval, ratio_interval, tokens_per_round, tokens_per_round_alone
from hedgespec.experiments.recording import Trace
from hedgespec.experiments.replay import replay
from hedgespec.zoo import NAMES, Prompt, load_prompts
from studies import Study
from studies.lab import Lab, signature
from studies.plots import bars, figure
from studies.sets import EXIT_LAYERS, POOLS

POOL = "mixed"
DRAFT_LENGTH = 5
LIVE_TEXTS = 6
LIVE_TOKENS = 48
LIVE_FIRST = 96
"""Index of the first prompt that is decoded; none of the recorded ones."""
LIVE_WARM = 4
"""Prompts before it that the pools decode untimed, since objective "throughput" first measures every drafter and length."""
TOKENS, THROUGHPUT = "HedgeSpec, tokens a round", "HedgeSpec, tokens a second"
EXPERT = "head of the domain"
PLAIN = "target alone"
KINDS = {
    "heads": lambda name: name in NAMES,
    "heads and prompt lookup": lambda name: name in NAMES or not name.startswith("first"),
    "all": lambda name: True,
}
"""Parts of the pool: whether a drafter belongs to it, by name."""


def replayed(traces: Sequence[Trace], seeds: int, track: Callable[..., Any]) -> dict[str, Any]:
    """Returns the tokens per round of each drafter alone and of HedgeSpec with parts of the pool, and the share of the rounds
    that each drafter drafts if all are in the pool."""
    names = traces[0].drafters
    fixed = np.array([tokens_per_round_alone(trace, DRAFT_LENGTH, seeds) for trace in track(traces, "each drafter alone")])
    domains = list(dict.fromkeys(trace.domain for trace in traces))
    config = DecodeConfig(draft_length=DRAFT_LENGTH)
    pools, picks = {}, {}
    for kind, belongs in KINDS.items():
        which = [number for number, name in enumerate(names) if belongs(name)]
        mats, chosen = [], []
        for trace in track(traces, f"HedgeSpec, {kind}"):
            runs = [replay(trace.of(which), config, seed=1000 * seed + trace.number) for seed in range(seeds)]
            mats.append(tokens_per_round(runs))
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
    """Returns the configurations of both objectives, by the name of their row."""
    return {
        TOKENS: DecodeConfig(draft_length=DRAFT_LENGTH),
        THROUGHPUT: DecodeConfig(draft_length=DRAFT_LENGTH, objective="throughput"),
    }


class Live:
    """The decoders of all rows. They are made once, since objective "throughput" keeps its measured costs from text to text.

    Args:
        zoo: the target and all heads.
    """

    def __init__(self, zoo) -> None:
        self.zoo, drafters = zoo, POOLS[POOL](zoo)
        alone = DecodeConfig(draft_length=DRAFT_LENGTH, learner="fixed", warm_start=0)
        self.fixed = {drafter.name: Decoder(zoo.target, [drafter], alone) for drafter in drafters}
        self.pools = {name: Decoder(zoo.target, drafters, config) for name, config in live_configs().items()}

    def rows(self, domain: str) -> dict[str, Decoder | None]:
        """Returns what decodes a text of this domain, by the name of the row; None is the target alone."""
        others = {name: decoder for name, decoder in self.fixed.items() if name not in NAMES}
        return {PLAIN: None, EXPERT: self.fixed[domain], **others, **self.pools}

    def ids(self, prompt: Prompt) -> torch.Tensor:
        """Returns the prompt's tokens, int64 [P]."""
        return self.zoo.tokenizer(prompt.text, return_tensors="pt").input_ids[0].to(self.zoo.target.device)

    @torch.inference_mode()
    def warm_up(self, prompts: Sequence[Prompt]) -> None:
        """Decodes untimed: one text with every row, and the others with the pools."""
        self.text(prompts[0], 0)
        for prompt in prompts[1:]:
            for decoder in self.pools.values():
                self.decode(decoder, self.ids(prompt), 0)

    @torch.inference_mode()
    def text(self, prompt: Prompt, number: int) -> dict[str, dict[str, Any]]:
        """Decodes one prompt with every row and returns tokens, seconds, rounds and picks. Each text starts with another
        row."""
        ids = self.ids(prompt)
        rows = list(self.rows(prompt.domain).items())
        turn = number % len(rows)
        return {name: self.decode(decoder, ids, number) for name, decoder in rows[turn:] + rows[:turn]}

    def decode(self, decoder: Decoder | None, ids: torch.Tensor, seed: int) -> dict[str, Any]:
        """Returns tokens, seconds, rounds, emitted and drafted tokens, and the rounds of each drafter."""
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
    """Returns, by row, tokens per second, the mean over texts of its ratio to the target alone, tokens per round, mean draft
    length, and the share of the rounds of each drafter."""
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
    """Returns the place of a row: the target, then single drafters, then pools."""
    return (PLAIN, EXPERT).index(name) if name in (PLAIN, EXPERT) else 3 + (TOKENS, THROUGHPUT).index(name) if name in (
        TOKENS, THROUGHPUT) else 2  # fmt: skip


def measure(lab: Lab) -> dict[str, Any]:
    traces = lab.traces(POOL, full_drafts=DRAFT_LENGTH)
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


def tables(result: dict[str, Any]) -> dict[str, str]:
    replays, rows = result["replayed"], result["live"]["rows"]
    domains = list(replays["fixed_by_domain"])
    made = {
        "drafters": markdown(["drafter", "tokens per round", *domains, "drafts of HedgeSpec, %"], [
            [name, interval(values), *(f"{replays['fixed_by_domain'][domain][number]:.2f}" for domain in domains),
             f"{100 * replays['picks'][name]:.0f}"] for number, (name, values) in enumerate(replays["fixed"].items())
        ]),
        "pools": markdown(["pool", "drafters", "tokens per round", "best fixed of each text", "over it"], [
            [kind, of["drafters"], interval(of["mat"]), interval(of["best_fixed"]), interval(of["of_best"], 3)]
            for kind, of in replays["pools"].items()
        ]),
    }  # fmt: skip
    if rows:
        made["live"] = markdown(
            ["decoded", "tokens/s", "over the target alone", "tokens per round", "tokens drafted per round", "drafts"],
            [[name, f"{of['tokens_per_second']:.1f}", interval(of["times_plain"]),
              *([f"{of['mat']:.2f}", f"{of['draft_length']:.1f}", _picks(of["picks"])] if "mat" in of else ["1", "0", ""])]
             for name, of in rows.items()],
        )  # fmt: skip
    return made


def _picks(shares: dict[str, float]) -> str:
    """Returns the drafters with at least a twentieth of the rounds, the most frequent first; nothing if there is only one."""
    most = sorted(shares, key=shares.__getitem__, reverse=True)
    return ", ".join(f"{name} {100 * shares[name]:.0f}%" for name in most if shares[name] >= 0.05) if len(shares) > 1 else ""


def draw(result: dict[str, Any]):
    replays, rows = result["replayed"], result["live"]["rows"]
    made, (alone, share, speed) = figure(3)
    names = list(replays["fixed"])
    marks = np.arange(len(names))
    bars(alone, marks, list(replays["fixed"].values()))
    for number, (kind, of) in enumerate(replays["pools"].items()):
        alone.axhline(of["mat"]["mean"], color=f"C{number + 1}", linestyle="--", label=f"HedgeSpec, {kind}")
    alone.set(title="each drafter alone", ylabel="tokens per round")
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


STUDY = Study("heterogeneous", "Heads, small models and prompt lookup in one pool", measure, tables, draw)
