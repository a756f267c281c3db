"""HedgeSpec against the generalist head and the best drafter in hindsight: tokens per round by domain, and speed.

Fixed drafters and HedgeSpec's defaults are replayed over recorded greedy texts of every domain. Speeds come from decoding some
of the texts, one method after another on each text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from table import interval, markdown

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.experiments.measures import Interval, mean_interval, over_seeds, request_measures, rounds_alone
from hedgespec.experiments.recording import Trace
from hedgespec.experiments.replay import replay
from hedgespec.zoo import EXPERTS, GENERALIST
from studies import Study
from studies.lab import Lab, signature
from studies.plots import bars, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIVE_TEXTS, LIVE_TOKENS = 12, 64
"""Texts that are decoded to compare speeds, the first of the mixed stream, and tokens of each."""
LIVE_WARM_UP = 3
"""Of them, texts that objective "throughput" decodes once before, since it first measures the cost of drafts."""
GOAL_SPEED, GOAL_TOKENS = 1.461, 0.98
"""Goals: tokens per second over the generalist's (the paper's mean), and tokens per round over the best fixed drafter's."""
PAPER = {
    "Llama-3.1-8B": {"generalist": (5.69, 74.3), "hedgespec": (7.15, 90.4)},
    "Qwen3-8B": {"generalist": (4.23, 47.5), "hedgespec": (6.37, 69.4)},
    "Qwen3-32B": {"generalist": (2.88, 20.8), "hedgespec": (6.21, 40.4)},
}
"""Tokens per round and per second, arXiv 2510.20064, the main table."""


def measure(lab: Lab) -> dict[str, Any]:
    traces, config = lab.traces("greedy"), DecodeConfig()
    length, key = config.draft_length, f"{signature(traces)}, {config}"
    alone = lab.once(
        f"rounds alone of {key}", lambda: [rounds_alone(trace, length) for trace in lab.track(traces, "each drafter alone")]
    )
    runs = lab.once(
        f"{lab.seeds} seeds of {key}",
        lambda: over_seeds(
            traces, lab.seeds, lambda trace, seed: replay(trace, config, seed=seed), request_measures(traces, length)
        ),
    )
    names, emitted = traces[0].drafters, np.array([trace.drafted.shape[1] for trace in traces])
    domains = {}
    for domain in [name for name in EXPERTS if name in {trace.domain for trace in traces}]:
        among = np.array([trace.domain == domain for trace in traces])
        spent = np.array(alone)[among]
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
    references = ("generalist", "best_fixed", "best_of_each_request")
    mean = {name: float(np.mean([row[name] for row in domains.values()])) for name in references}
    mean["hedgespec"] = mean_interval([float(np.mean([row["mat"] for row in run["domains"].values()])) for run in runs])
    return {"drafters": list(names), "domains": domains, "mean": mean, "live": _live(lab, traces)}


class Live:
    """Decodes texts with all methods. The decoders are made when the first text needs them.

    Args:
        lab: gives the zoo.
        traces: the texts, of which the prompts are decoded.
    """

    def __init__(self, lab: Lab, traces: Sequence[Trace]) -> None:
        self.lab, self.traces = lab, traces

    @cached_property
    def decoders(self) -> dict[str, Decoder]:
        zoo = self.lab.zoo
        generalist = [drafter for drafter in zoo.drafters if drafter.name == GENERALIST]
        made = {
            "hedgespec": Decoder(zoo.target, zoo.drafters),
            "throughput": Decoder(zoo.target, zoo.drafters, DecodeConfig(objective="throughput")),
            "generalist": Decoder(zoo.target, generalist, DecodeConfig(learner="fixed")),
        }
        for decoder in made.values():
            decoder.generate(self.prompt(0), max_new_tokens=8)  # the first call includes one-off work
        for number in range(min(LIVE_WARM_UP, len(self.traces))):
            made["throughput"].generate(self.prompt(number), max_new_tokens=LIVE_TOKENS)
        return made

    def prompt(self, number: int) -> torch.Tensor:
        """Returns the prompt of a text, int64 [1, P]."""
        trace = self.traces[number]
        return torch.from_numpy(trace.tokens[None, : trace.prompt_length]).to(self.lab.zoo.target.device)

    def decode(self, number: int) -> dict[str, Any]:
        """Returns, for one prompt, the speed of all methods, HedgeSpec's tokens per round and drafted tokens per round, and
        whether all texts are equal. Each prompt starts with another method."""
        target, decoders, ids = self.lab.zoo.target, self.decoders, self.prompt(number)
        found: dict[str, Any] = {"domain": self.traces[number].domain}
        texts = []
        methods = ["plain", *decoders]
        turn = number % len(methods)
        for method in methods[turn:] + methods[:turn]:
            began = time.perf_counter()
            if method == "plain":
                mask = torch.ones_like(ids)
                text = target.generate(ids, attention_mask=mask, max_new_tokens=LIVE_TOKENS, do_sample=False)
            else:
                out = decoders[method].generate(ids, max_new_tokens=LIVE_TOKENS, seed=number)
                text, stats = out.sequences, out.stats[0]
                found[f"{method}_mat"] = float(np.mean(stats.emitted_by_round))
                found[f"{method}_length"] = float(np.mean(stats.lengths))
            found[method] = (text.shape[1] - ids.shape[1]) / (time.perf_counter() - began)
            texts.append(text.tolist())
        return found | {"same": all(text == texts[0] for text in texts)}


def _live(lab: Lab, traces: Sequence[Trace]) -> dict[str, Any]:
    """Returns ratios of speeds, as geometric means over texts with their intervals, and their parts."""
    traces = [trace for trace in traces if trace.drafted.shape[1]][:LIVE_TEXTS]
    live, found = Live(lab, traces), []
    for number in lab.track(range(len(traces)), "decoding"):
        key = f"live, {LIVE_TOKENS} tokens, {signature(traces[number : number + 1])}, {DecodeConfig()}"
        found.append(lab.once(key, lambda number=number: live.decode(number)))

    def ratio(over: str, under: str) -> Interval:
        logarithms = mean_interval([np.log(one[over] / one[under]) for one in found])
        return {name: float(np.exp(value)) for name, value in logarithms.items()}

    speed, tokens = ratio("hedgespec", "generalist"), ratio("hedgespec_mat", "generalist_mat")
    return {
        "texts": len(found),
        "tokens": LIVE_TOKENS,
        "texts_that_differ": sum(not one["same"] for one in found),
        "domains": [one["domain"] for one in found],
        "hedgespec_over_generalist_by_text": [one["hedgespec"] / one["generalist"] for one in found],
        "hedgespec_over_generalist": speed,
        "hedgespec_over_plain": ratio("hedgespec", "plain"),
        "throughput_over_generalist": ratio("throughput", "generalist"),
        "throughput_over_plain": ratio("throughput", "plain"),
        "throughput_length": float(np.mean([one["throughput_length"] for one in found])),
        "generalist_over_plain": ratio("generalist", "plain"),
        "mat_over_generalist": tokens,
        "time_of_a_round_over_generalist": tokens["mean"] / speed["mean"],
    }


def tables(result: dict[str, Any]) -> dict[str, str]:
    mean, live, names = result["mean"], result["live"], result["drafters"]
    rows = []
    for domain, row in result["domains"].items():
        fixed = [f"**{row['fixed'][name]:.2f}**" if name == row["best_fixed_name"] else f"{row['fixed'][name]:.2f}"
                 for name in names]  # fmt: skip
        rows.append([domain, *fixed, f"{row['best_of_each_request']:.2f}", interval(row["hedgespec"]),
                     interval(row["of_best_fixed"], 3)])  # fmt: skip
    paper = [
        [
            f"paper, {target}",
            f"{tokens[0]:.2f}",
            f"{tokens[1]:.2f}",
            f"{tokens[1] / tokens[0]:.2f}",
            f"{speeds[1] / speeds[0]:.2f}",
        ]
        for target, methods in PAPER.items()
        for tokens, speeds in [tuple(zip(methods["generalist"], methods["hedgespec"]))]
    ]
    gain = mean["hedgespec"]["mean"] / mean["generalist"]
    ours = [
        f"{mean['generalist']:.2f}",
        interval(mean["hedgespec"]),
        f"{gain:.2f}",
        interval(live["hedgespec_over_generalist"]),
    ]
    spread = live["hedgespec_over_generalist_by_text"]
    return {
        "domains": markdown(["domain", *names, "best of each text", "HedgeSpec", "over best fixed"], rows),
        "paper": markdown(
            ["", "generalist, tokens per round", "HedgeSpec", "ratio", "ratio of tokens/s"], [*paper, ["here", *ours]]
        ),
        "bounds": markdown(["tokens per round over the generalist's, mean of the domains", "ratio"], [
            ["HedgeSpec", f"{gain:.2f}"],
            ["best fixed drafter of each domain", f"{mean['best_fixed'] / mean['generalist']:.2f}"],
            ["best drafter of each text", f"{mean['best_of_each_request'] / mean['generalist']:.2f}"],
        ]),
        "speed": markdown(["decoded", "over the generalist", "over plain `generate`"], [
            ["HedgeSpec, tokens/s", interval(live["hedgespec_over_generalist"]), interval(live["hedgespec_over_plain"])],
            ["HedgeSpec, objective \"throughput\", tokens/s", interval(live["throughput_over_generalist"]),
             interval(live["throughput_over_plain"])],
            ["generalist, tokens/s", "1", interval(live["generalist_over_plain"])],
            ["HedgeSpec, tokens/s, slowest and fastest text", f"{min(spread):.2f} and {max(spread):.2f}", ""],
            ["HedgeSpec, tokens per round", interval(live["mat_over_generalist"]), ""],
            ["HedgeSpec, time per round", f"{live['time_of_a_round_over_generalist']:.2f}", ""],
        ]),
    }  # fmt: skip


def draw(result: dict[str, Any]) -> Figure:
    made, (left, right) = figure(2)
    places, domains = np.arange(len(result["domains"])), result["domains"]
    for offset, (key, label) in enumerate([("generalist", "generalist"), ("best_fixed", "best fixed drafter of the domain"),
                                           ("best_of_each_request", "best drafter of each text")]):  # fmt: skip
        left.bar(places + 0.2 * offset - 0.3, [row[key] for row in domains.values()], 0.2, label=label, color=f"C{7 + offset}")
    bars(left, places + 0.3, [row["hedgespec"] for row in domains.values()], width=0.2, label="HedgeSpec", color="C0")
    left.set_xticks(places, domains)
    left.set(title="temperature 0, by domain", ylabel="tokens per round", ylim=(1, None))
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
    right.set(title=f"decoded, {live['texts']} texts, 95% over texts", ylabel="ratio of tokens/s")
    right.legend(fontsize="small")
    return made


STUDY = Study("baseline", "HedgeSpec, the generalist and the best drafter in hindsight", measure, tables, draw)
