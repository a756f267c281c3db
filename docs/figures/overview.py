"""Draws docs/figures/overview.svg, the figure of the README.

    python docs/figures/overview.py record    # replays recorded texts and writes docs/figures/weights.json; loads no model
    python docs/figures/overview.py           # draws overview.svg from weights.json and bench/results/zoo/demo.json

Left: the learner's weights over a stream of twelve texts of six domains, one stacked area for each drafter. Every text starts
with a fresh learner. Right: tokens per round in each domain, from the run of `make demo` that is kept in demo.json.

The file holds no date and no random ids, so drawing it again gives the same bytes. The background is transparent and the text
has a middle grey that can be read on white and on black.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WEIGHTS = HERE / "weights.json"
DEMO = ROOT / "bench" / "results" / "zoo" / "demo.json"
TRACES = ROOT / "bench" / "results" / "experiments" / "traces"
SVG = HERE / "overview.svg"

NUM_TEXTS = 12
WIDTH, HEIGHT = 880, 272
TEXT, LINE = "#7a828c", "#9aa1aa"
COLOURS = {
    "python": "#3b82c4", "sql": "#e08a1e", "math": "#3fa35a", "scripture": "#c9504a", "legal": "#8f6bc0", "french": "#2aa7a7",
    "generalist": "#a3a9b2",
}  # fmt: skip
BARS = (("generalist head", "mat_generalist", "#a3a9b2"), ("HedgeSpec", "mat", "#3b82c4"),
        ("best head in hindsight", "mat_best_fixed", "#3fa35a"))  # fmt: skip


def record() -> None:
    """Replays the default configuration over the first recorded greedy texts and writes the weights of every round."""
    from hedgespec.config import DecodeConfig
    from hedgespec.experiments.recording import Trace
    from hedgespec.experiments.replay import replay

    texts = []
    for path in sorted((TRACES / "greedy").glob("*.npz"))[:NUM_TEXTS]:
        trace = Trace.load(path)
        weights = replay(trace, DecodeConfig()).weights
        texts.append({"domain": trace.domain, "weights": [[round(float(w), 3) for w in row] for row in weights]})
    content = {"drafters": list(trace.drafters), "texts": texts}
    WEIGHTS.write_text(json.dumps(content, separators=(",", ":")).replace('{"domain"', '\n{"domain"') + "\n")


def text(x: float, y: float, words: str, *, size: int = 12, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{TEXT}">{words}</text>'
    )


def draw_weights(left: float, top: float, width: float, height: float, content: dict) -> list[str]:
    """Returns the stacked areas of the weights, one band a drafter, rounds from left to right."""
    drafters, texts = content["drafters"], content["texts"]
    rows = [row for each in texts for row in each["weights"]]
    step = width / len(rows)
    parts = [text(left, top - 26, "Weights of seven drafters over twelve texts of six domains", size=13, weight="bold")]
    below = [0.0] * len(rows)
    for index, name in enumerate(drafters):
        above = [min(1.0, low + row[index]) for low, row in zip(below, rows)]
        bands = [(round(high, 2), round(low, 2)) for high, low in zip(above, below)]
        path, first = [], 0
        for place in range(1, len(bands) + 1):
            if place < len(bands) and bands[place] == bands[first]:
                continue  # one rectangle for as many rounds as have the same weight
            high, low = bands[first]
            if high > low:
                x, y = left + first * step, top + height * (1 - high)
                path.append(f"M{x:.1f} {y:.1f}h{(place - first) * step:.1f}v{height * (high - low):.1f}H{x:.1f}z")
            first = place
        parts.append(f'<path d="{"".join(path)}" fill="{COLOURS[name]}"><title>{name}</title></path>')
        below = above
    start = 0
    for each in texts:
        end = start + len(each["weights"])
        middle = left + (start + end) / 2 * step
        if (end - start) * step > 6.0 * len(each["domain"]):  # else it would run into its neighbours; the legend names it
            parts.append(text(middle, top - 7, each["domain"], size=10, anchor="middle"))
        if start:
            x = left + start * step
            parts.append(
                f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + height}" stroke="#ffffff" stroke-width="1.5"/>'
            )
        start = end
    parts.append(text(left - 6, top + 9, "1", anchor="end"))
    parts.append(text(left - 6, top + height, "0", anchor="end"))
    parts.append(text(left + width, top + height + 17, f"{len(rows)} rounds, left to right", size=11, anchor="end"))
    x = left
    for name in drafters:
        parts.append(f'<rect x="{x:.1f}" y="{top + height + 32}" width="10" height="10" fill="{COLOURS[name]}"/>')
        parts.append(text(x + 14, top + height + 41, name, size=11))
        x += 24 + 6.4 * len(name)
    return parts


def draw_bars(left: float, top: float, width: float, height: float, demo: dict) -> list[str]:
    """Returns one group of three bars for each domain: tokens per round."""
    parts = [text(left, top - 26, "Tokens per round", size=13, weight="bold")]
    most = 3.0
    for tokens in (1, 2, 3):
        y = top + height * (1 - tokens / most)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="{LINE}" stroke-width="0.6"/>')
        parts.append(text(left - 6, y + 4, str(tokens), size=11, anchor="end"))
    group = width / len(demo["domains"])
    bar = group * 0.26
    for place, (domain, figures) in enumerate(demo["domains"].items()):
        for number, (label, key, colour) in enumerate(BARS):
            tall = height * figures[key] / most
            x = left + place * group + group * 0.1 + number * bar
            parts.append(
                f'<rect x="{x:.1f}" y="{top + height - tall:.1f}" width="{bar - 1:.1f}" height="{tall:.1f}" fill="{colour}">'
                f"<title>{domain}, {label}: {figures[key]:.2f}</title></rect>"
            )
        parts.append(text(left + (place + 0.5) * group, top + height + 15, domain, size=10, anchor="middle"))
    parts.append(f'<line x1="{left}" y1="{top + height}" x2="{left + width}" y2="{top + height}" stroke="{LINE}"/>')
    x = left - 24
    for label, _, colour in BARS:
        parts.append(f'<rect x="{x:.1f}" y="{top + height + 32}" width="10" height="10" fill="{colour}"/>')
        parts.append(text(x + 14, top + height + 41, label, size=11))
        x += 24 + 6.2 * len(label)
    return parts


def svg() -> str:
    """Returns the figure as SVG text."""
    weights, demo = json.loads(WEIGHTS.read_text()), json.loads(DEMO.read_text())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>The learner's weights over a stream of texts, and tokens per round by domain</title>",
        *draw_weights(24, 50, 486, 170, weights),
        *draw_bars(556, 50, 312, 170, demo),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["record"]:
        record()
    elif not sys.argv[1:]:
        SVG.write_text(svg())
    else:
        raise SystemExit("usage: python docs/figures/overview.py [record]")
