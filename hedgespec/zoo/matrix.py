"""The acceptance matrix: every drafter on every domain's held-out prompts, as numbers, a table and a heat map."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hedgespec.drafters import Drafter
from hedgespec.zoo import EXPERTS, load_prompts, replay

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEASURES = {
    "acceptance_prob": "mean 1 - TV at temperature 1, on the target's own samples",
    "greedy_agreement": "share of the target's greedy tokens that are the drafter's argmax",
    "emitted_per_round": "mean tokens a round at temperature 0",
}


@dataclass(frozen=True)
class HeldOut:
    """A held-out prompt with the target's continuation."""

    domain: str
    kind: str
    """"greedy", or "sampled" at temperature 1."""
    prompt_length: int
    tokens: list[int]


@torch.inference_mode()
def held_out_texts(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *,
                   prompts_per_domain: int = 10, new_tokens: int = 128,
                   report: Callable[[str], None] = print) -> list[HeldOut]:  # fmt: skip
    """The target's continuations of held-out prompts, a domain and kind a batch, kept in the file `path`."""
    if path.exists():
        return [HeldOut(**entry) for entry in json.loads(path.read_text())]
    tokenizer.padding_side = "left"
    texts = []
    for domain in EXPERTS:
        prompts = [prompt.text for prompt in load_prompts(domain)[:prompts_per_domain]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True).to(target.device)
        width = batch.input_ids.shape[1]
        for kind in ("greedy", "sampled"):
            torch.manual_seed(0)
            options = {"do_sample": True, "top_k": 0} if kind == "sampled" else {"do_sample": False}
            rows = target.generate(**batch, max_new_tokens=new_tokens, **options)
            for row, mask in zip(rows.tolist(), batch.attention_mask.tolist(), strict=True):
                prompt, new = row[width - sum(mask) : width], row[width:]
                if tokenizer.eos_token_id in new:
                    new = new[: new.index(tokenizer.eos_token_id) + 1]
                texts.append(HeldOut(domain, kind, len(prompt), prompt + new))
        report(f"{domain}: {len(prompts)} held-out prompts continued")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(text) for text in texts]))
    return texts


@torch.inference_mode()
def measure(target: PreTrainedModel, drafters: Sequence[Drafter], held_out: Sequence[HeldOut], draft_length: int = 5) -> dict:
    """{measure: {domain: {drafter: number}}} over the texts, and the draft length."""
    seen: dict[str, dict[str, list]] = {name: {domain: [] for domain in EXPERTS} for name in MEASURES}
    for one in held_out:
        if len(one.tokens) < one.prompt_length + 3:
            continue  # it ended before a drafter could say anything
        text = replay.read(target, torch.tensor(one.tokens, device=target.device), one.prompt_length, drafters)
        if one.kind == "sampled":
            seen["acceptance_prob"][one.domain].append(replay.teacher_forced(drafters, text, 1.0))
        else:
            seen["greedy_agreement"][one.domain].append(replay.teacher_forced(drafters, text, 0.0))
            rounds = [replay.fixed_rounds(drafter, text, draft_length) for drafter in drafters]
            seen["emitted_per_round"][one.domain].append(rounds)
    result: dict = {"draft_length": draft_length}
    for name, domains in seen.items():
        result[name] = {}
        for domain, parts in domains.items():
            if name == "emitted_per_round":
                means: Any = [np.mean(np.concatenate(rounds)) for rounds in zip(*parts, strict=True)]
            else:
                means = torch.cat(parts, 1).mean(1)
            result[name][domain] = {each.name: round(float(mean), 4) for each, mean in zip(drafters, means, strict=True)}
    return result


def table(result: dict) -> str:
    """The matrix as Markdown, the best of each domain in bold."""
    lines = []
    for measure_name, meaning in MEASURES.items():
        rows = result[measure_name]
        names = list(next(iter(rows.values())))
        at = f", K = {result['draft_length']}" if measure_name == "emitted_per_round" else ""
        lines += [
            f"{measure_name}: {meaning}{at}",
            "",
            "| domain | " + " | ".join(names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
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
