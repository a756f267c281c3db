"""What was measured, told in one file: the goals, the experiments, and what only a clock tells of the options."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hedgespec.experiments import NAMES, load
from hedgespec.experiments.telling import table
from hedgespec.files import write_text

Result = dict[str, Any]


def write(folder: Path, path: Path) -> None:
    """Writes `compose` of a folder to a file. Raises: ValueError where there is no result."""
    write_text(path, compose(folder, path.parent))


def compose(folder: Path, place: Path) -> str:
    """Every experiment that has a result in a folder as one text of Markdown that is to lie in the folder `place`, and the
    benchmarks of the decoder's options where their figures lie in the folder `decoder` beside the first.

    Raises: ValueError where there is no result.
    """
    found = {name: _read(folder / f"{name}.json") for name in NAMES if (folder / f"{name}.json").exists()}
    if not found:
        raise ValueError(f"folder: expected the results of an experiment, got {folder}, which has none")
    parts = [
        "# Results",
        "Written by `hedgespec experiment report` from the figures of each experiment, none by hand. Every experiment is one "
        "command, named under its heading; the tables beside it have the same numbers. The zoo is small: a target of 135M "
        "parameters and seven heads trained on two cores. What can be compared with the paper, whose targets have 8B and 32B, "
        "is what selection does with the drafters there are, not how good they are.",
        "## Goals",
        table(["goal", "", "measured"], [row for goal in GOALS if (row := goal(found)) is not None]),
    ]
    for name, result in found.items():
        experiment = load(name)
        figure = Path(os.path.relpath(folder / f"{name}.svg", place)).as_posix()
        made = f"`{result['command']}`, {result['date']}, torch {result['versions']['torch']}."
        parts += [f"## {experiment.title}", experiment.question, made, experiment.tell(result)]
        parts += [f"![{experiment.title}]({figure})"]
    live = [told for bench in LIVE if (told := _bench(folder.parent / "decoder", bench))]
    if live:
        parts += ["## Options by the clock", "Decoded live, the values of an option in turns over the same prompts.", *live]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _read(path: Path) -> Result:
    return json.loads(path.read_text(encoding="utf-8"))


def _bench(folder: Path, name: str) -> str:
    """What a benchmark found, under its command; nothing where it has not run."""
    if not (path := folder / f"{name}.json").exists():
        return ""
    result = _read(path)
    told = f"`{result['command'].partition(' --json')[0]}`, {result['date']}{NOTES.get(name, '')}:"
    return f"{told}\n\n{LIVE[name](result)}"


# Goals


def _row(goal: str, met: bool, measured: str) -> list[str]:
    return [goal, "met" if met else "missed", measured]


def _speed(found: dict[str, Result]) -> list[str] | None:
    if "baseline" not in found:
        return None
    live, mean = found["baseline"]["live"], found["baseline"]["mean"]
    ours, throughput = (live[f"{way}_over_generalist"]["mean"] for way in ("hedgespec", "throughput"))
    most = mean["best_of_each_request"] / mean["generalist"]
    return _row(
        "HedgeSpec has 1.461 times the generalist's tokens/s",
        max(ours, throughput) >= 1.461,
        f"{ours:.2f}, with objective throughput {throughput:.2f}; knowing the best drafter of each text would bring {most:.2f} "
        "times the tokens a round",
    )


def _best(found: dict[str, Result]) -> list[str] | None:
    if "baseline" not in found:
        return None
    shares = {domain: row["of_best_fixed"]["mean"] for domain, row in found["baseline"]["domains"].items()}
    told = ", ".join(f"{domain} {share:.3f}" for domain, share in shares.items())
    return _row("its MAT is 0.98 of the best fixed drafter's in every domain", min(shares.values()) >= 0.98, told)


def _bandits(found: dict[str, Result]) -> list[str] | None:
    if "selection" not in found:
        return None
    met, told = True, []
    for name, of_set in found["selection"]["sets"].items():
        rows = of_set["learners"]
        ours, others = rows["normal_hedge"]["mat"], [rows[one]["mat"] for one in ("ucb", "exp3")]
        met &= all(ours["low"] > other["high"] for other in others)
        told.append(f"{name} {ours['mean']:.2f} against " + " and ".join(f"{other['mean']:.2f}" for other in others))
    return _row("its MAT is above UCBSpec's and EXP3Spec's, 95% intervals apart, without a warm start", met, "; ".join(told))


def _pools(found: dict[str, Result]) -> list[str] | None:
    if "pool-size" not in found:
        return None
    rows = found["pool-size"]["wide"]["learners"]
    slope = rows["normal_hedge"]["slope_in_log"]
    told = ", ".join(
        f"{way.replace('_', ' ')} {row['regret'][0]['mean']:.1f} to {row['regret'][-1]['mean']:.1f}"
        for way, row in rows.items()
        if way in ("normal_hedge", "ucb", "exp3")
    )
    return _row("its regret is flat from 2 drafters to 64, the bandits' grows", slope["low"] <= 0 <= slope["high"], told)


def _first(found: dict[str, Result]) -> list[str] | None:
    if "open-questions" not in found:
        return None
    rows = found["open-questions"]["warm"]["greedy"]["warm_starts"]
    warm, without = rows["32"], rows["0"]
    return _row(
        "the first pick is the best drafter for 80% of requests, MAT over 32 tokens 0.97 of the best's",
        warm["picked"]["mean"] >= 0.8 and warm["of_best"]["mean"] >= 0.97,
        f"{100 * warm['picked']['mean']:.0f}%, {warm['of_best']['mean']:.3f}; without the warm start "
        f"{100 * without['picked']['mean']:.0f}%, {without['of_best']['mean']:.3f}",
    )


GOALS = (_speed, _best, _bandits, _pools, _first)


# Benchmarks of the decoder's options


def _cadences(result: Result) -> str:
    head = ["evaluate_every", "MAT", "regret", "time spent on scoring, %", "x speed at the first"]
    rows = [
        [str(row["evaluate_every"]), f"{row['mat']:.2f}", f"{row['regret_in_force']:.2f}", f"{100 * row['scoring_share']:.0f}",
         f"{row['times_first']:.2f}"]
        for row in result["cadences"]
    ]  # fmt: skip
    return table(head, rows)


def _back_offs(result: Result) -> str:
    head = ["back_off", "MAT", "regret", "drafters scored, %", "scoring, x always", "x speed always"]
    first = result["back_offs"][0]
    rows = [
        [str(row["back_off"]), f"{row['mat']:.2f}", f"{row['regret_in_force']:.2f}", f"{100 * row['scored_share']:.0f}",
         f"{row['scoring_ms'] / first['scoring_ms']:.2f}", f"{row['times_first']:.2f}"]
        for row in result["back_offs"]
    ]  # fmt: skip
    return table(head, rows)


def _objectives(result: Result) -> str:
    head = ["pool", "objective", "x plain", "MAT", "tokens drafted a round", "rounds without a draft, %"]
    rows = [
        [row["pool"], row["objective"], f"{row['times_plain']:.2f}", f"{row['mat']:.2f}", f"{row['length']:.1f}",
         f"{100 * row['plain_share']:.0f}"]
        for row in result["pools"]
    ]  # fmt: skip
    return table(head, rows)


def _modes(result: Result) -> str:
    head = ["mode, temperature 1", "MAT", "standard error", "x speed at the first"]
    return table(head, [
        [row["mode"], f"{row['mat']:.2f}", f"{row['mat_standard_error']:.2f}", f"{row['times_first']:.2f}"]
        for row in result["modes"]
    ])  # fmt: skip


def _warm(result: Result) -> str:
    head = [
        "warm_start",
        "first pick is the best, %",
        "MAT over 32 tokens, of the best's",
        "ms of the prompt's stage, x without",
    ]
    first = result["warm_starts"][0]["prompt_milliseconds"]
    return table(head, [
        [str(row["warm_start"]), f"{100 * row['first_pick']:.0f}", f"{row['of_best']:.3f}",
         f"{row['prompt_milliseconds'] / first:.2f}"]
        for row in result["warm_starts"]
    ])  # fmt: skip


def _trees(result: Result) -> str:
    head = ["draft", "MAT", "predicted", "realised", "x chain's speed"]
    return table(head, [
        [row["shape"], f"{row['mat']:.2f}", f"{row['predicted']:.2f}", f"{row['realised']:.2f}", f"{row['times_first']:.2f}"]
        for row in result["shapes"]
    ])  # fmt: skip


LIVE = {
    "warm": _warm, "objective": _objectives, "cadence": _cadences, "back-off": _back_offs, "modes": _modes, "trees": _trees,
    "trees-sampled": _trees,
}  # fmt: skip
"""By the names of their files."""
NOTES = {"cadence": ", with `warm_start=0`", "modes": ", with `warm_start=0`"}
"""What the command of a recorded benchmark does not say: these were run before there was a warm start."""
