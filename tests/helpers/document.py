"""docs/compatibility.md, written from the lists that the tests go through. Run from `tests/`: `python -m helpers.document`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from helpers.architectures import ARCHITECTURES, REFUSED
from helpers.wrappers import WRAPPERS

PATH = Path(__file__).parents[2] / "docs" / "compatibility.md"
HEAD = """# Compatibility

Written by `python -m helpers.document` (run in `tests/`) from the lists that the tests go through; a test holds it current. Do
not edit it by hand.

"Same text" means: greedy decoding gives plain `generate`'s tokens, through `generate(custom_generate=...)` and
`Decoder.generate`. Whatever is not supported is refused by an error that names it, before the first token unless said
otherwise.

## Architectures

Shown by `tests/test_architectures.py`, with small random models: one row, a ragged batch and draft trees.

| architecture (`model_type`) | batches of different lengths | draft trees | note |
|---|---|---|---|
"""
ROWS = {
    "together": ("one forward for all rows", "yes"),
    "one by one": ("one row after another", "refused"),
    "unpadded": ("padding is refused", "refused"),
}
OTHERS = """
Other architectures of transformers are taken by the same rules. Code from outside transformers (remote code, subclasses,
adapters) is tried once with a short text, about ten forwards of at most 48 tokens when the first decoder for the model is made:
where several tokens in one forward are not the same as one after another the model is refused; where rows of different lengths
are not, rows are decoded one after another, without trees.

### Refused

| architecture | reason |
|---|---|
"""
TARGETS = """
### Properties of a target

Shown by `tests/test_positions.py`, `tests/test_plain_inputs.py` and `tests/test_target_logits.py`.

| property | what happens |
|---|---|
| texts past `max_position_embeddings`, rotary or ALiBi positions | same text |
| texts past a table of positions (GPT-2, OPT, GPT-J, BioGPT, ...) | `ContextError`, an `IndexError` as in plain decoding: before the first token if the text cannot end earlier, else where the table ends |
| a drafter whose own table ends earlier | it leaves the request with a warning; same text |
| rotary factors that follow the text's length (`longrope`, `dynamic`), Phi-3's second reading of the text | same text as `generate`'s for this batch; `prefill_chunk_size` is refused |
| `prepare_inputs_for_generation`, `_update_model_kwargs_for_generation` or `_prepare_position_ids_for_generation` overridden | same text if the inputs are the tokens, their positions and a mask, which is checked for every token; else refused: "got inputs_embeds from ..." |
| `_sample` or `_prefill` overridden | refused |
| NaN, +inf, or -inf throughout in the logits of a token that would be emitted | `TargetLogitsError`, a `RuntimeError`, that names the token and the row |
| no token allowed by the processors | `TargetLogitsError`, a `RuntimeError` as in plain sampling; plain greedy search takes token 0 |

## Wrappers

Shown by `tests/test_wrappers.py`. A model within `torch.compile` runs as it is, or captured with `DecodeConfig(compile=True)`.

| wrapper | result |
|---|---|
"""  # noqa: E501
OPTIONS = """
## Options of `generate`

Shown by `tests/test_compatibility.py`, with one row and with several.

| option | result | note |
|---|---|---|
"""


def text() -> str:
    """Returns the document."""
    rows = []
    for one in ARCHITECTURES:
        batches, trees = ROWS[one.rows]
        rows.append(f"| {one.name} | {batches} | {trees} | {one.note} |")
    parts = [HEAD, "\n".join(rows), "\n", OTHERS]
    parts += [f"| {name} | {reason} |\n" for name, reason in REFUSED.items()]
    parts += [TARGETS, *(f"| {one.name} | {_result(one.refused)} |\n" for one in WRAPPERS)]
    if importlib.util.find_spec("helpers.compatibility") is not None:
        from helpers.compatibility import OPTIONS as options

        parts += [OPTIONS, *(_option(one) for one in options)]
    return "".join(parts)


def _option(one) -> str:
    """Returns the row of one `helpers.compatibility.Option`."""
    message = f': "{one.message}"'.replace("|", "\\|").replace(".*", "... ") if one.message else ""
    return f"| {one.option} | {one.verdict}{message} | {' '.join(one.note.split())} |\n"


def _result(refused: str) -> str:
    return f'refused: "{refused}"' if refused else "same text"


if __name__ == "__main__":
    PATH.write_text(text())
