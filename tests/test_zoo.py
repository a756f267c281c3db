"""The embedded zoo: a real model, real heads, real text."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hedgespec import DecodeConfig, Decoder, load_zoo
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.datastore import Datastore, check_vocabulary
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.errors import CheckpointError, VocabularyMismatchError, ZooError
from hedgespec.learners import NAMES as LEARNERS
from hedgespec.zoo import (
    EXPERTS,
    FOLDER,
    GENERALIST,
    NAMES,
    corpora,
    head_path,
    load_prompts,
    replay,
    storage,
    stores,
    templates,
)
from hedgespec.zoo.demo import run as run_demo
from hedgespec.zoo.shards import Row


@pytest.fixture(scope="module")
def zoo():
    return load_zoo()


def encode(zoo, prompt) -> torch.Tensor:
    return zoo.tokenizer(prompt.text, return_tensors="pt").input_ids


# --- what is shipped ------------------------------------------------------------------------------------------------


def test_the_heads_are_small_and_all_there():
    files = [head_path(name) for name in NAMES]
    assert len(EXPERTS) >= 6
    assert sum(file.stat().st_size for file in files) <= 32e6
    assert {file.stem for file in (FOLDER / "heads").glob("*.safetensors")} == set(NAMES)


def test_every_domain_has_held_out_prompts_with_source_and_licence():
    for domain in EXPERTS:
        prompts = load_prompts(domain)
        assert len(prompts) >= 30
        assert len({prompt.text for prompt in prompts}) == len(prompts)
        for prompt in prompts:
            assert prompt.text == prompt.text.rstrip() != ""
            assert prompt.source
            assert prompt.licence
            assert corpora.held_out(prompt.document)
    assert [prompt.domain for prompt in load_prompts()[:6]] == list(EXPERTS)
    with pytest.raises(ValueError, match="domain: expected one of python"):
        load_prompts("poetry")


def test_templates_are_reproducible_and_split_by_document():
    for make in (templates.sql, templates.math, templates.french, templates.chat):
        first, second = list(make()), list(make())
        assert first == second
        assert len({identifier for identifier, _ in first}) == len(first)
    domain = corpora.DOMAINS["sql"]
    train = corpora.prompts(domain, 50, side="train", characters=100)
    held_out = corpora.prompts(domain, 50, side="held_out", characters=100)
    assert not {name for name, _ in train} & {name for name, _ in held_out}
    assert all(len(text) == 100 for _, text in train)


# --- decoding with it -----------------------------------------------------------------------------------------------


def test_temperature_0_is_the_targets_own_text_on_20_prompts(zoo):
    """Whatever the learner, mode and drafters: token-identical to the target's generate, float32."""
    decoders = [Decoder(zoo.target, zoo.drafters, DecodeConfig(learner=learner)) for learner in LEARNERS]
    config = DecodeConfig(proposal="argmax", draft_length=3)
    decoders.append(Decoder(zoo.target, [*zoo.drafters[:2], NGramDrafter(49152)], config))
    for number, prompt in enumerate(load_prompts()[:20]):
        ids = encode(zoo, prompt)
        expected = zoo.target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        for decoder in (decoders[0], decoders[1 + number % (len(decoders) - 1)]):
            out = decoder.generate(ids, max_new_tokens=24, seed=number)
            assert out.sequences.tolist() == expected.tolist()
            assert not out.stats[0].failures


def test_replay_says_what_a_fixed_drafter_does(zoo):
    prompt = load_prompts("math")[0]
    for name in ("math", "french"):
        drafter = zoo.drafters[NAMES.index(name)]
        out = Decoder(zoo.target, [drafter], DecodeConfig(learner="fixed")).generate(encode(zoo, prompt), max_new_tokens=30)
        text = replay.read(zoo.target, out.sequences[0], encode(zoo, prompt).shape[1], zoo.drafters)
        assert replay.fixed_rounds(drafter, text, 5) == out.stats[0].emitted_by_round


def test_the_own_expert_is_found(zoo):
    decoder = Decoder(zoo.target, zoo.drafters)
    for domain in ("sql", "math"):
        stats = decoder.generate(encode(zoo, load_prompts(domain)[0]), max_new_tokens=64, seed=0).stats[0]
        own = NAMES.index(domain)
        assert (stats.late_choices(16) == own).mean() >= 0.5
        assert stats.tokens_per_round > 1.5


@pytest.mark.slow
def test_demo_returns_what_it_promises(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    close, figures = pyplot.close, []
    monkeypatch.setattr(pyplot, "close", lambda figure: figures.append(figure) or close(figure))
    result = run_demo(prompts_per_domain=1, max_new_tokens=16, plot=tmp_path / "weights.png", profile=tmp_path / "time.png")
    keys = {"speedup_vs_plain", "speedup_vs_generalist", "mat", "mat_generalist", "mat_best_fixed", "own_expert_share_after_16"}
    assert keys | {"domains"} == set(result)
    assert set(result["domains"]) == set(EXPERTS)
    assert all(keys <= set(domain) for domain in result["domains"].values())
    written = json.dumps(result)
    assert json.dumps(json.loads(written)) == written  # as text: a share of no rounds is NaN, which equals nothing
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("weights.png", "time.png"))
    stream = [prompt.domain for prompt in load_prompts()[: len(EXPERTS)]]  # a request of each domain, in order
    assert sorted(figure.axes[0].get_xlabel()[:2] for figure in figures) == ["ms", "re"]
    for figure in figures:
        axes = figure.axes[0]
        labels = axes.get_yticklabels() if axes.get_xlabel().startswith("ms") else axes.get_xticklabels()
        assert [label.get_text() for label in labels] == stream


# --- the file format ------------------------------------------------------------------------------------------------


@pytest.fixture
def small():
    """A tiny target and a head for it, in the zoo's format."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    target = LlamaForCausalLM(config).eval()
    head = EagleHead(EagleConfig(16, 16, 4, 2, 4, 24, 50, 30, (1, 2, 3)), target.get_input_embeddings(), torch.arange(0, 30))
    head.lm_head.weight.data = target.lm_head.weight[:30].detach().clone()
    return target, head.requires_grad_(False)


def test_quantisation_is_within_half_a_step():
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 30)
    parts = storage.quantize(weight)
    step = parts["row"][:, None] * parts["column"]
    assert ((storage.dequantize(parts) - weight).abs() <= 0.5001 * step).all()
    zeros = torch.zeros(3, 4)
    assert torch.equal(storage.dequantize(storage.quantize(zeros)), zeros)


def test_a_head_survives_its_file(small, tmp_path):
    target, head = small
    storage.save_head(head, path := tmp_path / "head.safetensors", name="mine")
    loaded = storage.load_head(path, target)
    assert loaded.name == "mine"
    assert loaded.config == head.config
    assert torch.equal(loaded.draft_to_target, head.draft_to_target)
    for (name, weight), (_, expected) in zip(loaded.state_dict().items(), head.state_dict().items(), strict=True):
        torch.testing.assert_close(weight, expected, atol=0.02 * float(expected.abs().max()), rtol=0, msg=name)
    out = Decoder(target, [loaded]).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20)
    assert out.sequences.tolist() == target.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20, do_sample=False).tolist()


def test_bad_files_are_refused_in_one_line(small, tmp_path):
    target, head = small
    storage.save_head(head, good := tmp_path / "good.safetensors", name="mine")
    tensors = load_file(good)

    with pytest.raises(CheckpointError, match="expected a readable safetensors file, found none at"):
        storage.load_head(tmp_path / "missing.safetensors", target)
    (corrupt := tmp_path / "corrupt.safetensors").write_bytes(good.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="expected a readable safetensors file"):
        storage.load_head(corrupt, target)
    (pickled := tmp_path / "head.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match="expected a safetensors file, got the pickle head.pt"):
        storage.load_head(pickled, target)
    save_file(tensors, plain := tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="expected format hedgespec-zoo-1, got None"):
        storage.load_head(plain, target)

    from safetensors import safe_open

    with safe_open(good, "pt") as file:
        metadata = file.metadata()
    wrong = {name: tensor for name, tensor in tensors.items() if name != "norm.weight"}
    wrong["fc.weight.row"] = torch.ones(3)
    wrong["extra"] = torch.ones(1)
    save_file(wrong, path := tmp_path / "wrong.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"fc.weight.row has shape \(3,\).*norm.weight is missing.*extra is not known"):
        storage.load_head(path, target)

    for ids, message in ((torch.full((30,), 7), "repeats ids"), (torch.arange(25, 55), "leaves 0..49")):
        save_file(tensors | {"draft_to_target": ids.int()}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=f"draft_to_target {message}"):
            storage.load_head(path, target)
    deeper = json.loads(metadata["config"]) | {"aux_layers": [1, 2, 9]}
    save_file(tensors, path, metadata=metadata | {"config": json.dumps(deeper)})
    with pytest.raises(CheckpointError, match="expected a target of more than 9 layers, got 4"):
        storage.load_head(path, target)
    save_file(tensors, path, metadata=metadata | {"config": "{}"})
    with pytest.raises(CheckpointError, match="expected the head's shapes in its metadata"):
        storage.load_head(path, target)

    other = LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    with pytest.raises(CheckpointError, match="expected a target of vocabulary 50 and width 16, got 60 and 16"):
        storage.load_head(good, other)
    with pytest.raises(VocabularyMismatchError, match="expected a vocabulary of 50 tokens, got 60"):
        CausalLMDrafter(other, target)


def test_unknown_heads_are_refused():
    with pytest.raises(ValueError, match=f"drafters: expected names among python.*{GENERALIST}, got 'poetry'"):
        load_zoo(["poetry"])


def test_a_domains_store_knows_best_what_follows_in_its_held_out_prompts(zoo):
    """Right next tokens, of the prompts' own, which no store was made of: the domain's store has most of the experts'."""
    experts = {name: stores.load_store(name) for name in EXPERTS}
    for domain in EXPERTS:
        texts = [zoo.tokenizer(prompt.text).input_ids for prompt in load_prompts(domain)[:6]]
        contexts = [text[:end] for text in texts for end in range(6, len(text))]
        following = np.array([text[end] for text in texts for end in range(6, len(text))])
        right = {name: (store.next_tokens(contexts) == following).mean() for name, store in experts.items()}
        own = right.pop(domain)
        assert own > 1.2 * max(right.values()), (domain, own, right)


def test_stores_are_over_the_targets_vocabulary():
    for name in NAMES:
        check_vocabulary(stores.load_store(name), 49152, name)
    with pytest.raises(ValueError, match="name: expected one of python, .*, got 'klingon'"):
        stores.load_store("klingon")


def test_stores_are_made_of_the_collected_rows(tmp_path):
    with pytest.raises(ZooError, match="stores: expected training rows, got none"):
        stores.build(tmp_path, [])
    rows = [
        Row(f"{number:016x}", source, "own", number == 2, 0.0, 2, 2, tokens)
        for number, (source, tokens) in enumerate(
            [("sql-self", [5, 6, 7, 8]), ("chat-self", [7, 8, 9, 2]), ("chat-self", [5, 6, 30, 31])]
        )
    ]
    told = []
    stores.build(tmp_path, rows, told.append)
    sql, everything = (Datastore.load(stores.store_path(name, tmp_path)) for name in ("sql", "chat"))
    assert sql.next_tokens([[5, 6], [7, 8]]).tolist() == [7, -1]
    assert everything.next_tokens([[5, 6], [7, 8], [6, 30]]).tolist() == [7, 9, -1]  # the third row is held out
    assert told == [
        f"sql: {len(sql)} entries from 4 tokens of 1 texts",
        f"chat: {len(everything)} entries from 8 tokens of 2 texts",
    ]
