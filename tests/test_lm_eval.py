"""lm-evaluation-harness over an accelerated model: the results and the texts of the model alone.

Needs `lm-eval` (PyPI), which no extra of ours lists: `pip install lm-eval`, then `pytest -m slow tests/test_lm_eval.py`. The
tasks are two of local data, with stop strings of several tokens, whose criterion keeps a flag for every row of the batch.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

TASKS = {
    "capitals": (
        [("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Peru", "Lima"), ("the Republic of Poland", "Warsaw")],
        "Question: What is the capital of Norway?\nAnswer: Oslo\n\nQuestion: What is the capital of {{question}}?\nAnswer:",
        ["\n\n", "Question:"],
        12,
    ),
    "opposites": (
        [("hot", "cold"), ("long", "short"), ("a very bright day", "dark"), ("up", "down"), ("rich", "poor")],
        "Words and their opposites, one a line.\nblack: white\nsmall: large\n{{question}}:",
        ["\n", "."],
        12,
    ),
}


def write(folder, name: str):
    """A generative task in lm-eval's own format: a YAML file, and the data as lines of JSON."""
    pairs, prompt, until, most = TASKS[name]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"question": one, "answer": other}) + "\n" for one, other in pairs))
    (folder / f"{name}.yaml").write_text(
        json.dumps(
            {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test",
                "output_type": "generate_until",
                "doc_to_text": prompt,
                "doc_to_target": " {{answer}}",
                "generation_kwargs": {"until": until, "do_sample": False, "max_gen_toks": most},
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
                "num_fewshot": 0,
            }
        )
    )  # fmt: skip  (JSON is YAML)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_results_are_those_of_the_model_alone(tmp_path, monkeypatch, batch_size):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import hedgespec
    from hedgespec.zoo import NAMES

    zoo = hedgespec.load_zoo(NAMES[:1])
    for name in TASKS:
        write(tmp_path, name)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = []
    for accelerated in (False, True):
        if accelerated:
            hedgespec.accelerate(zoo.target, zoo.drafters)
        wrapped = HFLM(pretrained=zoo.target, tokenizer=zoo.tokenizer, batch_size=batch_size, max_length=512)
        result = lm_eval.simple_evaluate(
            wrapped, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True, confirm_run_unsafe_code=True
        )
        texts = {name: [sample["resps"] for sample in result["samples"][name]] for name in TASKS}
        scores = {name: result["results"][name]["exact_match,none"] for name in TASKS}
        found.append((texts, scores))
    assert found[0] == found[1]
    assert all(any(reply[0][0].strip() for reply in replies) for replies in found[0][0].values())
