"""The demonstration: a mixed stream of domains decoded by the target alone, with the generalist, and with HedgeSpec.

Everything runs in one process on the same model, the three ways one after another on each prompt, so that the ratios mean
something on a noisy machine.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.runtime.target import device_of
from hedgespec.stats import DecodeStats, plot_profile, plot_weights, profile_table, profiled
from hedgespec.zoo import EXPERTS, GENERALIST, NAMES, load_prompts, load_zoo, replay

SETTLED = 16
"""Tokens after which the pick of the own expert is counted."""


class _Domain:
    """What one domain's prompts add up to."""

    def __init__(self) -> None:
        self.stats: list[DecodeStats] = []
        self.generalist: list[DecodeStats] = []
        self.fixed: dict[str, list[int]] = defaultdict(list)
        self.plain_tokens, self.plain_seconds = 0, 0.0

    def summary(self, own: int) -> dict[str, Any]:
        """Ratios and means of the domain; `own` is its expert's index."""
        speed = {
            "plain": self.plain_tokens / self.plain_seconds,
            "generalist": _speed(self.generalist),
            "hedgespec": _speed(self.stats),
        }
        fixed = {name: float(np.mean(emitted)) for name, emitted in self.fixed.items() if emitted}
        late = np.concatenate([stats.late_choices(SETTLED) for stats in self.stats])
        return {
            "speedup_vs_plain": speed["hedgespec"] / speed["plain"],
            "speedup_vs_generalist": speed["hedgespec"] / speed["generalist"],
            "mat": _mat(self.stats),
            "mat_generalist": _mat(self.generalist),
            "mat_best_fixed": max(fixed.values()) if fixed else float("nan"),
            "best_fixed": max(fixed, key=lambda name: fixed[name]) if fixed else "",
            "own_expert_share_after_16": float(np.mean(late == own)) if late.size else float("nan"),
            "tokens_per_second": speed,
        }


def _speed(stats: list[DecodeStats]) -> float:
    return sum(one.emitted_tokens for one in stats) / sum(one.seconds for one in stats)


def _mat(stats: list[DecodeStats]) -> float:
    return float(np.mean(np.concatenate([one.emitted_by_round for one in stats])))


def run(*, prompts_per_domain: int = 2, max_new_tokens: int = 80, draft_length: int = 5, temperature: float = 0.0,
        seed: int = 0, compile: bool = False, plot: Path | None = None, profile: Path | bool = False,
        console: Console | None = None) -> dict:  # fmt: skip
    """Decodes the mixed stream and returns the figures, each overall one the mean of the domains' own.

    Args:
        prompts_per_domain: held-out prompts of each domain, 1..40.
        max_new_tokens: of each continuation.
        draft_length: tokens drafted a round.
        temperature: 0 is greedy. Above it, the three ways emit different texts and no fixed drafter can be replayed:
            mat_best_fixed is then NaN.
        seed: of the first prompt; each next one adds 1.
        compile: of `DecodeConfig`, for both ways with drafters.
        plot: where the weights over time are drawn; None draws nothing.
        profile: tells HedgeSpec's time by stage as well, and draws it where a path says.
        console: where progress goes.

    Returns: {"speedup_vs_plain", "speedup_vs_generalist", "mat", "mat_generalist", "mat_best_fixed",
        "own_expert_share_after_16", "domains": {domain: the same and tokens_per_second by way}}.

    Raises: ValueError for an argument outside its range; ZooError if the target cannot be prepared.
    """
    if not 1 <= prompts_per_domain <= 40:
        raise ValueError(f"prompts_per_domain: expected 1..40, got {prompts_per_domain}")
    console = console or Console()
    if plot is not None or isinstance(profile, Path):
        import matplotlib  # noqa: F401  missing, it is missed now and not after minutes of work
    zoo = load_zoo()
    shared: dict[str, Any] = {"draft_length": draft_length, "compile": compile}
    hedge = Decoder(zoo.target, zoo.drafters, DecodeConfig(**shared))
    alone = [drafter for drafter in zoo.drafters if drafter.name == GENERALIST]
    generalist = Decoder(zoo.target, alone, DecodeConfig(**shared, learner="fixed"))
    stream = load_prompts()[: prompts_per_domain * len(EXPERTS)]
    domains = {name: _Domain() for name in EXPERTS}
    traces: list[tuple[str, DecodeStats]] = []

    def encode(text: str) -> torch.Tensor:
        return zoo.tokenizer(text, return_tensors="pt").input_ids

    sampling: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    plain_options = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    for warm in (hedge, generalist):
        warm.generate(encode(stream[0].text), max_new_tokens=8)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("mixed stream", total=len(stream))
        for number, prompt in enumerate(stream):
            domain, ids = domains[prompt.domain], encode(prompt.text)
            torch.manual_seed(seed + number)
            began = time.perf_counter()
            plain = zoo.target.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **plain_options
            )
            domain.plain_seconds += time.perf_counter() - began
            domain.plain_tokens += plain.shape[1] - ids.shape[1]
            domain.generalist.append(generalist.generate(ids, seed=seed + number, **sampling).stats[0])
            with profiled(device_of(zoo.target)) if profile else nullcontext():
                out = hedge.generate(ids, seed=seed + number, **sampling)
            domain.stats.append(out.stats[0])
            traces.append((prompt.domain, out.stats[0]))
            if temperature == 0:
                if not torch.equal(out.sequences, plain):
                    console.print(f"[yellow]prompt {number}: the text differs from plain decoding's by a tie of logits[/]")
                text = replay.read(zoo.target, out.sequences[0], ids.shape[1], zoo.drafters)
                for drafter in zoo.drafters:
                    domain.fixed[drafter.name] += replay.fixed_rounds(drafter, text, draft_length)
            picks = out.stats[0].picks
            favourite = NAMES[int(picks.argmax())]
            progress.console.print(
                f"{prompt.domain:>10}: {out.stats[0].tokens_per_round:.2f} tokens a round, "
                f"{favourite} drafted {picks.max()} of {out.stats[0].rounds} rounds"
            )
            progress.advance(task)
    result = _result({name: domains[name].summary(NAMES.index(name)) for name in EXPERTS})
    _print(result, domains, console)
    if profile:
        console.print(profile_table([stats for _, stats in traces]))
    if isinstance(profile, Path):
        plot_profile(traces, profile)
        console.print(f"time by stage: {profile}")
    if plot is not None:
        plot_weights(traces, plot)
        console.print(f"weights over time: {plot}")
    return result


def _result(domains: dict[str, dict]) -> dict:
    keys = [key for key in next(iter(domains.values())) if key not in ("best_fixed", "tokens_per_second")]
    return {key: float(np.mean([domain[key] for domain in domains.values()])) for key in keys} | {"domains": domains}


def _print(result: dict, domains: dict[str, _Domain], console: Console) -> None:
    shares = _table("rounds drafted by each drafter, %, by domain of the prompt", "domain", *(name[:7] for name in NAMES))
    for name, domain in domains.items():
        picks = np.sum([stats.picks for stats in domain.stats], axis=0)
        cells = [f"{100 * pick / max(picks.sum(), 1):.0f}" for pick in picks]
        cells[NAMES.index(name)] = f"[bold]{cells[NAMES.index(name)]}[/]"
        shares.add_row(name, *cells)
    console.print(shares)

    means = [*result["domains"].items(), ("mean", result)]
    rounds = _table("tokens a target forward (MAT), and the own expert's share of rounds after 16 tokens",
                    "domain", "HedgeSpec", "generalist", "best fixed", "", "own, %")  # fmt: skip
    speeds = _table("tokens/s in this process, the three ways in turn; x: HedgeSpec's speed over it",
                    "domain", "plain", "generalist", "HedgeSpec", "x plain", "x generalist")  # fmt: skip
    for name, row in means:
        style = "bold" if name == "mean" else None
        best = f"{row['mat_best_fixed']:.2f}", row.get("best_fixed", "")
        share = f"{100 * row['own_expert_share_after_16']:.0f}"
        rounds.add_row(name, f"{row['mat']:.2f}", f"{row['mat_generalist']:.2f}", *best, share, style=style)
        speed = [f"{value:.1f}" for value in row.get("tokens_per_second", {}).values()] or [""] * 3
        ratios = f"{row['speedup_vs_plain']:.2f}", f"{row['speedup_vs_generalist']:.2f}"
        speeds.add_row(name, *speed, *ratios, style=style)
    console.print(rounds)
    console.print(speeds)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and column else "left")
    return table
