"""The acceptance matrix: every head on every domain's held-out prompts, as numbers, a table and a heat map.

A drafter alone on a known text emits, in a round that starts with n known tokens, the tokens up to the first that is not
accepted, and one more. At temperature 0 a draft is accepted if it is the text's token. At temperature 1, given that the
text's token x was emitted, it was an accepted draft with probability min(1, q(x) / p(x)). So the expected number of rounds
follows exactly from one unrolled pass, without sampling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from hedgespec.drafters.eagle import EagleHead
from hedgespec.zoo.features import Features
from hedgespec.zoo.train import END, collate, domain_of, held_out_rows, span, unrolled_states

KINDS = ("greedy", "sampled")
MEANING = {"greedy": "temperature 0", "sampled": "temperature 1"}


def held_out_places(features: Features, per_domain: int) -> dict[tuple[str, str], list[int]]:
    """Indices of held-out rows by (domain, kind), the first `per_domain` of each by key; sampled ones at temperature 1."""
    found: dict[tuple[str, str], list[int]] = {}
    for place, row in sorted(held_out_rows(features.rows), key=lambda each: each[1].key):
        if row.temperature in (0.0, 1.0):
            places = found.setdefault((domain_of(row), KINDS[row.temperature > 0]), [])
            if len(places) < per_domain:
                places.append(place)
    return found


@torch.inference_mode()
def acceptance(
    head: EagleHead, features: Features, places: Sequence[int], draft_length: int, *, sampled: bool
) -> list[torch.Tensor]:
    """For each row, float32 [K, W]: the probability that the draft of depth s at window position w is accepted.

    Window position w predicts token `span(row)[0] + w + 2`. Depth s is valid from w = s on. A round whose first draft is at w
    has its drafts at (0, w), (1, w + 1), ...
    """
    device, vocabulary = head.fc.weight.device, head.draft_to_target
    rows = [features.rows[place] for place in places]
    batch = {key: value.to(device) for key, value in collate(rows, features.get(places)).items()}
    tokens, window, width = batch["tokens"], batch["window"], head.config.hidden_size
    dtype = head.fc.weight.dtype
    index = torch.arange(len(rows), device=device)[:, None]
    text = tokens[index, (window + 2).clamp(max=tokens.shape[1] - 1)]
    if vocabulary is None:
        known, place = torch.ones_like(text, dtype=torch.bool), text
    else:
        place = torch.searchsorted(vocabulary, text).clamp(max=len(vocabulary) - 1)
        known = vocabulary[place] == text
    if sampled:
        states = batch["states"][index, window + 1][..., -width:].float()
        output = features.llama.output[text]
        target_log_prob = (states * output).sum(-1) - batch["log_normalizer"][index, window + 1]
    feature = head.fuse(batch["states"][:, :-1, :-width].to(dtype))
    made = []
    for hidden in unrolled_states(head, tokens[:, 1:], feature, draft_length, window):
        logits = head.logits(hidden).float()
        if sampled:
            log_prob = logits.gather(-1, place[..., None])[..., 0] - logits.logsumexp(-1)
            made.append((log_prob - target_log_prob).clamp(max=0).exp() * known)
        else:
            made.append(((logits.argmax(-1) == place) & known).float())
    stacked = torch.stack(made, 1).cpu()
    return [stacked[number, :, : span(row)[1] - span(row)[0]] for number, row in enumerate(rows)]


def rounds(accept: np.ndarray, first: int, start: int, stop: int) -> tuple[float, np.ndarray]:
    """Expected rounds that emit tokens start + 1 to stop - 1 of a text, and the expected accepted drafts by depth, [K].

    Args:
        accept: [K, W], as `acceptance` returns it.
        first: the position of window position 0.
        start, stop: an answer's tokens. Its first token comes with the prompt and takes no round.
    """
    depths = len(accept)
    expected = np.zeros(stop + depths + 2)
    accepted = np.zeros((stop + depths + 2, depths))
    for known in range(stop - 1, start, -1):
        reach, total, by_depth = 1.0, 1.0, np.zeros(depths)
        room = min(depths, stop - known - 1)
        for depth in range(room):
            chance = float(accept[depth, known - 2 - first + depth])
            total += reach * (1 - chance) * expected[known + depth + 1]
            by_depth += reach * (1 - chance) * accepted[known + depth + 1]
            reach *= chance
            by_depth[depth] += reach
        total += reach * expected[known + room + 1]
        by_depth += reach * accepted[known + room + 1]
        expected[known], accepted[known] = total, by_depth
    return expected[start + 1], accepted[start + 1]


def tokens_per_round(head: EagleHead, features: Features, places: Sequence[int], draft_length: int = 5, *, sampled: bool,
                     batch_tokens: int = 4096) -> dict:  # fmt: skip
    """Tokens a round of one head alone over rows, and its acceptance by depth given that the depth was reached.

    Returns: {"tokens_per_round", "acceptance_by_depth" of length K, "by_row": [tokens, rounds] of each row}.
    """
    by_row, reached = [], np.zeros(draft_length + 1)
    order = sorted(places, key=lambda place: len(features.rows[place].tokens))
    while order:
        count = max(1, batch_tokens // len(features.rows[order[min(len(order), 16) - 1]].tokens))
        group, order = order[:count], order[count:]
        for place, accept in zip(group, acceptance(head, features, group, draft_length, sampled=sampled), strict=True):
            row, emitted, needed = features.rows[place], 0, 0.0
            for start, stop in row.answers(END):
                if stop - start < 2:
                    continue
                expected, by_depth = rounds(accept.numpy(), span(row)[0], start, stop)
                emitted += stop - start - 1
                needed += expected
                reached += np.concatenate([[expected], by_depth])
            by_row.append([emitted, round(needed, 3)])
    total = np.array(by_row, dtype=float).reshape(-1, 2).sum(0)
    share = reached[1:] / np.maximum(reached[:-1], 1e-9)
    return {
        "tokens_per_round": round(float(total[0] / max(total[1], 1e-9)), 4),
        "acceptance_by_depth": [round(float(value), 4) for value in share],
        "by_row": by_row,
    }


def measure(heads: Sequence[EagleHead], features: Features, *, per_domain: int = 40, draft_length: int = 5,
            report: Callable[[str], None] = lambda line: None) -> dict:  # fmt: skip
    """{"tokens_per_round": {kind: {domain: {head: figure}}}, "acceptance_by_depth": the same with lists, "rows": counts}."""
    result: dict = {"draft_length": draft_length, "tokens_per_round": {}, "acceptance_by_depth": {}, "rows": {}}
    for (domain, kind), places in sorted(held_out_places(features, per_domain).items()):
        result["rows"].setdefault(kind, {})[domain] = len(places)
        for head in heads:
            found = tokens_per_round(head, features, places, draft_length, sampled=kind == "sampled")
            for name in ("tokens_per_round", "acceptance_by_depth"):
                result[name].setdefault(kind, {}).setdefault(domain, {})[head.name] = found[name]
        report(f"{domain}, {MEANING[kind]}: {len(places)} rows")
    return result


def table(result: dict) -> str:
    """The matrix as Markdown, the best of each domain in bold."""
    lines = []
    for kind, rows in result["tokens_per_round"].items():
        names = list(next(iter(rows.values())))
        lines += [f"Tokens a round at {MEANING[kind]}, K = {result['draft_length']}", "",
                  "| domain (rows) | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]  # fmt: skip
        for domain, row in rows.items():
            best = max(row.values())
            cells = [f"**{row[name]:.2f}**" if row[name] == best else f"{row[name]:.2f}" for name in names]
            lines.append(f"| {domain} ({result['rows'][kind][domain]}) | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def heat_map(result: dict, path: Path) -> None:
    """One panel a temperature, domains down, heads across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = result["tokens_per_round"]
    figure, panels = pyplot.subplots(1, len(figures), figsize=(6.5 * len(figures), 4.4), layout="constrained", squeeze=False)
    for panel, (kind, rows) in zip(panels[0], figures.items(), strict=True):
        domains, names = list(rows), list(next(iter(rows.values())))
        values = np.array([[rows[domain][name] for name in names] for domain in domains])
        panel.imshow(values, cmap="viridis", aspect="auto")
        panel.set_xticks(range(len(names)), names, rotation=45, ha="right")
        panel.set_yticks(range(len(domains)), domains)
        middle = (values.min() + values.max()) / 2
        for (row, column), value in np.ndenumerate(values):
            panel.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > middle else "white")
        panel.set_title(f"tokens a round, {MEANING[kind]}, K = {result['draft_length']}")
    figure.savefig(path)
    pyplot.close(figure)


def write(result: dict, folder: Path) -> None:
    """matrix.json, matrix.md and matrix.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "matrix.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "matrix.md").write_text(table(result))
    heat_map(result, folder / "matrix.svg")
