"""Collecting the target's answers: prompts, sides, filters, resuming. The target is scripted; a slow test uses the real one."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import pytest
from filelock import FileLock
from rich.console import Console

from hedgespec.errors import ZooError
from hedgespec.zoo import collect, shards, sources
from hedgespec.zoo.shards import Journal, Row
from hedgespec.zoo.sources import DOMAINS, SOURCES, Prompt, Seen

# --- the table and the filters --------------------------------------------------------------------------------------


def test_the_table_is_whole():
    assert len(sources.by_name()) == len(SOURCES)
    assert {source.domain for source in SOURCES} == set(DOMAINS) == set(sources.GOALS)
    for domain in DOMAINS:
        table = [source for source in SOURCES if source.domain == domain]
        assert sum(source.share for source in table) == pytest.approx(1)
        assert any(source.kind != "file" for source in table), "a domain must not need files"
    for source in SOURCES:
        assert source.kind in ("self", "file", "passage", "template")
        assert source.licence and source.origin
        assert all("{}" in wrap for wrap in source.wrap)
    with pytest.raises(ZooError, match="domain: expected one of chat, python, .*, got 'poetry'"):
        sources.check_domains(("chat", "poetry"))


def test_sides_are_by_the_normalised_prompt():
    texts = [f"What is {number} times {number + 1}?" for number in range(4000)]
    sides = [sources.side_of(text) for text in texts]
    assert 0.035 < sides.count("held_out") / 4000 < 0.065
    assert all(sources.side_of(f"  {text.upper()} !") == side for text, side in zip(texts[:200], sides))
    assert Prompt("a", "Hello,  World", "train", "b").key == Prompt("c", "hello world!", "train", "d").key


def test_near_duplicates_are_found_and_common_openings_are_not():
    seen = Seen()
    seen.add("Write a Python function that sorts a list of numbers in place without using sort", "held_out")
    close = "Write a Python function that sorts a list of numbers in place, without using sorted"
    assert seen.similar(close)
    assert seen.similar(close, "held_out") and not seen.similar(close, "train")
    assert not seen.similar("Write a short poem about a lighthouse keeper and the sea")
    diseases = ["lupus", "asthma", "gout", "measles", "flu", "malaria", "mumps", "rabies", "scurvy", "polio", "cholera",
                "typhus", "dengue", "anthrax", "tetanus"]  # fmt: skip
    for name in diseases:
        seen.add(f"what are the symptoms of {name}", keep=not seen.similar(f"what are the symptoms of {name}"))
    assert not seen.similar("what are the symptoms of plague")
    assert seen.similar("what are the symptoms of tetanus")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("chat-self", "How do I bake bread at home?", None),
        ("chat-self", "Hello you", "length"),
        ("chat-self", "word " * 400, "length"),
        ("chat-self", "What is <|im_start|> good for in a template?", "special tokens"),
        ("chat-self", "the cat sat on the mat " * 6, "repeats itself"),
        ("chat-self", "Где находится ближайшая станция метро сегодня", "language"),
        ("sql-self", "How do I bake bread at home?", "off its domain"),
        ("sql-self", "How do I join two tables by date?", None),
        ("math-self", "John has three apples and eats one", "off its domain"),
        ("math-self", "John has 3 apples and eats 1. How many are left?", None),
    ],
)
def test_filters(name, text, reason):
    assert sources.fault(sources.by_name()[name], text) == reason


def test_prompt_files(tmp_path):
    source, told = sources.by_name()["gsm8k"], []
    (tmp_path / "math.jsonl").write_text(
        '{"prompt": "What is 2 + 2?", "licence": "L"}\nnot json\n{"prompt": 3}\n\n[1]\n{"prompt": " What is 3 + 3? "}\n'
    )
    found = dict(sources.file_prompts(source, tmp_path, "", told.append))
    assert found == {"What is 2 + 2?": "L", "What is 3 + 3?": "MIT"}
    assert told == ["math.jsonl: 3 lines skipped, no JSON object with a prompt: line 2, 3, 5"]
    (tmp_path / "math.jsonl").write_text("\n")
    with pytest.raises(ZooError, match="math.jsonl: expected JSON objects with a prompt, a line each, got none"):
        sources.read_prompt_file(tmp_path / "math.jsonl", told.append)
    with pytest.raises(ZooError, match="sql.jsonl: expected a readable prompt file"):
        sources.read_prompt_file(tmp_path / "sql.jsonl", told.append)


def test_templates_and_passages(monkeypatch):
    for name in ("math-template", "sql-template", "french-template"):
        texts = [text for text, _ in sources.template_prompts(sources.by_name()[name])]
        assert len(texts) == len(set(texts)) > 500
        assert texts != [text for text, _ in sources.template_prompts(sources.by_name()[name], "other")]
    cuts = list(itertools.islice(sources.passages("code", 0), 30))
    assert all(600 < len(cut) <= 4500 for cut in cuts)
    assert len(set(cuts)) > 25

    def absent():
        raise ZooError("no npm")

    told = []
    monkeypatch.setattr(sources.corpora, "legal", absent)
    with pytest.raises(ZooError, match="passages of kind law: no package's texts are there"):
        next(sources.passages("law", 0, told.append))
    assert told == ["passages from absent are left out: no npm"]
    for source in SOURCES:
        if source.kind == "passage":
            assert "PASSAGE" in sources.passage_prompt(source, "PASSAGE", random.Random(0))


# --- the worker, with a scripted target -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    from hedgespec.zoo.target import target_path

    return AutoTokenizer.from_pretrained(target_path())


SAID = (
    "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor incididunt ut labore et dolore magna".split()
)


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """`generate` writes words at random; the list holds every job. Set `limit` to stop after so many."""
    jobs: list = []
    state = {"jobs": jobs, "limit": None, "prompt": None}

    def generate(llama, given, *, slots, ends, seed, tick, watch):
        rng = random.Random(seed)
        for job in given:
            if state["limit"] is not None and len(jobs) >= state["limit"]:
                raise KeyboardInterrupt
            jobs.append(job)
            asks = tokenizer.decode(job.tokens).rfind("<|im_start|>user") > tokenizer.decode(job.tokens).rfind(
                "<|im_start|>assist"
            )
            words = " ".join(rng.choice(SAID) + str(rng.randrange(100)) for _ in range(12 if asks else 30))
            text = state["prompt"] if asks and state["prompt"] else f" {words} sql function symptom law"
            words = tokenizer(text)["input_ids"]
            job.new = words[:9]
            watch([job])
            job.new = [*words, 2]
            tick(len(job.new))
            yield job

    monkeypatch.setattr(collect, "generate", generate)
    return state


SETTINGS = collect.Settings(
    domains=("chat", "sql", "math"), goals={"chat": 3000, "sql": 1000, "math": 1000}, cycle=60, slots=4, max_answer=40
)


@pytest.fixture
def passages(monkeypatch):
    monkeypatch.setattr(
        sources, "passages", lambda kind, seed, report: (f"passage {number} " * 80 for number in itertools.count())
    )


def test_a_collection(tmp_path, tokenizer, scripted, passages):
    settings = replace(SETTINGS, goals={"chat": 9000, "sql": 3000, "math": 3000})
    worker = collect.Worker(None, tokenizer, tmp_path, settings, report=lambda line: None)
    for number in range(40):
        if all(count >= settings.goals[domain] for domain, count in worker.counts().items()):
            break
        worker.cycle(number)
    worker.seal(minimum=1)
    worker.close()
    rows = shards.read_folder(tmp_path, journals=False)
    assert rows == worker.rows
    counts = worker.counts()
    assert all(settings.goals[domain] <= counts[domain] < 3 * settings.goals[domain] for domain in settings.domains)
    keys = {}
    for row in rows.values():
        text = tokenizer.decode(row.tokens)
        prompt, answer = text.split("<|im_start|>user\n", 1)[1].split("<|im_end|>\n<|im_start|>assistant\n", 1)
        assert row.key == Prompt("", prompt, "", "").key
        if "passage" not in row.source:
            assert row.held_out == (sources.side_of(prompt) == "held_out")
        assert tokenizer.decode(row.tokens[row.prompt_length :]) == answer
        assert row.temperature == 0 or 0.7 <= row.temperature <= 1
        keys.setdefault(row.key, []).append(row)
    for same in keys.values():
        if same[0].held_out:
            assert sorted(row.temperature for row in same) == [0.0, 1.0]
        else:
            assert len(same) == 1
    train = [row for row in rows.values() if not row.held_out]
    assert 0.35 < sum(row.temperature == 0 for row in train) / len(train) < 0.65
    chats = [row for row in train if row.source.startswith("chat") and row.prompt_length < 300]
    assert 0.08 < sum(row.last_start > row.prompt_length for row in chats) / len(chats) < 0.35
    for row in train:
        if row.last_start > row.prompt_length:
            (_, stop), (start, _) = row.answers(collect.END)
            assert tokenizer.decode(row.tokens[stop:start]).startswith("\n<|im_start|>user\n")
            assert tokenizer.decode(row.tokens[stop:start]).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_killed_collection_goes_on(tmp_path, tokenizer, scripted, passages):
    """What was finished is kept, what was asked is not asked again, and the lock is free."""
    worker = collect.Worker(None, tokenizer, tmp_path, SETTINGS, report=lambda line: None)
    scripted["limit"] = 70
    with pytest.raises(KeyboardInterrupt):  # during the first cycle's answers
        worker.cycle(0)
    worker.lock.release()
    kept, pending = dict(worker.rows), {key for key in worker.pending if key not in {row.key for row in worker.rows.values()}}
    assert kept and pending
    again = collect.Worker(None, tokenizer, tmp_path, SETTINGS, report=lambda line: None)
    assert again.name == worker.name
    assert again.rows == kept
    assert set(again.pending) == pending
    scripted["limit"] = None
    before = len(scripted["jobs"])
    again.cycle(100)
    assert scripted["jobs"][before].label["kind"] == "answer"  # no new prompts
    assert {row.key for row in again.rows.values()} >= pending
    again.close()


@pytest.mark.parametrize("kind", ["ask", "answer", "follow-up", "last"])
def test_texts_that_had_not_ended_go_on(tmp_path, tokenizer, scripted, passages, monkeypatch, kind):
    """Killed after nine tokens of a text of each kind: the next worker continues with those nine, and loses nothing else."""
    monkeypatch.setattr(collect, "PARTIAL_SECONDS", 0)
    settings = replace(SETTINGS, cycle=120)
    worker = collect.Worker(None, tokenizer, tmp_path, settings, report=lambda line: None)
    save, killed = worker.save_partial, []

    def die(active):
        [job] = active
        second = job.label["kind"] == "answer" and job.label["start"] > job.label["prompt_length"]
        save(active)
        if ("last" if second else job.label["kind"]) == kind:
            killed.append(replace(job, new=list(job.new)))
            raise KeyboardInterrupt

    monkeypatch.setattr(worker, "save_partial", die)
    with pytest.raises(KeyboardInterrupt):
        worker.cycle(0)
    worker.close()
    again = collect.Worker(None, tokenizer, tmp_path, settings, report=lambda line: None)
    [job] = again.interrupted
    assert job.tokens == [*killed[0].tokens, *killed[0].new]
    assert job.max_new_tokens == killed[0].max_new_tokens - 9
    assert again.rows == worker.rows
    again.cycle(1)
    if kind == "ask":
        opening = tokenizer.decode(job.tokens[job.label["start"] :])
        assert any(opening.strip() in again.user_text(row.tokens) for row in again.rows.values())
    else:
        row = again.rows[job.label["row"]["key"], job.label.get("temperature", job.temperature) > 0]
        assert row.tokens[: len(job.tokens)] == job.tokens
        assert (row.last_start > row.prompt_length) == (kind in ("follow-up", "last")) or kind == "answer"
    assert not again.partial.exists()
    again.close()


def test_workers_share_a_folder(tmp_path, tokenizer, scripted, passages):
    one = collect.Worker(None, tokenizer, tmp_path, SETTINGS, report=lambda line: None)
    two = collect.Worker(None, tokenizer, tmp_path, SETTINGS, report=lambda line: None)
    assert (one.name, two.name) == ("worker-00", "worker-01")
    one.cycle(0)
    two.cycle(0)
    assert not {key for key, _ in one.rows} - {key for key, _ in two.rows}  # two read what one had
    one.seal(minimum=1)
    two.seal(minimum=1)
    assert sorted(path.name for path in tmp_path.glob("*.xz")) == ["worker-00-0000.npz.xz", "worker-01-0000.npz.xz"]
    other = tmp_path / "other"
    third = collect.Worker(None, tokenizer, other, replace(SETTINGS, already=(tmp_path,)), report=lambda line: None)
    assert third.rows == two.rows
    assert not list(other.glob("*.xz"))
    for worker in (one, two, third):
        worker.close()


def test_copies_of_prompt_files_are_not_taken(tmp_path, tokenizer, scripted, passages):
    folder = tmp_path / "prompts"
    folder.mkdir()
    copied = "Given 3 numbers, which SQL query returns the largest of them?"
    (folder / "sql.jsonl").write_text(json.dumps({"prompt": copied}) + "\n")
    scripted["prompt"] = copied
    settings = replace(SETTINGS, domains=("sql",), prompts=folder)
    worker = collect.Worker(None, tokenizer, tmp_path / "out", settings, report=lambda line: None)
    worker.table = [replace(source, openings=("",)) for source in worker.table if source.kind == "self"]
    worker.write_prompts(0)
    assert worker.pending == {}
    scripted["prompt"] = copied + " And the smallest?"
    worker.write_prompts(1)
    assert len(worker.pending) == 1  # once, however often it was written
    worker.close()


def test_domains_without_sources_are_told(tmp_path, tokenizer, monkeypatch):
    worker = collect.Worker(None, tokenizer, tmp_path, replace(SETTINGS, domains=("sql",)), report=lambda line: None)
    worker.table = [source for source in worker.table if source.kind == "file"]
    with pytest.raises(ZooError, match="domain sql: no source has prompts left; give --prompts"):
        worker.plan(random.Random(0))
    worker.close()


def test_unknown_domains_are_refused(tmp_path):
    with pytest.raises(ZooError, match="domain: expected one of chat, .*, got 'poetry'"):
        collect.Worker(None, None, tmp_path, collect.Settings(domains=("poetry",)))
    assert not list(tmp_path.iterdir())


def test_rows_near_a_held_out_prompt_are_left_out():
    def row(key: int, prompt: list[int], held_out: bool) -> Row:
        tokens = [1, 9690, 198, 5, 2, 198, 1, 4093, 198, *prompt, 2, 198, 1, 520, 9531, 198]
        return Row(f"{key:016x}", "chat-self", "own", held_out, 0.0, len(tokens), len(tokens), [*tokens, 70, 71, 2])

    words = list(range(100, 130))
    rows = [
        row(0, words, True),
        row(1, [*words[:28], 90], False),
        row(2, list(range(200, 230)), False),
        row(3, words[:4] + [7] * 20, False),
    ]
    assert [int(each.key, 16) for each in collect.one_sided(rows)] == [0, 2, 3]


def test_packing_an_empty_folder(tmp_path):
    with pytest.raises(ZooError, match="expected a collection, found no rows"):
        collect.pack(tmp_path, tmp_path / "there")


def test_training_goes_on_with_the_shards_it_began_with(tmp_path):
    from hedgespec.zoo import pipeline

    def row(number: int) -> Row:
        return Row(f"{number:016x}", "chat-self", "own", False, 0.0, 9, 9, [*range(3 + number, 12 + number), 70, 2])

    data, frozen = tmp_path / "data", tmp_path / "data.json"
    with pytest.raises(ZooError, match="data: expected a folder written by `hedgespec zoo collect`, found none at"):
        pipeline.read_rows([data], frozen)
    data.mkdir()
    Journal(data / "worker-00.journal").append(shards.as_entry(row(9)))
    with pytest.raises(ZooError, match="data: expected shards in .*, found none; run `hedgespec zoo collect`, or --pack"):
        pipeline.read_rows([data], frozen)
    first = shards.write_shard(data, "worker-00", [row(0), row(1)])
    assert pipeline.read_rows([data], frozen) == [row(0), row(1)]
    shards.write_shard(data, "worker-00", [row(2)])
    assert pipeline.read_rows([data], frozen) == [row(0), row(1)]
    assert pipeline.read_rows([data]) == [row(0), row(1), row(2)]
    first.write_bytes(shards.encode([row(3)]))
    with pytest.raises(ZooError, match="worker-00-0000.npz.xz: expected the shard that training began with, got another"):
        pipeline.read_rows([data], frozen)
    first.unlink()
    with pytest.raises(ZooError, match="data.json: expected the shard .*worker-00-0000.npz.xz, which training began with"):
        pipeline.read_rows([data], frozen)


def test_the_recipe_is_changed_by_name():
    from hedgespec.zoo.pipeline import recipe_with

    recipe = recipe_with(["passes=2.5", "depths=1,3", "draft_vocab_size=16384"])
    assert (recipe.passes, recipe.depths, recipe.draft_vocab_size) == (2.5, (1, 3), 16384)
    with pytest.raises(ValueError, match="set: expected NAME=VALUE with a name among draft_vocab_size, .*, got 'width=3'"):
        recipe_with(["width=3"])
    with pytest.raises(ValueError, match="set: expected int for seed, got 'x'"):
        recipe_with(["seed=x"])


@pytest.mark.slow
def test_the_whole_chain(tmp_path, monkeypatch):
    """`hedgespec zoo train --smoke` with the real target collects, trains, measures; a second run finds everything done."""
    from hedgespec.zoo import pipeline, train

    monkeypatch.setattr(pipeline, "default_data", lambda: tmp_path / "data")
    console = Console(record=True, width=200)
    out = pipeline.run(smoke=True, out=tmp_path / "out", console=console)
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert set(made) == {f"{name}.safetensors" for name in ("chat", "math", "joint")}
    result = json.loads((out / "matrix.json").read_text())
    assert set(result["tokens_per_round"]["greedy"]) <= {"chat", "math"}
    assert all(1 <= figure <= 6 for row in result["tokens_per_round"]["greedy"].values() for figure in row.values())
    assert (out / "stores" / "chat.safetensors").exists()
    manifest = json.loads((tmp_path / "data" / "smoke" / "manifest.json").read_text())
    assert set(manifest["domains"]) == {"chat", "math"}
    about = json.loads((out / "chat.json").read_text())
    assert about["curve"] and about["recipe"] == json.loads(json.dumps(train.asdict(pipeline.smoke_recipe())))
    pipeline.run(smoke=True, out=tmp_path / "out", console=console)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == made
    assert not FileLock(tmp_path / "data" / "smoke" / "worker-00.lock").is_locked
    assert not list(Journal.read(tmp_path / "data" / "smoke" / "worker-00.journal"))
