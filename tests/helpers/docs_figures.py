"""Table rows of README.md and docs/benchmarks.md, computed from the JSON files under bench/results that the pages name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
README, BENCHMARKS, ENGINES, GUARANTEES = "README.md", "docs/benchmarks.md", "docs/engines.md", "docs/guarantees.md"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def row(*cells: object) -> str:
    """Returns a row of a Markdown table; floats are written with two decimals."""
    return "| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def expected() -> Iterator[tuple[str, str]]:
    """Yields (page, text that must stand in it)."""
    yield from _demo()
    yield from _selection()
    yield from _decoder()
    yield from _stack_and_kernels()
    yield from _trees()
    yield from _zoo()
    yield from _vllm()


def _demo() -> Iterator[tuple[str, str]]:
    demo = load("zoo/demo")
    tokens, generalist, best = (float(demo[key]) for key in ("mat", "mat_generalist", "mat_best_fixed"))
    plain, over_generalist = demo["speedup_vs_plain"], demo["speedup_vs_generalist"]
    yield README, row("tokens per round", tokens, generalist, best)
    yield README, f"| speed, plain `generate` = 1 | {plain:.2f} | {plain / over_generalist:.2f} | |"
    yield (
        README,
        f"emits {tokens / generalist:.2f} times as many tokens per round here and is {over_generalist:.2f} times as fast",
    )
    rows = {**demo["domains"], "mean": demo}
    for domain, each in rows.items():
        figures = [float(each[key]) for key in ("mat", "mat_generalist", "mat_best_fixed")]
        share = f"{100 * each['own_expert_share_after_16']:.0f}%"
        yield BENCHMARKS, row(domain, *figures, share, each["speedup_vs_plain"], each["speedup_vs_generalist"])


LEARNERS = {
    "NormalHedge, warm start": "normal_hedge warm", "NormalHedge": "normal_hedge", "Hedge": "hedge",
    "AdaNormalHedge": "ada_normal_hedge", "UCBSpec": "ucb", "EXP3Spec": "exp3", "MetaSD": "meta_sd", "uniform draw": "uniform",
}  # fmt: skip


def _selection() -> Iterator[tuple[str, str]]:
    sets = load("experiments/selection")["sets"]
    greedy = sets["greedy"]["learners"]
    warm, cold, ucb, exp3 = (greedy[name]["regret"]["mean"] for name in ("normal_hedge warm", "normal_hedge", "ucb", "exp3"))
    yield README, f"is {warm:.1f} ({cold:.1f} without\nthe warm start"
    yield README, f"{ucb:.1f} for UCBSpec and {exp3:.1f} for EXP3Spec"
    yield GUARANTEES, f"measured is {warm:.1f} on recorded greedy texts\n  with a warm start and {cold:.1f} without"
    for label, name in LEARNERS.items():
        tokens = [sets[each]["learners"][name]["mat"]["mean"] for each in ("greedy", "sampled", "coupled")]
        yield BENCHMARKS, row(label, *tokens, f"{greedy[name]['regret']['mean']:.1f}")
    best = [sets[each]["best_of_each_request"] for each in ("greedy", "sampled", "coupled")]
    yield BENCHMARKS, row("best head of each text, in hindsight", *best, 0)


METHODS = {
    "plain": "plain `generate`", "prompt lookup": "transformers' prompt lookup", "generalist": "generalist head",
    "own expert": "the domain's own expert, in hindsight", "HedgeSpec": "HedgeSpec, 7 heads",
    "HedgeSpec + lookup": "HedgeSpec, 7 heads and prompt lookup",
}  # fmt: skip


def _decoder() -> Iterator[tuple[str, str]]:
    for each in load("decoder/batch-1")["batch_sizes"]["1"]:
        yield BENCHMARKS, row(METHODS[each["way"]], each["times_plain"], float(each["mat"]))
        if each["way"] == "HedgeSpec":
            seconds, total = each["seconds_by_stage"], sum(each["seconds_by_stage"].values())
            for stage, label in {
                "prompt": "prompt",
                "draft": "draft",
                "verify": "verify",
                "prefill": "drafter_forward",
            }.items():
                yield BENCHMARKS, row(label, f"{100 * seconds[stage] / total:.0f}%")
            rest = sum(seconds[stage] for stage in ("select", "evaluate", "learn"))
            yield BENCHMARKS, row("select, evaluate, learn", f"{100 * rest / total:.1f}%")
    batches = load("decoder/batches-4-16")["batch_sizes"]
    speeds = {each["way"]: [each["times_plain"]] for each in batches["4"]}
    for each in batches["16"]:
        speeds[each["way"]].append(each["times_plain"])
    for method in ("generalist", "HedgeSpec"):
        yield BENCHMARKS, row(METHODS[method], *speeds[method])
    four, sixteen = speeds["HedgeSpec"]
    yield README, f"seven heads reach {four:.2f} and {sixteen:.2f} times plain speed"


def _benchmarks(name: str) -> dict[str, dict[str, float]]:
    return {each["name"]: each["extra_info"] for each in load(name)["benchmarks"]}


def _stack_and_kernels() -> Iterator[tuple[str, str]]:
    stack = _benchmarks("cpu/stack")
    adaptive, always = (stack[f"test_round[{every}]"]["7 drafters over 1"] for every in ("adaptive", "1"))
    yield README, f"a round takes {adaptive:.2f} times as"
    yield (
        BENCHMARKS,
        f"{always:.2f} times as long as a round with one when\nall are scored after each round, and {adaptive:.2f} times",
    )
    passes = [float(stack[f"test_pass[{count}]"]["in turn"]) for count in (1, 3, 6, 12, 24)]
    yield BENCHMARKS, row("seven heads one after another / stacked", *passes)
    drafts = [float(stack[f"test_draft[{batch}]"]["row by row"]) for batch in (1, 4, 16)]
    yield BENCHMARKS, row("drafting row by row / batched", *drafts)
    goals = _benchmarks("cpu/evaluate-goals")
    for shape, vocabulary in (("N7-T6", 49152), ("N7-T9", 151936)):
        cells = []
        for dtype in ("float32", "bfloat16"):
            runs = [goals[f"test_goal[{shape}-V{vocabulary}-Vd{vocabulary}-{dtype}-{kind}]"] for kind in ("flat", "peaked")]
            for key in ("cpu_speedup", "cpu_over_reading"):
                low, high = sorted(run[key] for run in runs)
                cells.append(f"{low:.1f} to {high:.1f}")
        positions = shape.removeprefix("N7-T")
        yield BENCHMARKS, row(f"7 drafters, {positions} positions, vocabulary {vocabulary}", *cells)
    for each in load("cpu/target")["rows"]:
        ratios = (each["captured_ms"] / each["view_ms"], each["captured_median_ms"] / each["view_median_ms"])
        yield BENCHMARKS, row(each["batch"], each["tokens"], *ratios)


def _trees() -> Iterator[tuple[str, str]]:
    names = {"argmax": "chain of most likely tokens", "sampled:4,2,1,1,1": "4,2,1,1,1, samples", "chain": "chain, sampled"}
    for name, temperature in (("trees", 0), ("trees-sampled", 1)):
        for each in load(f"decoder/{name}")["rows"]:
            shape = names.get(each["value"], each["value"]) if temperature else each["value"]
            figures = [float(each[key]) for key in ("mat", "predicted", "realised", "times_first")]
            yield BENCHMARKS, row(temperature, shape, *figures)


def _zoo() -> Iterator[tuple[str, str]]:
    acceptance = load("zoo/acceptance")
    for domain, by_drafter in acceptance["emitted_per_round"].items():
        cells = [f"**{value:.2f}**" if name == domain else f"{value:.2f}" for name, value in by_drafter.items()]
        yield BENCHMARKS, row(domain, *cells)
    yield BENCHMARKS, f"{acceptance['own_expert_mat']:.2f}"


def _vllm() -> Iterator[tuple[str, str]]:
    rows = [each for each in load("vllm/official")["rows"] if not each["control"]]
    drafts = sum(each["drafts"]["vllm"] for each in rows)
    accepted = [sum(each["acceptance"]["vllm"][k] * each["drafts"]["vllm"] for each in rows) / drafts for k in range(5)]
    yield BENCHMARKS, f"All {sum(each['requests'] for each in rows)} texts and all {drafts:,} drafts are the same"
    yield BENCHMARKS, row("accepted tokens per draft, vLLM and HedgeSpec", *(f"{value:.3f}" for value in accepted))
    engines = load("vllm/engines")["engines"]
    names = {
        "plain": "without speculation", "ngram": "vLLM's `ngram` (1 to 3 tokens)",
        "fixed: generalist": "one drafter: the generalist's datastore", "fixed: lookup": "one drafter: our prompt lookup",
        "hedgespec": "HedgeSpec: six datastores and lookup", "hedgespec, throughput": "HedgeSpec, objective `throughput`",
    }  # fmt: skip
    for name, [run] in engines.items():
        tokens = [value for value in run["mat"].values() if value is not None]
        shown = [f"{value:.2f}" for value in tokens]
        cell = " / ".join(shown if len(set(shown)) > 1 else shown[:1])
        yield ENGINES, row(names[name], *run["speed"].values(), cell).replace("|  |", "| |")
    replay = load("vllm/replay")
    for pool, label in (("stores and lookup", "six datastores and lookup"), ("stores", "six datastores")):
        yield ENGINES, row(label, *(float(replay["hedgespec"][pool][each]) for each in ("0", "4", "8", "16", "32")))
