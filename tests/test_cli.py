"""The command line, on a tiny target that is made here and says a known text: nothing is downloaded."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.command_line import CONTEXT, DIGITS, EOS, STORY, WIDTH, byte_tokenizer, fails, speaker
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import hedgespec
from hedgespec import Tree, cli, zoo
from hedgespec.cli import output
from hedgespec.drafters.checkpoints import inspect_drafter
from hedgespec.drafters.datastore import MAX_NGRAM, Datastore
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.integrations.vllm.pool_config import VARIABLE, read_pool
from hedgespec.learners import NAMES as LEARNERS
from hedgespec.stats import STAGES
from hedgespec.zoo.storage import load_head, save_head

ENTER = [sys.executable, "-c", "import sys; from hedgespec.cli import main; sys.exit(main())"]


# What the tests run on


def save_tiny_head(path: Path, target, seed: int = 0, vocabulary: int = 257, layers: tuple[int, ...] = (0, 1, 2)) -> None:
    torch.manual_seed(seed)
    config = EagleConfig(WIDTH, WIDTH, 4, 2, 16, 8, vocabulary, 40, layers)
    save_head(EagleHead(config, target.get_input_embeddings(), torch.arange(40)), path)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> SimpleNamespace:
    """Folders and files of the tiny target and of what drafts, or does not draft, for it."""
    folder = tmp_path_factory.mktemp("cli")
    at = SimpleNamespace(target=folder / "target", twin=folder / "twin", head=folder / "head.safetensors")
    at.tokenizer = byte_tokenizer()
    at.model = speaker(at.tokenizer)
    for path in (at.target, at.twin):
        at.model.save_pretrained(path)
    at.tokenizer.save_pretrained(at.target)
    save_tiny_head(at.head, at.model)
    return at


@pytest.fixture
def run(place, capsys):
    """`generate` on the tiny target: exit code, stdout, stderr."""

    def call(*argv: object, drafters=("ngram",)) -> tuple[int, str, str]:
        given = [word for drafter in drafters for word in ("--drafter", drafter)]
        code = cli.main([str(word) for word in ("generate", "--target", place.target, *given, *argv)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def stats(run):
    """The JSON of a run that went well."""

    def call(*argv: object, drafters=("ngram",)) -> dict:
        code, out, err = run(*argv, "--json", drafters=drafters)
        assert code == 0, err
        return json.loads(out)

    return call


# generate: the text


def test_the_text_streams_without_the_prompt_and_ends_with_a_newline(run):
    assert run("c")[:2] == (0, STORY[1:] + "\n")


def test_no_piece_ends_within_a_character(place, monkeypatch, capsys):
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: pieces.append("".join(words)))
    cli.main(["generate", "c", "--target", str(place.target), "--drafter", "ngram"])
    assert "".join(pieces) == STORY[1:]
    assert sum(map(bool, pieces)) >= 5
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("group", [1, 2, 3, 7, 100])
def test_text_stream_gives_whole_characters_whatever_the_rounds(place, group):
    text = "naïve 日本語 🙂🙃 e\u0301"
    ids = place.tokenizer(text).input_ids
    stream = output.TextStream(place.tokenizer, place.tokenizer("ça").input_ids)
    pieces = [stream.push(ids[start : start + group]) for start in range(0, len(ids), group)]
    assert "".join(pieces) == text
    assert stream.end() == ""
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_text_stream_says_at_the_end_what_it_held_back(place):
    stream = output.TextStream(place.tokenizer)
    assert stream.push(place.tokenizer("a🙂").input_ids[:-1]) == "a"
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"
    assert stream.push([EOS]) == ""


def test_text_stream_keeps_the_spaces_that_a_tokenizer_drops_at_the_start_of_a_text():
    words = {"▁a": 0, "▁b": 1, "c": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="c"))
    tokenizer.decoder = decoders.Metaspace()
    stream = output.TextStream(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [0])
    assert [stream.push([token]) for token in (1, 2, 0)] == [" b", "c", " a"]


def test_json_is_one_object(stats, place):
    result = stats("c")
    assert result["text"] == STORY[1:]
    assert result["tokens"] == [*place.tokenizer(STORY[1:]).input_ids, EOS]
    assert result["stats"]["emitted_tokens"] == len(result["tokens"])


def test_json_has_no_nan_where_there_was_no_round(stats):
    assert stats("0", "--max-new-tokens", 1)["stats"]["tokens_per_round"] is None


def test_a_dash_reads_stdin_less_one_newline(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("8\n"))
    assert run("-", "--max-new-tokens", 3)[:2] == (0, "901\n")


def test_a_prompt_may_begin_with_a_dash(run):
    assert run("- 3", "--max-new-tokens", 2)[:2] == (0, "45\n")


def test_chat_puts_the_prompt_into_the_template(place, stats, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role }}:{{ turn.content }}{% endfor %}{% if add_generation_prompt %}:6{% endif %}"
    )
    place.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain, chat = (stats("1", "--target", tmp_path, "--max-new-tokens", 3, *more)["text"] for more in ((), ("--chat",)))
    assert (plain, chat) == ("234", "789")


# generate: its options


def test_every_kind_of_drafter_drafts_under_its_own_name(stats, place):
    drafters = ("ngram", place.head, place.twin)
    result = stats("0", "--learner", "uniform", "--max-new-tokens", 60, "--seed", 0, drafters=drafters)
    assert result["stats"]["drafters"] == ["ngram", "head", "twin"]
    assert result["stats"]["failures"] == {}
    assert all(result["stats"]["picks"])
    assert result["text"] == (DIGITS * 7)[1:61]


@pytest.fixture
def hub(place, tmp_path) -> dict[str, Path]:
    """EAGLE heads as they come from the hub, one of them pickled."""
    torch.manual_seed(1)
    config = EagleConfig(WIDTH, WIDTH, 4, 2, 16, 8, 257, 40, (0, 1))
    head = EagleHead(config, place.model.get_input_embeddings(), torch.arange(40, 80))
    folders = {layout: hedgespec.save_drafter(head, tmp_path / layout, layout) for layout in ("eagle3", "speculators")}
    first = EagleConfig(WIDTH, WIDTH, 4, 2, 16, 8, 257, 257, (2,), version=1, norms=())
    first = EagleHead(first, place.model.get_input_embeddings())
    first.lm_head.weight.data.copy_(place.model.lm_head.weight)
    folders["eagle"] = hedgespec.save_drafter(first, tmp_path / "eagle", target=place.model)
    folders["pickled"] = hedgespec.save_drafter(head, tmp_path / "pickled")
    torch.save(load_file(tmp_path / "pickled" / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    return folders


def test_heads_of_the_hub_draft_as_they_lie(stats, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, **_: str(hub[repository.split("-")[1]]))
    drafters = [*(hub[name] for name in ("eagle3", "speculators", "eagle", "pickled")), "someone/EAGLE-eagle3"]
    drafters[1] = hub["speculators"] / "model.safetensors"
    options = ("0", "--learner", "uniform", "--max-new-tokens", 60, "--seed", 0, "--allow-pickle")
    result = stats(*options, drafters=drafters)
    assert result["stats"]["drafters"] == ["eagle3", "speculators", "eagle", "pickled", "EAGLE-eagle3"]
    assert result["stats"]["failures"] == {}
    assert all(result["stats"]["picks"])
    assert result["text"] == (DIGITS * 7)[1:61]


def test_a_pickled_head_is_refused_unless_asked_for(run, hub, capsys):
    fails(capsys, 1, "expected", "safetensors", "pickled", outcome=run("0", drafters=[hub["pickled"]]))


def test_a_head_of_another_target_is_refused(run, hub, capsys):
    config = json.loads((hub["eagle3"] / "config.json").read_text()) | {"eagle_aux_hidden_state_layer_ids": [0, 5]}
    (hub["eagle3"] / "config.json").write_text(json.dumps(config))
    fails(capsys, 1, "expected a target of more than 5 layers, got 2", outcome=run("0", drafters=[hub["eagle3"]]))


def test_without_options_it_is_the_zoo(place, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("hedgespec.zoo.target.load_target", lambda: (place.model, place.tokenizer))
    monkeypatch.setattr(zoo, "head_path", lambda name: tmp_path / f"{name}.safetensors")
    for name in zoo.NAMES:
        save_tiny_head(zoo.head_path(name), place.model)
    assert cli.main(["generate", "c", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["drafters"] == list(zoo.NAMES)
    assert cli.main(["generate", "c", "--json", "--drafter", "sql", "--drafter", "ngram"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["drafters"] == ["sql", "ngram"]


def test_draft_length_and_max_new_tokens(stats, place):
    """The twin is always right: the first token comes from the prompt, then K + 1 a round."""
    for length, emitted, rounds in ((5, 13, 2), (2, 13, 4), (1, 5, 2)):
        found = stats("0", "--draft-length", length, "--max-new-tokens", emitted, drafters=[place.twin])["stats"]
        assert (found["emitted_tokens"], found["rounds"]) == (emitted, rounds)
        assert found["tokens_per_round"] == length + 1


def test_the_default_draft_length_is_five(stats, place):
    assert stats("0", "--max-new-tokens", 7, drafters=[place.twin])["stats"]["rounds"] == 1


def test_warm_start(stats):
    """Five positions of a prompt of six tokens: four of its own and the first emitted token's."""
    for options, heard in (((), 5), (("--warm-start", 3), 3), (("--warm-start", 0), 0)):
        assert stats("012345", "--max-new-tokens", 3, *options)["stats"]["prompt_losses"] == heard


@pytest.mark.parametrize("learner", LEARNERS)
def test_learner_mode_and_compile_reach_the_decoder(learner, stats, monkeypatch):
    configs = []

    class Spy(hedgespec.Decoder):
        def __init__(self, target, drafters, config):
            configs.append(config)
            super().__init__(target, drafters, config)

    monkeypatch.setattr(hedgespec, "Decoder", Spy)
    for mode in ("sampled", "argmax", "coupled"):
        # One token comes from the prompt's forward, and there is nothing yet to compile for.
        stats("0", "--learner", learner, "--proposal", mode, "--max-new-tokens", 1, *["--compile"] * (mode == "argmax"))
    found = [(config.learner, config.proposal, config.compile) for config in configs]
    assert found == [(learner, "sampled", False), (learner, "argmax", True), (learner, "coupled", False)]


@pytest.mark.parametrize(
    ("options", "tree"),
    [(("--tree", 2), Tree(2)), (("--tree", "3,2"), Tree((3, 2))),
     (("--tree", 4, "--tree-size", 6, "--proposal", "argmax"), Tree(4, 6)),
     (("--tree", 4, "--tree-size", 6, "--proposal", "coupled"), Tree(4, 6))],
)  # fmt: skip
def test_a_tree_reaches_the_decoder(options, tree, stats, monkeypatch):
    configs = []

    class Spy(hedgespec.Decoder):
        def __init__(self, target, drafters, config):
            configs.append(config)
            super().__init__(target, drafters, config)

    monkeypatch.setattr(hedgespec, "Decoder", Spy)
    branched = stats("0", "--draft-length", 2, "--max-new-tokens", 12, *options)
    chain = stats("0", "--draft-length", 2, "--max-new-tokens", 12)
    assert branched["text"] == chain["text"]
    assert [config.tree for config in configs] == [tree, None]


def test_the_objective_reaches_the_decoder(run, stats):
    """The first rounds draft 0..K in turns, so that their costs are known."""
    found = stats("0", "--draft-length", 2, "--max-new-tokens", 60, "--objective", "throughput")
    assert found["stats"]["lengths"][:6] == [0, 1, 2, 0, 1, 2]
    same = stats("0", "--draft-length", 2, "--max-new-tokens", 60, "--objective", "tokens")
    assert same["text"] == found["text"]
    assert same["stats"]["lengths"] == stats("0", "--draft-length", 2, "--max-new-tokens", 60)["stats"]["lengths"]
    assert set(same["stats"]["lengths"][:-2]) == {2}


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--tree", 2), ("tree", "throughput")), (("--learner", "ucb"), ("full feedback", "ucb"))],
)
def test_what_does_not_go_with_the_objective_is_told(options, words, run, capsys):
    outcome = run("0", "--objective", "throughput", *options)
    fails(capsys, outcome[0], *words, outcome=outcome)
    assert outcome[0] == (2 if "--tree" in options else 1)


def test_the_learner_decides_who_drafts(stats, place):
    drafters = ("ngram", place.twin)
    options = ("0", "--max-new-tokens", 60)
    assert stats(*options, "--learner", "fixed", drafters=drafters)["stats"]["picks"][1] == 0
    hedged = stats(*options, drafters=drafters)["stats"]
    assert hedged["final_weights"][1] > 0.5


def test_a_learners_state_goes_on_from_call_to_call(stats, place, tmp_path):
    """The second call begins with the weights that the first one left, and leaves its own."""
    file, drafters = tmp_path / "tenant.json", ("ngram", place.twin)
    call = ("0", "--max-new-tokens", 30, "--draft-length", 1, "--learner", "hedge", "--learner-state", file)
    first = stats(*call, drafters=drafters)["stats"]
    left = json.loads(file.read_text())
    assert left["drafters"] == first["drafters"] == ["ngram", "twin"]
    learner = hedgespec.learners.make("hedge", 2)
    learner.load_state_dict(left["state"])
    second = stats(*call, "--max-new-tokens", 2, drafters=drafters)["stats"]
    assert second["rounds"] == 1 and second["prompt_losses"] == 0
    assert second["final_weights"] == learner.weights().tolist()
    assert second["final_weights"][1] > 0.8
    assert json.loads(file.read_text())["state"] != left["state"]


def test_a_learners_state_that_does_not_fit_is_refused_and_kept(run, place, capsys, tmp_path):
    file = tmp_path / "tenant.json"
    call = ("0", "--max-new-tokens", 8, "--learner-state", file)
    assert run(*call)[0] == 0
    before = file.read_bytes()
    fails(capsys, 1, str(file), "['twin']", "got ['ngram']", outcome=run(*call, drafters=[place.twin]))
    fails(capsys, 1, str(file), "'hedge'", "normal_hedge", outcome=run(*call, "--learner", "hedge"))
    assert file.read_bytes() == before
    file.write_text("{}")
    fails(capsys, 1, str(file), "format", outcome=run(*call))
    assert file.read_text() == "{}"


def test_seed_and_temperature(stats):
    """At temperature 50 the tiny target may say almost anything."""
    hot = ("0", "--temperature", 50, "--max-new-tokens", 12)
    first, again, other = (stats(*hot, "--seed", seed)["tokens"] for seed in (1, 1, 2))
    assert first == again != other
    assert stats(*hot)["tokens"] != stats(*hot)["tokens"]  # without a seed, a fresh one
    assert stats("0", "--max-new-tokens", 12, "--seed", 1)["text"] == "123456789012"


@pytest.mark.parametrize("option", [("--top-k", 1), ("--top-p", 1e-9), ("--min-p", 1)])
def test_each_filter_alone_leaves_the_likeliest_token(option, stats):
    assert stats("0", "--temperature", 50, "--max-new-tokens", 12, *option)["text"] == "123456789012"


def test_stats_are_a_table_on_stderr(run, place):
    code, out, err = run("0", "--max-new-tokens", 13, "--stats", drafters=[place.twin, "ngram"])
    assert (code, out) == (0, "1234567890123\n")
    for word in ("MAT", "tokens/s", "13 tokens", "twin", "ngram", "picks", "final weight", "drafter_forward", "learn"):
        assert word in err
    assert "MAT" not in run("0", "--max-new-tokens", 13)[2]
    alone = run("0", "--max-new-tokens", 13, "--stats", drafters=[place.twin])[2]
    assert "5.00 tokens drafted a round, 0 of 2 rounds plain" in alone


def test_the_profile_is_a_table_on_stderr_and_a_drawing_where_a_file_is_named(run, place, tmp_path):
    assert "ms a round" not in run("0", "--max-new-tokens", 13, "--stats", drafters=[place.twin])[2]
    code, out, err = run("0", "--max-new-tokens", 13, "--profile", drafters=[place.twin])
    assert (code, out) == (0, "1234567890123\n")
    for word in ("over 2 rounds", "ms a round", "share, %", *STAGES, "rest", "total"):
        assert word in err
    assert not list(tmp_path.iterdir())
    pytest.importorskip("matplotlib")
    assert run("0", "--max-new-tokens", 13, "--profile", tmp_path / "x.svg")[0] == 0
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_only_a_profile_waits_for_the_device(run, monkeypatch):
    devices = []
    monkeypatch.setattr("hedgespec.stats.profiled", lambda device: devices.append(device) or nullcontext())
    for options, expected in ((), []), (("--profile",), [torch.device("cpu")]):
        assert run("0", "--max-new-tokens", 3, *options)[0] == 0
        assert devices == expected


def test_a_drawing_that_cannot_be_is_refused_before_the_text(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(capsys, 1, "matplotlib", outcome=run("0", "--profile", tmp_path / "x.png"))


def test_a_drafter_that_fails_is_told_in_one_line(run, place, monkeypatch):
    def broken(*_):
        raise RuntimeError("broken\nin two lines")

    monkeypatch.setattr("hedgespec.drafters.ngram.NGramSession.consume", broken)
    code, out, err = run("8", "--max-new-tokens", 3)
    assert (code, out) == (0, "901\n")
    assert "hedgespec: warning: drafter ngram is out of this request: RuntimeError: broken in two lines\n" in err


# generate: bad input


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["{generate,inspect,datastore,demo,zoo,doctor}"]),
        (["decode"], ["decode", "generate", "inspect", "demo", "zoo", "doctor"]),
        (["generate"], ["PROMPT"]),
        (["generate", ""], ["PROMPT", "expected some text"]),
        (["generate", "x", "--temp", "1"], ["--temp"]),
        (["generate", "x", "--drafter", "klingon"], ["--drafter", "generalist", "ngram", "safetensors", "'klingon'"]),
        (["generate", "x", "--drafter", "ngram", "--drafter", "ngram"], ["--drafter", "once", "ngram"]),
        (["generate", "x", "--learner", "oracle"], ["--learner", "normal_hedge", "'oracle'"]),
        (["generate", "x", "--proposal", "guess"], ["--proposal", "sampled", "argmax", "coupled", "'guess'"]),
        (["generate", "x", "--draft-length", "0"], ["--draft-length", "an integer >= 1", "'0'"]),
        (["generate", "x", "--draft-length", "2.5"], ["--draft-length", "an integer >= 1", "'2.5'"]),
        (["generate", "x", "--tree", "2,x"], ["--tree", "an integer >= 1", "'x'"]),
        (["generate", "x", "--tree", "99"], ["branching", "1..32", "99"]),
        (["generate", "x", "--tree", "2,2"], ["branching", "each of the 5 depths", "2"]),
        (["generate", "x", "--tree-size", "8"], ["--tree-size", "--tree"]),
        (["generate", "x", "--tree", "2", "--tree-size", "8"], ["proposal", "argmax", "'sampled'"]),
        (["generate", "x", "--temperature", "-1"], ["--temperature", "a number >= 0", "'-1'"]),
        (["generate", "x", "--temperature", "nan"], ["--temperature", "'nan'"]),
        (["generate", "x", "--temperature", "inf"], ["--temperature", "'inf'"]),
        (["generate", "x", "--top-k", "0"], ["--top-k", "an integer >= 1"]),
        (["generate", "x", "--top-p", "0"], ["--top-p", "a number > 0 and <= 1"]),
        (["generate", "x", "--top-p", "1.1"], ["--top-p", "a number > 0 and <= 1"]),
        (["generate", "x", "--min-p", "-0.1"], ["--min-p", "a number >= 0 and <= 1"]),
        (["generate", "x", "--seed", "-1"], ["--seed", "an integer >= 0"]),
        (["generate", "x", "--max-new-tokens", "0"], ["--max-new-tokens", "an integer >= 1"]),
        (["demo", "--prompts", "0"], ["--prompts", "an integer >= 1"]),
        (["demo", "--draft-length", "0"], ["--draft-length", "an integer >= 1"]),
        (["demo", "--temperature", "-1"], ["--temperature", "a number >= 0"]),
        (["demo", "--max-new-tokens", "1"], ["--max-new-tokens", "an integer >= 2"]),
        (["demo", "--json", "no/such/folder/x.json"], ["--json", "a file that can be written", "x.json"]),
        (["generate", "x", "--profile", "x.txt"], ["--profile", "a file that ends in .png or .svg", "'x.txt'"]),
        (["generate", "x", "--profile", "no/such/x.png"], ["--profile", "a file that can be written", "x.png"]),
        (["demo", "--profile", "x"], ["--profile", "a file that ends in .png or .svg", "'x'"]),
        (["demo", "--plot", "."], ["--plot", "a file that can be written", "'.'"]),
        (["generate", "x", "--learner-state", "no/such/x.json"], ["--learner-state", "a file that can be written", "x.json"]),
        (["generate", "x", "--learner-state", "."], ["--learner-state", "a file that can be written", "'.'"]),
        (["zoo"], ["{list,path,pool,export,collect,train,matrix}"]),
        (["inspect"], ["PATH"]),
        (["datastore", "x", "--tokenizer", "x"], ["FILE"]),
        (["datastore", "x", "y"], ["--tokenizer"]),
        (["datastore", "no/such/x", "y", "--tokenizer", "x"], ["OUT", "a file that can be written", "x"]),
        (["datastore", "x", "y", "--tokenizer", "x", "--max-ngram", "0"], ["--max-ngram", "an integer >= 1 and <= 64"]),
        (["zoo", "export"], ["FOLDER"]),
        (["zoo", "export", "x", "--only", "klingon"], ["--only", "generalist", "'klingon'"]),
        (["zoo", "export", "x", "--layout", "medusa"], ["--layout", "official", "speculators"]),
        (["zoo", "export", "x", "--dtype", "int8"], ["--dtype", "float32", "bfloat16"]),
        (["zoo", "path", "klingon"], ["NAME", "generalist", "'klingon'"]),
        (["zoo", "train", "--only", "sql", "klingon"], ["--only", "chat", "joint", "'klingon'"]),
        (["zoo", "train", "--stage", "eat"], ["--stage", "collect", "stores", "'eat'"]),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_one_line_and_code_2(argv, words, capsys):
    fails(capsys, 2, *words, argv=argv)


def test_empty_stdin_is_an_empty_prompt(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    fails(capsys, 2, "PROMPT", "expected some text", argv=["generate", "-"])


def test_a_text_longer_than_the_context(run, capsys):
    code, _, err = run("0" * 250, "--max-new-tokens", 10)
    assert code == 0 and f"hedgespec: warning: max_new_tokens: the target was made for {CONTEXT} positions" in err


def test_chat_without_a_template(run, capsys):
    fails(capsys, 1, "--chat", "expected a target with a chat template", outcome=run("x", "--chat"))


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the tensors of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "noise":
        weights.write_bytes(b"noise" * 100)
    elif how == "one tensor missing":
        rewrite(folder, lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.weight"))
    elif how == "one tensor of another shape":
        rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    elif how == "a pickle":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif how == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif how == "no config":
        (folder / "config.json").unlink()


SPOILT = ["no weights", "cut short", "noise", "one tensor missing", "one tensor of another shape", "a pickle",
          "config is no JSON", "no config"]  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("use", ["target", "drafter"])
def test_a_model_folder_that_cannot_be_read(how, use, place, run, capsys, tmp_path):
    place.model.save_pretrained(tmp_path)
    place.tokenizer.save_pretrained(tmp_path)
    spoil(tmp_path, how)
    outcome = run("x", "--target", tmp_path) if use == "target" else run("x", drafters=[tmp_path])
    fails(capsys, 1, "expected a folder with a causal language model in safetensors", str(tmp_path), outcome=outcome)


def test_a_target_folder_that_is_not_there(run, capsys, tmp_path):
    missing = tmp_path / "missing"
    fails(capsys, 1, "expected a folder", str(missing), "no folder", outcome=run("x", "--target", missing))


def test_a_target_without_a_tokenizer(run, capsys, place):
    fails(capsys, 1, "expected a folder with a tokenizer", str(place.twin), outcome=run("x", "--target", place.twin))


@pytest.mark.parametrize("how", ["missing", "cut short", "noise", "a pickle by name", "a pickle in disguise", "another format"])
def test_a_head_that_cannot_be_read(how, place, run, capsys, tmp_path):
    head = tmp_path / ("head.pt" if how == "a pickle by name" else "head.safetensors")
    if how == "cut short":
        head.write_bytes(place.head.read_bytes()[:-10])
    elif how == "noise":
        head.write_bytes(b"noise" * 100)
    elif how.startswith("a pickle"):
        head.write_bytes(pickle.dumps({"weight": [1.0]}))
    elif how == "another format":
        save_file({"weight": torch.ones(1)}, head)
    word = "expected format" if how == "another format" else "expected a"
    fails(capsys, 1, word, "safetensors", head.name, outcome=run("x", drafters=[head]))


def test_drafters_of_another_vocabulary(place, run, capsys, tmp_path):
    other = speaker(byte_tokenizer(), vocabulary=400)
    save_tiny_head(tmp_path / "head.safetensors", other, vocabulary=400)
    other.save_pretrained(tmp_path / "model")
    fails(capsys, 1, "vocabulary 400", "257", outcome=run("x", drafters=[tmp_path / "head.safetensors"]))
    fails(capsys, 1, "drafter model", "vocabulary of 257", "400", outcome=run("x", drafters=[tmp_path / "model"]))


def test_a_drafter_of_another_tokenizer(place, run, capsys, tmp_path):
    """As many tokens, so that only a look at the ids can tell."""
    names = place.tokenizer.convert_ids_to_tokens(range(len(place.tokenizer)))
    names[10], names[20] = names[20], names[10]
    other = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    place.model.save_pretrained(tmp_path / "model")
    place.tokenizer.save_pretrained(tmp_path / "model")
    assert run("c", drafters=[tmp_path / "model"])[:2] == (0, STORY[1:] + "\n")
    PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<eos>").save_pretrained(tmp_path / "model")
    fails(capsys, 1, "drafter model", names[20], outcome=run("c", drafters=[tmp_path / "model"]))


# Ends of a run


def test_ctrl_c_is_quiet(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(hedgespec.Decoder, "generate", interrupted)
    code, out, err = run("x")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_quiet(place, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["generate", "0", "--target", str(place.target), "--drafter", "ngram"]) == 141
    assert "hedgespec" not in capsys.readouterr().err


def test_debug_shows_the_traceback_too(capsys, monkeypatch):
    monkeypatch.setenv("HEDGESPEC_DEBUG", "1")
    assert cli.main(["generate", ""]) == 2
    assert "Traceback" in (err := capsys.readouterr().err)
    assert err.splitlines()[-1].startswith("hedgespec: error: PROMPT")


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(hedgespec.Decoder, "generate", lambda *_, **__: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        run("x")


# inspect


def test_inspect_says_what_is_there_and_what_would_be_assumed(hub, capsys):
    assert cli.main(["inspect", str(hub["eagle3"])]) == 0
    out = capsys.readouterr().out
    for word in ("format: eagle3, float32", "draft vocabulary: 40 of 257", "aux layers: 0, 1", "midlayer.hidden_norm.weight",
                 "[64, 128]", "norms: input_layernorm, hidden_norm, norm", "assumed:", "as vLLM counts"):  # fmt: skip
        assert word in out
    assert "refused" not in out
    assert cli.main(["inspect", str(hub["eagle"])]) == 0
    out = capsys.readouterr().out
    for word in ("format: eagle, float32", "draft vocabulary: all of 257", "aux layers: depend on the target"):
        assert word in out


def test_inspect_json_and_what_would_be_refused(hub, capsys):
    tensors = load_file(hub["eagle3"] / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, hub["eagle3"] / "model.safetensors")
    assert cli.main(["inspect", str(hub["eagle3"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["aux_layers"], found["faults"]) == ("eagle3", [0, 1], ["norm.weight is missing"])
    assert found["tensors"]["fc.weight"] == [WIDTH, 2 * WIDTH]
    assert cli.main(["inspect", str(hub["eagle3"])]) == 0
    assert "refused, since:\n  norm.weight is missing" in capsys.readouterr().out
    assert cli.main(["inspect", str(hub["pickled"]), "--json", "--allow-pickle"]) == 0


def test_inspect_of_what_is_no_head(hub, place, capsys):
    for path, word in ((place.target, "expected an EAGLE head"), (place.head, "HedgeSpec's zoo"), (hub["pickled"], "pickle"),
                       ("klingon", "found none")):  # fmt: skip
        fails(capsys, 1, word, argv=["inspect", path])


# datastore


def test_datastore_looks_texts_up_by_their_tokens(place, capsys, tmp_path):
    for name, text in (("one", STORY), ("two", DIGITS * 2)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    out = tmp_path / "store.safetensors"
    command = ["datastore", str(out), "--tokenizer", str(place.target), str(tmp_path / "one"), str(tmp_path / "two")]
    assert cli.main(command) == 0
    ids = [place.tokenizer(text).input_ids for text in (STORY, DIGITS)]
    assert f"store.safetensors: {len(Datastore.load(out))} entries from {len(ids[0]) + 20} tokens" in capsys.readouterr().out
    built = Datastore.load(out)
    assert built.max_ngram == MAX_NGRAM
    assert built.next_tokens([ids[0][:4], ids[1], ids[0]]).tolist() == [ids[0][4], ids[1][0], -1]
    assert cli.main([*command, "--max-ngram", "2"]) == 0
    assert Datastore.load(out).max_ngram == 2
    command = ["generate", STORY, "--target", str(place.target), "--drafter", str(out), "--max-new-tokens", "4", "--json"]
    assert cli.main(command) == 0
    assert '"store"' in capsys.readouterr().out


def test_datastore_of_what_is_no_text_or_has_no_tokenizer(place, capsys, tmp_path, monkeypatch):
    text, noise, out = tmp_path / "text", tmp_path / "noise", tmp_path / "store.safetensors"
    text.write_text("abc", encoding="utf-8")
    noise.write_bytes(b"\xff\xfe")
    known = ["datastore", out, "--tokenizer", place.target]
    fails(capsys, 1, str(noise), "expected a text in UTF-8", argv=[*known, text, noise])
    fails(capsys, 1, "missing", argv=[*known, tmp_path / "missing"])
    fails(capsys, 1, "a folder with a tokenizer", "twin", argv=["datastore", out, text, "--tokenizer", place.twin])
    fails(capsys, 1, "a folder with a tokenizer", "nowhere", argv=["datastore", out, text, "--tokenizer", "nowhere"])

    def unreachable(name, **_):
        raise OSError(f"{name} is far")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    words = ("--tokenizer", "a repository of the hub", "someone/else is far")
    fails(capsys, 1, *words, argv=["datastore", out, text, "--tokenizer", "someone/else"])
    assert not out.exists()


# demo


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """Stands in for the demo: notes what it is called with, says a line, returns figures one of which is NaN."""
    calls = []

    def run(**options):
        calls.append(options)
        options["console"].print("on the console")
        return {"mat": 2.5, "mat_best_fixed": float("nan"), "domains": {"sql": {"mat": np.float64(2.0)}}}

    monkeypatch.setitem(sys.modules, "hedgespec.zoo.demo", SimpleNamespace(run=run))
    monkeypatch.chdir(tmp_path)
    return calls


FIGURES = {"mat": 2.5, "mat_best_fixed": None, "domains": {"sql": {"mat": 2.0}}}


def test_demo_defaults(demo, capsys):
    assert cli.main(["demo"]) == 0
    assert capsys.readouterr().out == "on the console\n"
    del demo[0]["console"]
    assert demo == [
        {"prompts_per_domain": 2, "max_new_tokens": 80, "draft_length": 5, "temperature": 0.0, "seed": 0,
         "compile": False, "plot": Path("hedgespec-demo.png"), "profile": False}
    ]  # fmt: skip


def test_demo_options(demo, capsys, tmp_path):
    options = "--prompts 5 --max-new-tokens 9 --draft-length 4 --temperature 0.5 --seed 3 --compile"
    assert cli.main(["demo", *options.split(), *"--plot x.png --profile y.svg --json out.json".split()]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == FIGURES
    del demo[0]["console"]
    assert demo == [
        {"prompts_per_domain": 5, "max_new_tokens": 9, "draft_length": 4, "temperature": 0.5, "seed": 3,
         "compile": True, "plot": Path("x.png"), "profile": Path("y.svg")}
    ]  # fmt: skip
    assert cli.main(["demo", "--plot", "", "--profile"]) == 0
    assert demo[1]["plot"] is None and demo[1]["profile"] is True


def test_demo_json_on_stdout_has_it_to_itself(demo, capsys):
    assert cli.main(["demo", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == FIGURES
    assert "on the console" in err


@pytest.mark.parametrize(("package", "extra"), output.PACKAGES.items())
def test_a_command_without_an_optional_package_names_the_extra(package, extra, monkeypatch, capsys, tmp_path):
    def run(**_):
        raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    monkeypatch.setitem(sys.modules, "hedgespec.zoo.demo", SimpleNamespace(run=run))
    monkeypatch.chdir(tmp_path)
    fails(capsys, 1, package, f"pip install 'hedgespec[{extra}]'", argv=["demo"])
    listed = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"sklearn": "scikit-learn"}.get(package, package) in {re.match(r"[\w-]+", one)[0] for one in listed[extra]}


# zoo


@pytest.fixture
def heads(place, monkeypatch, tmp_path):
    """A zoo with a cache and heads of its own; every head is there but the French one."""
    monkeypatch.setenv("HEDGESPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo, "FOLDER", tmp_path)
    for name in set(zoo.NAMES) - {"french"}:
        save_tiny_head(zoo.head_path(name), place.model)
    return tmp_path


def test_zoo_list_json(heads, capsys):
    assert cli.main(["zoo", "list", "--json"]) == 0
    target, *rows = json.loads(capsys.readouterr().out)
    rows, stored = rows[: len(zoo.NAMES)], rows[len(zoo.NAMES) :]
    assert [row["role"] for row in stored] == [*(f"datastore: {name}" for name in zoo.EXPERTS), "datastore: all"]
    assert all(row["bytes"] is None and row["draft_vocabulary"] is None for row in stored)  # none are in this zoo's folder
    assert all(row["path"].startswith(str(heads / "stores")) for row in stored)
    assert (target["role"], target["bytes"], target["draft_vocabulary"]) == ("target", None, None)
    assert target["path"].startswith(str(heads / "cache"))
    assert [row["name"] for row in rows] == list(zoo.NAMES)
    for row in rows:
        path = zoo.head_path(row["name"])
        assert row["path"] == str(path)
        assert (row["bytes"], row["draft_vocabulary"]) == ((path.stat().st_size, 40) if path.exists() else (None, None))
    assert [row["name"] for row in rows if row["bytes"] is None] == ["french"]
    assert {row["role"] for row in rows} == {*(f"expert: {name}" for name in zoo.EXPERTS), "all domains"}


def test_zoo_list_is_a_table(heads, capsys):
    assert cli.main(["zoo", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("draft vocabulary", "MB", "where", "not there"))
    assert all(str(zoo.head_path(name)) in out for name in zoo.NAMES)  # in one piece


def test_zoo_list_with_a_corrupt_head(heads, capsys):
    zoo.head_path("sql").write_bytes(b"noise" * 100)
    fails(capsys, 1, "expected a head in the zoo's format", "sql.safetensors", argv=["zoo", "list"])


@pytest.mark.parametrize("layout", ["official", "speculators"])
def test_zoo_export(heads, place, capsys, monkeypatch, tmp_path, layout):
    monkeypatch.setattr("hedgespec.zoo.load_target", lambda **_: (place.model, place.tokenizer))
    fails(capsys, 1, "expected aux layers below 2", argv=["zoo", "export", tmp_path / "out", "--only", "sql"])
    for name in ("sql", "math"):
        zoo.head_path(name).unlink()
        save_tiny_head(zoo.head_path(name), place.model, layers=(0, 1))
    options = ["--only", "sql", "math", "--layout", layout, "--dtype", "bfloat16", "--verifier", "someone/target"]
    assert cli.main(["zoo", "export", str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in ("sql", "math")]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sql", "math"}
    found = hedgespec.load_drafter(tmp_path / "out" / "sql", place.model)
    head = load_head(zoo.head_path("sql"), place.model)
    assert found.config == head.config
    assert torch.equal(found.draft_to_target, head.draft_to_target)
    torch.testing.assert_close(found.qkv_proj.weight, head.qkv_proj.weight.bfloat16().float())
    config = json.loads((tmp_path / "out" / "sql" / "config.json").read_text())
    assert layout == "official" or config["speculators_config"]["verifier"]["name_or_path"] == "someone/target"
    report = inspect_drafter(tmp_path / "out" / "sql")
    assert (report.format, report.dtype) == ("eagle3" if layout == "official" else "speculators eagle3", "bfloat16")


def test_zoo_path(heads, capsys):
    assert cli.main(["zoo", "path", "sql"]) == 0
    assert capsys.readouterr().out == f"{zoo.head_path('sql')}\n"
    fails(capsys, 1, "french", "expected a file", argv=["zoo", "path", "french"])
    made = heads / "cache" / "smollm2-135m-instruct"
    made.mkdir(parents=True)
    (made / "COMPLETE").touch()
    assert cli.main(["zoo", "path"]) == 0
    assert capsys.readouterr().out == f"{made}\n"


def test_zoo_pool(tmp_path, capsys, monkeypatch):
    assert cli.main(["zoo", "pool"]) == 0
    monkeypatch.setenv(VARIABLE, capsys.readouterr().out)
    assert read_pool(4, ("datastore", "ngram")).names == (*zoo.EXPERTS, "lookup")
    fails(capsys, 2, "--heads", "zoo export", str(tmp_path / "python"), argv=["zoo", "pool", "--heads", tmp_path])
    for name in zoo.NAMES:
        (tmp_path / name).mkdir()
    assert cli.main(["zoo", "pool", "--heads", str(tmp_path)]) == 0
    monkeypatch.setenv(VARIABLE, capsys.readouterr().out)
    pool = read_pool(4, ("eagle3",))
    assert [entry.options["model"] for entry in pool.drafters] == [str(tmp_path / name) for name in zoo.NAMES]


def test_zoo_train_and_matrix(monkeypatch):
    calls = []
    fake = SimpleNamespace(
        run=lambda **options: calls.append((options.pop("console"), options)),
        matrix_of=lambda *given, console, **options: calls.append((console, (given, options))),
    )
    monkeypatch.setitem(sys.modules, "hedgespec.zoo.pipeline", fake)
    assert cli.main(["zoo", "train"]) == 0
    argv = [
        "--only",
        "sql",
        "joint",
        "--stage",
        "heads",
        "--out",
        "there",
        "--data",
        "a",
        "b",
        "--smoke",
        "--no-features",
        "--set",
        "passes=2",
    ]
    assert cli.main(["zoo", "train", *argv]) == 0
    assert cli.main(["zoo", "matrix", "--head", "python", "--head", "x.safetensors", "--data", "a"]) == 0
    assert [options for _, options in calls] == [
        {"names": None, "stage": "all", "out": None, "data": (), "smoke": False, "settings": (),
         "keep_features": True},
        {"names": ("sql", "joint"), "stage": "heads", "out": Path("there"), "data": (Path("a"), Path("b")), "smoke": True,
         "settings": ("passes=2",), "keep_features": False},
        ((("python", "x.safetensors"), (Path("a"),), None), {"keep_features": True}),
    ]  # fmt: skip
    assert all(hasattr(console, "print") for console, _ in calls)


def test_zoo_collect(monkeypatch, tmp_path, capsys):
    from hedgespec.zoo import collect, target

    calls = []
    monkeypatch.setattr(target, "load_target", lambda: ("model", "tokenizer"))
    monkeypatch.setattr(collect, "collect", lambda *given, **options: calls.append((given, options)))
    argv = ["zoo", "collect", "--out", "there", "--prompts", "files", "--domains", "sql", "math", "--scale", "0.5",
            "--workers", "2", "--from", "a", "b", "--minutes", "3", "--seed", "4"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["hedgespec", *argv])
    assert cli.main(argv) == 0
    [((model, tokenizer, folder, settings), options)] = calls
    assert (model, tokenizer, folder) == ("model", "tokenizer", Path("there"))
    assert (settings.domains, settings.prompts, settings.minutes, settings.seed) == (("sql", "math"), Path("files"), 3, 4)
    assert settings.already == (Path("a"), Path("b"))
    assert settings.goals["sql"] == 250_000
    assert options["workers"] == 2
    assert options["command"][1:] == ["-m", "hedgespec", *argv, "--workers", "1"]
    fails(capsys, 1, "expected one of chat, python", argv=["zoo", "collect", "--domains", "poetry"])
    fails(capsys, 1, "found no rows", argv=["zoo", "collect", "--out", tmp_path, "--pack", tmp_path / "packed"])
    fails(capsys, 2, "--scale", argv=["zoo", "collect", "--scale", "0"])


# doctor and version


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"evaluate", "verify"} <= set(report["operations"])
    assert report["versions"]["torch"] in text
    assert all(operation in text for operation in report["operations"])


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"hedgespec {hedgespec.__version__}\n"


# The real thing, in a process of its own


def enter(*argv: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*ENTER, *map(str, argv)], capture_output=True, text=True, encoding="utf-8", **options)


@pytest.fixture
def ngram(place) -> tuple:
    """The arguments of `generate` that make it quick."""
    return ("--target", place.target, "--drafter", "ngram", "--max-new-tokens", 12)


FULL = (
    "hedgespec: error: expected room for what is to be written, got: No space left on device; free some, or write to another "
    "place"
)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("argv", [("zoo", "list"), ("--version",)], ids=" ".join)
def test_a_full_disk_behind_stdout_is_one_line(argv):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*ENTER, *argv], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.splitlines()) == (1, [FULL])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_disk_that_is_full_while_a_text_streams_is_one_line(ngram, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["generate", "c", *map(str, ngram)]) == 1
        monkeypatch.undo()
    # In this process transformers may have been imported with its progress bars on: only our own lines count.
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("hedgespec")] == [FULL]


WRITE = """
import json, os, resource, sys, types, hedgespec, torch
from matplotlib.figure import Figure
from hedgespec import cli
from hedgespec.cli import commands, parser
from hedgespec.drafters.datastore import Datastore
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.utils.files import replacing

sys.modules["hedgespec.zoo.demo"] = types.SimpleNamespace(run=lambda **_: {"x": "y" * 5000})
store, head = Datastore.build([range(5000)]), EagleHead(
    EagleConfig(64, 64, 4, 2, 16, 8, 257, 40, (0, 1, 2)), torch.nn.Embedding(257, 64), torch.arange(40))
stats = types.SimpleNamespace(drafters=["x" * 5000], learner_state={"x": 1})

def draw(path):
    with replacing(path) as fresh:
        Figure().savefig(fresh)

work = {
    "datastore.safetensors": store.save,
    "state.json": lambda path: hedgespec.save_learner_state(path, stats),
    "demo.json": lambda path: commands.demo(parser._parser().parse_args(["demo", "--json", path])),
    "model.safetensors": lambda path: hedgespec.save_drafter(head, os.path.dirname(path)),
    "plot.png": draw,
}
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # what is longer stops in the middle, as on a full disk
told = {}
for name, write in work.items():
    folder = os.path.join(sys.argv[1], name)
    path = os.path.join(folder, name)
    os.mkdir(folder)
    parser.doctor = lambda _: write(path)
    told[name] = [cli.main(["doctor"]), os.listdir(folder)]
    with open(path, "w") as file:
        file.write("what was there")
    told[name] += [cli.main(["doctor"]), os.listdir(folder), open(path).read()]
print(json.dumps(told))
"""
"""Writes files of every kind where they do not fit: into an empty folder, and over a file."""


def test_files_that_do_not_fit_are_one_line_each_and_nothing_half_written(tmp_path):
    done = subprocess.run([sys.executable, "-c", WRITE, str(tmp_path)], capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert told == {name: [1, [], 1, [name], "what was there"] for name in told} and len(told) == 5
    lines = [line for line in done.stderr.splitlines() if line.startswith("hedgespec")]
    assert len(lines) == 10 and "Traceback" not in done.stderr
    for line in lines:
        assert "expected room for what is to be written, got: File too large; free some, or write to another place" in line


def test_a_text_on_stdin_is_utf_8_whatever_the_terminal_says(ngram):
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    command = [*ENTER, "generate", "-", *map(str, ngram)]
    done = subprocess.run([*command, "--json"], input="café".encode(), capture_output=True, env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["text"] == " 日🙂"
    done = subprocess.run(command, input="café".encode("latin-1"), capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().startswith("hedgespec: error: PROMPT: expected a text in UTF-8 on stdin, got what is none (")
    assert done.stderr.decode().endswith("iconv -t utf-8 converts it\n") and done.stderr.count(b"\n") == 1


def test_an_argument_that_is_no_utf_8_is_wrong_usage(ngram):
    done = subprocess.run([*ENTER, "generate", b"caf\xe9", *map(str, ngram)], capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"hedgespec: error: PROMPT: expected a text in UTF-8, got what is none (")


def test_an_ascii_terminal_gets_the_whole_text_escaped_and_is_told_once(ngram):
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment.pop("PYTHONIOENCODING", None)
    # Both commands in one process, which imports torch once: first text, then JSON, of a prompt in UTF-8.
    code = """import sys
from hedgespec.cli import main
*argv, prompt, second = sys.argv[1:]
sys.exit(main([*argv, prompt]) or main([*argv, second, "--json"]))"""
    command = [sys.executable, "-c", code, "generate", *map(str, ngram), "c", "café"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0
    text = STORY[1:].encode("ascii", "backslashreplace") + b"\n"
    assert done.stdout.startswith(text)
    [line] = done.stderr.decode().splitlines()  # of the first: JSON needs no escapes of ours
    assert line.startswith("hedgespec: warning: characters that ") and line.endswith("PYTHONIOENCODING=utf-8 shows them")
    assert done.stdout.isascii() and json.loads(done.stdout.removeprefix(text))["text"] == " 日🙂"


def test_tables_into_a_closed_pipe_have_the_same_exit_code():
    process = subprocess.Popen([*ENTER, "zoo", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


@pytest.mark.parametrize("argv", [["generate", "--help"], ["generate", "x", "--top-p", "2"]], ids=" ".join)
def test_help_and_wrong_usage_answer_without_loading_torch(argv):
    code = (
        "import sys\nfrom hedgespec.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, *argv], capture_output=True).returncode == 0


def test_help_into_a_closed_pipe_is_quiet():
    process = subprocess.Popen([*ENTER, "generate", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 141)
    process.stderr.close()


def test_a_whole_run_leaves_nothing_but_the_text(place):
    drafters = ("--drafter", place.twin, "--drafter", place.head)
    done = enter("generate", "-", "--target", place.target, *drafters, input="c\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, STORY[1:] + "\n", "")
