"""The acceptance matrix: every drafter on every domain's held-out prompts, as numbers, a table and a heat map."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from hedgespec.drafters import Drafter
from hedgespec.zoo import EXPERTS, load_prompts, replay

MEASURES = {
    "acceptance_prob": "mean 1 - TV at temperature 1, on the target's own samples",
    "greedy_agreement": "share of the target's greedy tokens that are the drafter's argmax",
    "emitted_per_round": "mean tokens a round at temperature 0",
}


@torch.inference_mode()
def continuations(target, tokenizer, drafters: Sequence[Drafter], *, prompts_per_domain: int, new_tokens: int,
                  report: Callable[[str], None] = print) -> dict[str, dict[str, list[replay.Text]]]:  # fmt: skip
    """Held-out texts by domain: "greedy" and "sampled" (temperature 1, seeded) continuations by the target."""
    texts = {}
    for domain in EXPERTS:
        texts[domain] = {"greedy": [], "sampled": []}
        for number, prompt in enumerate(load_prompts(domain)[:prompts_per_domain]):
            ids = tokenizer(prompt.text, return_tensors="pt").to(target.device)
            for kind in ("greedy", "sampled"):
                torch.manual_seed(number)
                tokens = target.generate(**ids, max_new_tokens=new_tokens, do_sample=kind == "sampled", top_k=0)[0]
                texts[domain][kind].append(replay.read(target, tokens, ids.input_ids.shape[1], drafters))
        report(f"{domain}: {prompts_per_domain} held-out prompts continued")
    return texts


def measure(drafters: Sequence[Drafter], texts: dict[str, dict[str, list[replay.Text]]], draft_length: int = 5) -> dict:
    """{measure: {domain: {drafter: number}}} over the texts, and the draft length."""
    result: dict = {name: {} for name in MEASURES} | {"draft_length": draft_length}
    for domain, kinds in texts.items():
        prob = torch.cat([replay.teacher_forced(drafters, text, 1.0) for text in kinds["sampled"]], 1).mean(1)
        agreement = torch.cat([replay.teacher_forced(drafters, text, 0.0) for text in kinds["greedy"]], 1).mean(1)
        rounds = [np.concatenate([replay.fixed_rounds(drafter, text, draft_length) for text in kinds["greedy"]])
                  for drafter in drafters]  # fmt: skip
        for name, values in (("acceptance_prob", prob), ("greedy_agreement", agreement),
                             ("emitted_per_round", [emitted.mean() for emitted in rounds])):  # fmt: skip
            result[name][domain] = {drafter.name: round(float(v), 4) for drafter, v in zip(drafters, values, strict=True)}
    return result


def table(result: dict) -> str:
    """The matrix as Markdown, the best of each domain in bold."""
    lines = []
    for measure_name, meaning in MEASURES.items():
        rows = result[measure_name]
        names = list(next(iter(rows.values())))
        at = f", K = {result['draft_length']}" if measure_name == "emitted_per_round" else ""
        lines += [f"{measure_name}: {meaning}{at}", "", "| domain | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for domain, row in rows.items():
            best = max(row.values())
            cells = [f"**{row[name]:.2f}**" if row[name] == best else f"{row[name]:.2f}" for name in names]
            lines.append(f"| {domain} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def heat_map(result: dict, path: Path) -> None:
    """One panel a measure, domains down, drafters across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(MEASURES), figsize=(15, 4.2), layout="constrained")
    for panel, name in zip(panels, MEASURES, strict=True):
        domains, names = list(result[name]), list(next(iter(result[name].values())))
        values = np.array([[result[name][domain][drafter] for drafter in names] for domain in domains])
        panel.imshow(values, cmap="viridis", aspect="auto")
        panel.set_xticks(range(len(names)), names, rotation=45, ha="right")
        panel.set_yticks(range(len(domains)), domains)
        middle = (values.min() + values.max()) / 2
        for (row, column), value in np.ndenumerate(values):
            panel.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > middle else "white")
        panel.set_title(name)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(result: dict, folder: Path) -> None:
    """acceptance.json, acceptance.md and acceptance.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "acceptance.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "acceptance.md").write_text(table(result))
    heat_map(result, folder / "acceptance.png")
