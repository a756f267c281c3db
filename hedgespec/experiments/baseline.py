"""Is HedgeSpec as good as knowing the right drafter beforehand, and what is that worth?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.experiments import Experiment
from hedgespec.experiments.laboratory import Laboratory
from hedgespec.experiments.measures import judge, rounds_alone, signature
from hedgespec.experiments.statistics import by_seed, mean_interval, told
from hedgespec.experiments.telling import bars, figure, table
from hedgespec.experiments.traces import Trace
from hedgespec.zoo import EXPERTS, GENERALIST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIVE_TEXTS, LIVE_TOKENS = 12, 64
"""Decoded to compare speeds: of the mixed stream the first so many prompts, as many tokens each."""
LIVE_WARM = 3
"""Of them, those that are decoded once before: objective "throughput" begins by measuring what drafts cost."""
GOAL_SPEED, GOAL_MAT = 1.461, 0.98
"""HedgeSpec's tokens/s over the generalist's, the paper's mean; its MAT over the best fixed drafter's, in every domain."""
PAPER = {
    "Llama-3.1-8B": {"generalist": (5.69, 74.3), "hedgespec": (7.15, 90.4)},
    "Qwen3-8B": {"generalist": (4.23, 47.5), "hedgespec": (6.37, 69.4)},
    "Qwen3-32B": {"generalist": (2.88, 20.8), "hedgespec": (6.21, 40.4)},
}
"""MAT and tokens/s, arXiv 2510.20064, the main table."""


def measure(laboratory: Laboratory) -> dict[str, Any]:
    traces, config = laboratory.traces("greedy"), DecodeConfig()
    key = f"{signature(traces)}, {config}"
    rounds = laboratory.once(
        f"rounds alone of {key}",
        lambda: [rounds_alone(trace, config.draft_length) for trace in laboratory.track(traces, "drafters alone")],
    )
    runs = laboratory.once(
        f"{laboratory.seeds} seeds of {key}",
        lambda: by_seed(traces, config, laboratory.seeds, judge(traces, config.draft_length)),
    )
    names, emitted = traces[0].drafters, np.array([trace.drafted.shape[1] for trace in traces])
    domains = {}
    for domain in [name for name in EXPERTS if name in {trace.domain for trace in traces}]:
        among = np.array([trace.domain == domain for trace in traces])
        spent = np.array(rounds)[among]
        fixed = emitted[among].sum() / spent.sum(0)
        ours = [run["domains"][domain]["mat"] for run in runs]
        domains[domain] = {
            "texts": int(among.sum()),
            "fixed": dict(zip(names, fixed.tolist(), strict=True)),
            "generalist": float(fixed[names.index(GENERALIST)]),
            "best_fixed": float(fixed.max()),
            "best_fixed_name": names[int(fixed.argmax())],
            "best_of_each_request": float(emitted[among].sum() / spent.min(1).sum()),
            "hedgespec": mean_interval(ours),
            "shares": np.mean([run["domains"][domain]["shares"] for run in runs], axis=0).tolist(),
            "of_best_fixed": mean_interval([one / fixed.max() for one in ours]),
        }
    words = ("generalist", "best_fixed", "best_of_each_request")
    mean: dict[str, Any] = {word: float(np.mean([row[word] for row in domains.values()])) for word in words}
    mean["hedgespec"] = mean_interval([float(np.mean([row["mat"] for row in run["domains"].values()])) for run in runs])
    return {"drafters": list(names), "domains": domains, "mean": mean, "live": _live(laboratory, traces)}


class _Live:
    """What is decoded with, made when the first text needs it."""

    def __init__(self, laboratory: Laboratory, traces: Sequence[Trace]) -> None:
        self.laboratory, self.traces = laboratory, traces

    @cached_property
    def decoders(self) -> dict[str, Decoder]:
        zoo = self.laboratory.zoo
        generalist = [drafter for drafter in zoo.drafters if drafter.name == GENERALIST]
        made = {
            "hedgespec": Decoder(zoo.target, zoo.drafters),
            "throughput": Decoder(zoo.target, zoo.drafters, DecodeConfig(objective="throughput")),
            "generalist": Decoder(zoo.target, generalist, DecodeConfig(learner="fixed")),
        }
        for decoder in made.values():
            decoder.generate(self.prompt(0), max_new_tokens=8)  # what is made once is not measured
        for number in range(min(LIVE_WARM, len(self.traces))):
            made["throughput"].generate(self.prompt(number), max_new_tokens=LIVE_TOKENS)
        return made

    def prompt(self, number: int) -> torch.Tensor:
        """int64 [1, P]."""
        trace = self.traces[number]
        return torch.from_numpy(trace.tokens[None, : trace.prompt_length]).to(self.laboratory.zoo.target.device)

    def decode(self, number: int) -> dict[str, Any]:
        """Speeds of all ways on one prompt, MAT and drafted tokens a round, and whether all texts are the same. Each prompt
        begins with another way."""
        target, decoders, ids = self.laboratory.zoo.target, self.decoders, self.prompt(number)
        found: dict[str, Any] = {"domain": self.traces[number].domain}
        texts = []
        ways = ["plain", *decoders]
        turn = number % len(ways)
        for way in ways[turn:] + ways[:turn]:
            began = time.perf_counter()
            if way == "plain":
                mask = torch.ones_like(ids)
                text = target.generate(ids, attention_mask=mask, max_new_tokens=LIVE_TOKENS, do_sample=False)
            else:
                out = decoders[way].generate(ids, max_new_tokens=LIVE_TOKENS, seed=number)
                text, found[f"{way}_mat"] = out.sequences, out.stats[0].mean_accepted_tokens
                found[f"{way}_length"] = float(np.mean(out.stats[0].lengths))
            found[way] = (text.shape[1] - ids.shape[1]) / (time.perf_counter() - began)
            texts.append(text.tolist())
        return found | {"same": all(text == texts[0] for text in texts)}


def _live(laboratory: Laboratory, traces: Sequence[Trace]) -> dict[str, Any]:
    """Ratios of speeds, geometric means over texts with their intervals, and what they are made of."""
    traces = [trace for trace in traces if trace.drafted.shape[1]][:LIVE_TEXTS]
    live, found = _Live(laboratory, traces), []
    for number in laboratory.track(range(len(traces)), "four ways in turns"):
        key = f"live, {LIVE_TOKENS} tokens, {signature(traces[number : number + 1])}, {DecodeConfig()}"
        found.append(laboratory.once(key, lambda number=number: live.decode(number)))

    def ratio(over: str, under: str) -> dict[str, float]:
        logarithms = mean_interval([np.log(one[over] / one[under]) for one in found])
        return {name: float(np.exp(value)) for name, value in logarithms.items()}

    by_text = [one["hedgespec"] / one["generalist"] for one in found]
    rounds = {"mat": ratio("hedgespec_mat", "generalist_mat"), "speed": ratio("hedgespec", "generalist")}
    return {
        "texts": len(found),
        "tokens": LIVE_TOKENS,
        "texts_that_differ": sum(not one["same"] for one in found),
        "domains": [one["domain"] for one in found],
        "hedgespec_over_generalist_by_text": by_text,
        "hedgespec_over_generalist": rounds["speed"],
        "hedgespec_over_plain": ratio("hedgespec", "plain"),
        "throughput_over_generalist": ratio("throughput", "generalist"),
        "throughput_over_plain": ratio("throughput", "plain"),
        "throughput_length": float(np.mean([one["throughput_length"] for one in found])),
        "generalist_over_plain": ratio("generalist", "plain"),
        "mat_over_generalist": rounds["mat"],
        "time_of_a_round_over_generalist": rounds["mat"]["mean"] / rounds["speed"]["mean"],
    }


def tell(result: dict[str, Any]) -> str:
    domains, mean, live = result["domains"], result["mean"], result["live"]
    names = result["drafters"]
    rows = []
    for domain, row in domains.items():
        ours = [told(row["hedgespec"]), told(row["of_best_fixed"], 3)]
        fixed = [f"**{row['fixed'][name]:.2f}**" if name == row["best_fixed_name"] else f"{row['fixed'][name]:.2f}"
                 for name in names]  # fmt: skip
        rows.append([domain, *fixed, f"{row['best_of_each_request']:.2f}", *ours])
    bound, oracle = mean["best_fixed"] / mean["generalist"], mean["best_of_each_request"] / mean["generalist"]
    gain = mean["hedgespec"]["mean"] / mean["generalist"]
    comparison = [
        [f"paper, {target}", f"{mats[0]:.2f}", f"{mats[1]:.2f}", f"{mats[1] / mats[0]:.2f}", f"{speeds[1] / speeds[0]:.2f}"]
        for target, ways in PAPER.items()
        for mats, speeds in [tuple(zip(ways["generalist"], ways["hedgespec"]))]
    ]
    ours = [f"{mean['generalist']:.2f}", told(mean["hedgespec"]), f"{gain:.2f}", told(live["hedgespec_over_generalist"])]
    short = [
        f"{domain} ({row['of_best_fixed']['mean']:.3f}, where that drafter drafts {100 * share:.0f}% of the rounds)"
        for domain, row in domains.items()
        if row["of_best_fixed"]["mean"] < GOAL_MAT
        for share in [row["shares"][names.index(row["best_fixed_name"])]]
    ]
    speed = live["hedgespec_over_generalist"]
    verdict = "met" if speed["mean"] >= GOAL_SPEED else "missed"
    mats = "met in every domain" if not short else f"missed in {len(short)} of {len(domains)} domains: {', '.join(short)}"
    spread = live["hedgespec_over_generalist_by_text"]
    return "\n".join([
        "Tokens a round (MAT) at temperature 0. The best fixed drafter of a domain is bold; *best of each request* knows the "
        f"best drafter of every text. Intervals: 95% over {result['seeds']} seeds.\n",
        table(["domain", *names, "best of each request", "HedgeSpec", "over best fixed"], rows),
        table(["", "generalist MAT", "HedgeSpec MAT", "ratio", "ratio of tokens/s"], [*comparison, ["ours", *ours]]),
        f"Speeds of {live['texts']} texts of {live['tokens']} tokens, all ways in turns, geometric means with 95% "
        f"intervals over texts: HedgeSpec runs {told(live['hedgespec_over_generalist'])} times as fast as the generalist "
        f"(single texts {min(spread):.2f} to {max(spread):.2f}) and {told(live['hedgespec_over_plain'])} times as fast as "
        f"plain `generate`, the generalist {told(live['generalist_over_plain'])} times. With objective \"throughput\", which "
        f"chooses the draft length too ({live['throughput_length']:.1f} tokens on average), HedgeSpec runs "
        f"{told(live['throughput_over_generalist'])} times as fast as the generalist and "
        f"{told(live['throughput_over_plain'])} times as fast as plain `generate`. {live['texts_that_differ']} of the texts "
        "did not come out the same in all ways.\n",
        f"Goal of MAT, {GOAL_MAT} of the best fixed drafter's in every domain: {mats}. Goal of speed, {GOAL_SPEED} times the "
        f"generalist: {verdict}. Selection cannot bring more tokens a round than there are to be had: over the generalist, "
        f"the best fixed drafter of each domain has {bound:.2f} times and the best of each request {oracle:.2f} times; "
        f"HedgeSpec has {gain:.2f} times. In the live run its MAT was {live['mat_over_generalist']['mean']:.2f} times the "
        f"generalist's, and a round, its share of the prompt included, took {live['time_of_a_round_over_generalist']:.2f} "
        "times as long.",
    ])  # fmt: skip


def draw(result: dict[str, Any]) -> Figure:
    made, (left, right) = figure(2)
    places, domains = np.arange(len(result["domains"])), result["domains"]
    for offset, (word, label) in enumerate([("generalist", "generalist"), ("best_fixed", "best fixed drafter of the domain"),
                                            ("best_of_each_request", "best drafter of each request")]):  # fmt: skip
        left.bar(places + 0.2 * offset - 0.3, [row[word] for row in domains.values()], 0.2, label=label, color=f"C{7 + offset}")
    bars(left, places + 0.3, [row["hedgespec"] for row in domains.values()], width=0.2, label="HedgeSpec", color="C0")
    left.set_xticks(places, domains)
    left.set(title="tokens a round by domain, temperature 0", ylabel="MAT, tokens a round", ylim=(1, None))
    left.legend(fontsize="small")
    live = result["live"]
    over = ("hedgespec_over_generalist", "throughput_over_generalist", "hedgespec_over_plain", "throughput_over_plain",
            "generalist_over_plain")  # fmt: skip
    labels = ["HedgeSpec /\ngeneralist", "throughput /\ngeneralist", "HedgeSpec /\nplain", "throughput /\nplain",
              "generalist /\nplain"]  # fmt: skip
    bars(right, range(len(over)), [live[name] for name in over], width=0.5, color=["C0", "C2", "C0", "C2", "C7"])
    spread = live["hedgespec_over_generalist_by_text"]
    right.plot(np.linspace(-0.2, 0.2, len(spread)), spread, ".", color="black", label="single texts")
    right.axhline(GOAL_SPEED, color="C3", linestyle="--", label=f"paper, HedgeSpec / generalist: {GOAL_SPEED}")
    right.axhline(1, color="black", linewidth=0.8)
    right.set_xticks(range(len(over)), labels)
    right.set(title=f"tokens/s in turns, {live['texts']} texts, 95% over texts", ylabel="ratio of tokens/s")
    right.legend(fontsize="small")
    return made


EXPERIMENT = Experiment(
    "baseline",
    "HedgeSpec, the generalist and the best drafter in hindsight",
    "Does HedgeSpec get as many tokens out of a round as the drafter one would have chosen knowing the domain, and how much "
    "faster does that make it than the one drafter trained on everything? Fixed drafters and HedgeSpec in its default "
    "configuration are replayed over recorded greedy texts of every domain; speeds come from decoding some of the texts in "
    "turns.",
    measure, tell, draw,
)  # fmt: skip
