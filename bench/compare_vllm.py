"""The zoo's exported heads in vLLM and in HedgeSpec: `python bench/compare_vllm.py FOLDER --json FILE --table FILE`.

FOLDER holds an exported head by each name of the zoo, in the official or the speculators layout, as `hedgespec zoo export
FOLDER` writes them. Each is by itself the drafter of SmolLM2 in float32, in vLLM with `method: eagle3` and in HedgeSpec's
decoder, over the same held-out prompts of the mixed stream. What the engines accept at each position of the draft must be the
same: this is the outside check that the layouts mean what others take them to mean (layers, norms, positions, vocabulary).

What is compared is accepted tokens at position k a draft. An engine's own counters differ at the end of a text: HedgeSpec
drafts no more than there is room for, vLLM drafts and counts all and cuts the text afterwards. So a round counts if the whole
draft and the token after it had room when it began, and if the text did not end in it; in both engines alike. vLLM's rounds are
those it reports of each request (`per_request_spec_decode_metrics`), and their sums must be those of `LLM.get_metrics()`.

At temperature 0 the texts have to be the same up to ties of the target's logits, and where they are the rounds are, too, up to
ties of the head's: the run fails if more than a share of `TIED` differ. At other temperatures the same is true of distributions
only. Every difference comes with its standard error, where a prompt in both engines is one observation; the run fails beyond
`MOST` of them. Mode "argmax" proposes the most probable token whatever the temperature, which is what vLLM does unless told
otherwise; "sampled" samples from the head, in vLLM `draft_sample_method: probabilistic`.

`--control` names a head that vLLM is also given, at temperature 0, with all its layers one too late, which costs it little.
The run fails if it is not told apart.

vLLM runs in processes of its own (bench/vllm_worker.py), with `--vllm-python` if it lives in another environment.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from interleave import TIE, PromptBatch, environment_info, gap_between, positive, prompt_batches
from rich.console import Console
from table import markdown
from transformers.utils import logging as transformers_logging

import hedgespec
from hedgespec.config import CHOICES, DecodeConfig
from hedgespec.decoder import Decoder, eos_of
from hedgespec.zoo import NAMES, load_prompts, load_zoo
from hedgespec.zoo.target import target_path

MOST = 4.0
"""Standard errors that a difference may have; a run looks at dozens."""
TIED = 0.1
"""Share of equal greedy texts whose rounds may differ."""
LAYERS = "eagle_aux_hidden_state_layer_ids"
PROPOSALS = {"argmax": "greedy", "sampled": "probabilistic"}
"""What vLLM calls a `mode` of HedgeSpec."""


def run_vllm(folder: Path, batches: Sequence[PromptBatch], temperatures: Sequence[float], options: argparse.Namespace) -> dict:
    """What bench/vllm_worker.py says of the head in `folder`."""
    job = {
        "target": str(target_path()),
        "head": str(folder.resolve()),
        "prompts": [ids[mask.bool()].tolist() for batch in batches for ids, mask in zip(batch.ids, batch.mask)],
        "draft_length": options.draft_length,
        "max_new_tokens": options.max_new_tokens,
        "batch": options.batch,
        "drafting": PROPOSALS[options.mode],
        "runs": [{"temperature": temperature, "seed": options.seed} for temperature in temperatures],
    }
    with tempfile.TemporaryDirectory() as scratch:
        asked, told = Path(scratch) / "job.json", Path(scratch) / "result.json"
        asked.write_text(json.dumps(job))
        command = [options.vllm_python, str(Path(__file__).with_name("vllm_worker.py")), str(asked), str(told)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"vLLM failed with {folder}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return json.loads(told.read_text())


def run_hedgespec(decoder: Decoder, batches: Sequence[PromptBatch], max_new_tokens: int, temperature: float) -> list[dict]:
    """The same of HedgeSpec: tokens, whether the text stopped by itself, and by round how many drafted tokens were accepted."""
    requests, ends = [], eos_of(decoder.target)
    for batch in batches:
        out = decoder.generate(
            batch.ids, attention_mask=batch.mask, max_new_tokens=max_new_tokens, temperature=temperature, seed=batch.seed
        )
        for row, stats in zip(out.sequences, out.stats):
            assert not stats.failures, stats.failures
            tokens = row[batch.ids.shape[1] :][: stats.emitted_tokens].tolist()
            accepted = [emitted - 1 for emitted in stats.emitted_by_round]
            requests.append({"tokens": tokens, "stopped": tokens[-1] in ends, "accepted": accepted})
    return requests


def whole_rounds(request: dict, draft_length: int, max_new_tokens: int) -> list[int]:
    """Accepted tokens of the rounds that count: there was room for all of it, and the text did not end in it."""
    accepted, left, rounds = request["accepted"], max_new_tokens - 1, []
    for count in accepted[: len(accepted) - request["stopped"]]:
        if left < draft_length + 1:
            break
        rounds.append(count)
        left -= count + 1
    if not request["stopped"]:
        assert len(request["tokens"]) == max_new_tokens, "a text ended before its time"
    assert all(drafted == draft_length for drafted in request.get("drafted", [])[: len(rounds)])
    return rounds


def tallies(requests: Sequence[Sequence[int]], draft_length: int) -> np.ndarray:
    """By request: drafts, and how many had their first, second ... token accepted; int64 [n, 1 + K]."""
    rows = [[len(rounds)] + [sum(count > k for count in rounds) for k in range(draft_length)] for rounds in requests]
    return np.asarray(rows, dtype=np.int64)


def difference(theirs: np.ndarray, ours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of acceptance by position, theirs less ours, and its standard error with requests as pairs; float64 [K] each."""
    rates, influence = [], []
    for tally in (theirs, ours):
        drafts = tally[:, 0].sum()
        rates.append(tally[:, 1:].sum(0) / drafts)
        influence.append((tally[:, 1:] - rates[-1] * tally[:, :1]) / drafts)
    spread = influence[0] - influence[1]  # of a ratio of sums, to the first order; its mean is 0
    return rates[0] - rates[1], np.sqrt((spread**2).sum(0) * len(spread) / (len(spread) - 1))


def compare(theirs: list[dict], ours: list[dict], batches: Sequence[PromptBatch], target, temperature: float, options) -> dict:
    """Figures of one head at one temperature; at 0 with how many texts and rounds are the same, and how far logits are apart
    where texts begin to differ."""
    rounds = [
        [whole_rounds(request, options.draft_length, options.max_new_tokens) for request in requests]
        for requests in (theirs, ours)
    ]
    row = figures_of(*(tallies(requests, options.draft_length) for requests in rounds))
    if temperature > 0:
        return row
    prompts = [ids[mask.bool()] for batch in batches for ids, mask in zip(batch.ids, batch.mask)]
    pairs = [(prompt, own["tokens"], other["tokens"]) for prompt, own, other in zip(prompts, ours, theirs)]
    equal = [own == other for _, own, other in pairs]
    return row | {
        "same_texts": sum(equal),
        "same_rounds": sum(one == other for same, one, other in zip(equal, *rounds) if same),
        "gaps": [gap_between(target, *pair) for same, pair in zip(equal, pairs) if not same],
    }


def figures_of(theirs: np.ndarray, ours: np.ndarray) -> dict:
    """Acceptance by position from the tallies of both engines, and the tallies."""
    engines = {"vllm": theirs, "hedgespec": ours}
    apart, error = difference(theirs, ours)
    return {
        "requests": len(theirs),
        "drafts": {engine: int(tally[:, 0].sum()) for engine, tally in engines.items()},
        "acceptance": {engine: (tally[:, 1:].sum(0) / tally[:, 0].sum()).tolist() for engine, tally in engines.items()},
        "difference": apart.tolist(),
        "standard_error": error.tolist(),
        "tallies": {engine: tally.tolist() for engine, tally in engines.items()},
    }


def all_heads(rows: list[dict]) -> dict:
    """The heads at one temperature as one row; a prompt with all of them is one observation."""
    whole = figures_of(*(sum(np.asarray(row["tallies"][engine]) for row in rows) for engine in ("vllm", "hedgespec")))
    counts = {key: sum(row[key] for row in rows) for key in ("same_texts", "same_rounds", "requests") if key in rows[0]}
    return whole | counts | {"head": "all", "layout": rows[0]["layout"], "temperature": rows[0]["temperature"]}


def standard_errors(row: dict) -> list[float]:
    """Every difference in units of its standard error; no difference is 0."""
    pairs = zip(row["difference"], row["standard_error"])
    return [0.0 if apart == 0 else apart / error if error > 0 else float("inf") for apart, error in pairs]


def layout_of(head: Path) -> str:
    config = json.loads((head / "config.json").read_text())
    return "speculators" if "speculators_model_type" in config else "official"


def one_layer_late(head: Path, folder: Path) -> Path:
    """A copy of an exported head that says it reads the layers after its own."""
    copy = Path(shutil.copytree(head, folder / head.name))
    config = json.loads((copy / "config.json").read_text())
    for holder in (config, config.get("eagle_config", {})):
        if LAYERS in holder:
            holder[LAYERS] = [layer + 1 for layer in holder[LAYERS]]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def table(rows: list[dict], draft_length: int) -> str:
    """Returns a Markdown table: acceptance by position in vLLM and in HedgeSpec, and the difference in standard errors."""
    head = ["head", "layout", "temperature", "drafts vLLM", "drafts HedgeSpec", "same texts", "same rounds"]
    lines = []
    for row in rows:
        cells = [row["head"], row["layout"], f"{row['temperature']:g}", row["drafts"]["vllm"], row["drafts"]["hedgespec"]]
        greedy = "same_texts" in row
        cells += [f"{row['same_texts']} of {row['requests']}", f"{row['same_rounds']} of these"] if greedy else ["", ""]
        engines = zip(row["acceptance"]["vllm"], row["acceptance"]["hedgespec"], standard_errors(row))
        lines.append(cells + [f"{theirs:.3f} {ours:.3f} ({errors:+.1f})" for theirs, ours, errors in engines])
    return markdown([*head, *(f"position {k + 1}" for k in range(draft_length))], lines).rstrip()


def page(figures: dict) -> str:
    """The table with what it takes to read and repeat it."""
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items() if version)
    theirs = ", ".join(f"{name} {version}" for name, version in figures["vllm_versions"].items())
    rows, length = [row for row in figures["rows"] if not row["control"]], figures["draft_length"]
    late = [row for row in figures["rows"] if row["control"]]
    if len({row["head"] for row in rows}) > 1:
        rows += [all_heads([row for row in rows if row["temperature"] == one]) for one in figures["temperatures"]]
    return "\n\n".join([
        "# The zoo's heads in vLLM and in HedgeSpec",
        f"{figures['date']}, `{figures['command']}`; {figures['machine']['device']}, float32, {figures['machine']['threads']} "
        f"threads, mode {figures['mode']}. HedgeSpec with {versions}. vLLM with {theirs}"
        + ("; its sampling above temperature 0 is mended, see bench/vllm_sampling.py." if figures["mended"] else "."),
        "By position of the draft: accepted tokens a draft in vLLM, in HedgeSpec, and how many standard errors they are apart. "
        "Rounds in which a text ends are left out of both.",
        table(rows, length),
        *(["The control: vLLM is told of layers one later than the head was trained on.", table(late, length)] * bool(late)),
    ]) + "\n"  # fmt: skip


def faults(rows: list[dict]) -> list[str]:
    found = []
    for row in rows:
        name, worst = f"{row['head']} at {row['temperature']:g}", max(map(abs, standard_errors(row)))
        if max(row.get("gaps", ()), default=0) > TIE:  # the control's, too: a text is the target's whatever the drafter
            found.append(f"{name}: texts differ where logits are {max(row['gaps']):.0e} apart")
        others = row["same_texts"] - row["same_rounds"] if row["temperature"] == 0 else 0
        same = others <= TIED * row["requests"] and worst <= MOST
        if same and row["control"]:
            found.append(f"{name}: layers one late make no difference")
        if not same and not row["control"]:
            found.append(f"{name}: {others} texts have other rounds, acceptance is {worst:.1f} standard errors apart")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of exported heads, each in a folder by its name")
    parser.add_argument("--heads", nargs="+", choices=NAMES, default=list(NAMES), help="default all")
    parser.add_argument("--control", choices=NAMES, help="of --heads; default none")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], metavar="T", help="default 0 1")
    parser.add_argument("--mode", choices=CHOICES["mode"], default="argmax", help="default argmax, as in vLLM")
    parser.add_argument("--draft-length", type=positive, default=5, help="default 5")
    parser.add_argument("--prompts", type=positive, default=24, help="default 24")
    parser.add_argument("--max-new-tokens", type=positive, default=80, help="of each text, default 80")
    parser.add_argument("--batch", type=positive, default=6, help="texts at a time, default 6")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt")
    parser.add_argument("--vllm-python", default=sys.executable, metavar="COMMAND", help="one that has vLLM, default this one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where figures go")
    parser.add_argument("--table", type=Path, metavar="FILE", help="where the table goes, Markdown")
    options = parser.parse_args()
    if options.prompts < 2:
        parser.error("--prompts: expected at least 2, of one there is no standard error")
    if options.control is not None and (options.control not in options.heads or 0 not in options.temperatures):
        parser.error("--control: expected one of --heads, and 0 among --temperatures")
    for name in options.heads:
        if not (options.folder / name / "config.json").is_file():
            parser.error(f"folder: expected an exported head in {options.folder / name}, found none")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console()
    zoo = load_zoo(options.heads)
    batches = prompt_batches(zoo, load_prompts()[: options.prompts], options.batch, options.seed)
    figures = {
        **environment_info(zoo.target), "draft_length": options.draft_length, "mode": options.mode,
        "max_new_tokens": options.max_new_tokens, "batch": options.batch, "temperatures": options.temperatures,
        "domains": [prompt.domain for batch in batches for prompt in batch.prompts], "rows": [],
    }  # fmt: skip
    figures["versions"]["hedgespec"] = hedgespec.__version__  # it may be on the path without being installed
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        for drafter in zoo.drafters:
            head = options.folder / drafter.name
            told = [run_vllm(head, batches, options.temperatures, options)]
            if drafter.name == options.control:
                told.append(run_vllm(one_layer_late(head, Path(scratch)), batches, [0.0], options))
            figures |= {"vllm_versions": told[0]["versions"], "mended": told[0]["mended"]}
            decoder = Decoder(zoo.target, [drafter], DecodeConfig(options.draft_length, proposal=options.mode, learner="fixed"))
            for temperature in options.temperatures:
                ours = run_hedgespec(decoder, batches, options.max_new_tokens, temperature)
                for control, result in enumerate(told):
                    for run in result["runs"]:
                        if run["temperature"] != temperature:
                            continue
                        row = {"head": drafter.name, "layout": layout_of(head), "temperature": temperature}
                        row |= {"control": bool(control), "load_seconds": result["load_seconds"]}
                        row |= compare(run["requests"], ours, batches, zoo.target, temperature, options)
                        figures["rows"].append(row)
                        console.print(table([row], options.draft_length).splitlines()[-1], soft_wrap=True)
            if options.json is not None:
                options.json.write_text(json.dumps(figures, indent=1) + "\n")
            if options.table is not None:
                options.table.write_text(page(figures))
    for fault in (found := faults(figures["rows"])):
        console.print(fault)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
