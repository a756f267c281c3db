"""Heads of every format, built here by its own naming, against a plain reading of their arithmetic; and what is refused."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.captured import (
    FakeCuda,
    as_on_a_gpu,  # noqa: F401  a fixture
)
from helpers.checkpoint_cases import (  # noqa: F401  fixtures
    CASES,
    DRAFTED,
    HEADS,
    KV,
    VOCABULARY,
    WIDTH,
    Case,
    speculators,
    spoil,
    target,
    tensors_of,
    write,
)
from helpers.families import tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hedgespec
from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.drafters.checkpoints import inspect_drafter, is_head, load_drafter, save_drafter
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.stack import HeadStack
from hedgespec.drafters.stack_session import StackSession
from hedgespec.drafters.stack_weights import is_plain, kind_of
from hedgespec.errors import CheckpointError
from hedgespec.runtime.capture import CudaGraphs
from hedgespec.zoo.storage import save_head

CLOSE = dict(rtol=1e-5, atol=1e-5)
"""Angles are worked out in float32, all else in float64."""


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def made(case, target, tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = tensors_of(case, target)
    return write(tmp_path / "head", case, tensors), tensors


# --- the reference --------------------------------------------------------------------------------------------------


class Reference:
    """A head from the definitions of its format, one token and one attention head at a time."""

    def __init__(self, case: Case, tensors: dict[str, torch.Tensor], target):
        self.case, self.tensors = case, tensors
        own = tensors.get(f"{case.prefix}embed_tokens.weight")
        self.rows = target.get_input_embeddings().weight if own is None else own
        self.output = tensors.get("lm_head.weight", target.get_output_embeddings().weight)
        self.past: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean() + self.case.eps).sqrt() * self.tensors[f"{name}.weight"]

    def times(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.tensors[f"{name}.weight"] @ x + self.tensors.get(f"{name}.bias", 0)

    def turned(self, x: torch.Tensor, position: int) -> torch.Tensor:
        size, result = len(x), x.clone()
        frequency, factor = self.case.frequency or (lambda j, size, theta: theta ** (-2 * j / size), 1.0)
        for j in range(size // 2):
            angle = position * frequency(j, size, self.case.theta)
            a, b = x[j], x[j + size // 2]
            result[j] = factor * (a * math.cos(angle) - b * math.sin(angle))
            result[j + size // 2] = factor * (b * math.cos(angle) + a * math.sin(angle))
        return result

    def feature(self, states: torch.Tensor) -> torch.Tensor:
        """Of the target's hidden states at one position."""
        case = self.case
        if case.first:
            return states
        if "input_norm" in case.norms:
            states = self.norm("input_norm", states)
        names = [name for name in case.norms if name.startswith(("aux_norm", "fc_norm"))]
        if names:
            parts = [self.norm(case.prefix + name, part) for name, part in zip(names, states.split(WIDTH))]
            states = torch.cat(parts)
        return self.times(case.prefix + case.fc, states)

    def read(self, token: int, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes in one token; its logits, and the feature for the next."""
        case, layer, embedded, position = self.case, self.case.layer, self.rows[token], len(self.past)
        if case.first:
            if "embedding_layernorm" in case.norms:
                embedded = self.norm("embedding_layernorm", embedded)
            residual = self.times(case.fc, torch.cat([embedded, feature]))
            mixed = self.norm(f"{layer}input_layernorm", residual) if "input_layernorm" in case.in_layer else residual
        else:
            normed = self.norm(f"{layer}hidden_norm", feature)
            residual = normed if case.residual_normed else feature
            mixed = torch.cat([self.norm(f"{layer}input_layernorm", embedded), normed])
        queries, keys, values = (
            self.times(f"{layer}self_attn.{name}_proj", mixed).view(-1, case.head_dim) for name in ("q", "k", "v")
        )
        if "self_attn.q_norm" in case.in_layer:
            queries = torch.stack([self.norm(f"{layer}self_attn.q_norm", one) for one in queries])
            keys = torch.stack([self.norm(f"{layer}self_attn.k_norm", one) for one in keys])
        self.past.append(([self.turned(one, position) for one in keys], list(values)))
        attended = []
        for number, query in enumerate(queries):
            group = number * KV // HEADS
            scores = torch.stack([self.turned(query, position) @ keys[group] for keys, _ in self.past])
            share = (scores / case.head_dim**0.5).softmax(0)
            attended.append(share @ torch.stack([values[group] for _, values in self.past]))
        hidden = residual + self.times(f"{layer}self_attn.o_proj", torch.cat(attended))
        normed = self.norm(f"{layer}post_attention_layernorm", hidden)
        gate, up = self.times(f"{layer}mlp.gate_proj", normed), self.times(f"{layer}mlp.up_proj", normed)
        hidden = hidden + self.times(f"{layer}mlp.down_proj", gate / (1 + (-gate).exp()) * up)
        normed = self.norm(case.prefix + case.final, hidden) if case.final in case.norms else hidden
        return self.output @ normed, normed if case.feeds_norm else hidden


def text_of(target, layers: tuple[int, ...], length: int = 14, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and beside each the hidden states before it, read by hooks: inputs of layers, and what the final norm gives."""
    tokens = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    inputs: dict[int, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, kept, n=n: inputs.update({n: given[0][0]}), with_kwargs=True)
        for n, layer in enumerate(target.model.layers)
    ]
    norm = target.model.norm
    hooks.append(norm.register_forward_hook(lambda _, given, out: inputs.update({len(target.model.layers): out[0]})))
    target(tokens[None])
    for hook in hooks:
        hook.remove()
    states = torch.cat([inputs[layer] for layer in layers], -1)
    return tokens, torch.cat([torch.zeros_like(states[:1]), states[:-1]])


# --- they draft as they were trained --------------------------------------------------------------------------------


def test_a_head_is_what_its_format_says(case, made, target):
    """Forced, in chunks, and drafting on from what it has said itself."""
    path, tensors = made
    head = load_drafter(path, target)
    assert head.aux_layers == case.layers
    assert not head.training and not any(weight.requires_grad for weight in head.parameters())
    tokens, states = text_of(target, case.layers)
    reference = Reference(case, tensors, target)
    forced = [reference.read(int(token), reference.feature(row)) for token, row in zip(tokens[1:], states[1:])]
    logits = torch.stack([logits for logits, _ in forced])
    torch.testing.assert_close(head.teacher_forced_logits(tokens[None, 1:], states[None, 1:])[0], logits, **CLOSE)
    both = head.teacher_forced_logits(tokens[1:].expand(2, -1), torch.stack([states[1:], states[1:].flip(0)]))
    torch.testing.assert_close(both[0], logits, **CLOSE)

    session = head.session()
    rows = [session.consume(tokens[:5], states[:5], 4), session.consume(tokens[5:], states[5:], 9)]
    torch.testing.assert_close(torch.cat(rows), logits, **CLOSE)
    feature = forced[-1][1]
    for token in (3, 1, 4, 1):
        expected, feature = reference.read(token, feature)
        torch.testing.assert_close(session.step(torch.tensor([token])), expected, **CLOSE)
    ids = head.draft_to_target
    if case.mapped:
        assert ids.tolist() == (torch.arange(DRAFTED) + tensors["d2t"]).tolist()
    else:
        assert ids is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_pool_of_them_is_one_stack(case, target, tmp_path, dtype):
    """Seven heads where they share the target's embedding; a head with an embedding of its own is a stack by itself."""
    count = 1 if case.width != WIDTH else 7
    if dtype is torch.float32:
        target = LlamaForCausalLM(target.config).float().eval()
        target.get_input_embeddings().weight.data.normal_(generator=torch.Generator().manual_seed(0))
    heads = []
    for seed in range(count):
        path = write(tmp_path / str(seed), case, tensors_of(case, target, seed, own_embedding=False))
        heads.append(load_drafter(path, target, name=f"head-{seed}"))
    assert all(map(is_plain, heads))
    assert len({kind_of(head) for head in heads}) == 1
    exact = dtype is torch.float64 and heads[0].rope_factor == 1  # else cosines are rounded to float32 once more
    close = dict(rtol=0, atol=1e-10 if exact else 1e-6 if dtype is torch.float64 else 2e-3)
    texts = [text_of(target, case.layers, 12, seed) for seed in (1, 2)]
    alone = [[head.session() for head in heads] for _ in texts]
    stack = HeadStack(heads)
    session, chosen = StackSession(stack, 2), [count - 1, count // 2]
    with torch.no_grad():
        session.score([0, 1], [tokens[:6] for tokens, _ in texts], [states[:6] for _, states in texts])
        led = session.begin_draft([0, 1], chosen, [tokens[6:8] for tokens, _ in texts], [states[6:8] for _, states in texts])
        stepped = [session.draft_next([0, 1], torch.tensor(pair)) for pair in ([3, 4], [5, 6])]
        had = session.score([0, 1], [tokens[6:] for tokens, _ in texts], [states[6:] for _, states in texts])
        for row, (tokens, states) in enumerate(texts):
            single = heads[chosen[row]].session()
            torch.testing.assert_close(led[row], single.consume(tokens[:8], states[:8], 1)[0], **close)
            for logits, pair in zip(stepped, ([3, 4], [5, 6])):
                torch.testing.assert_close(logits[row], single.step(torch.tensor(pair[row : row + 1])), **close)
            for number, one in enumerate(alone[row]):
                expected = one.consume(tokens, states, 7)[:-1]
                torch.testing.assert_close(had[number, row], expected, **close)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", ["SpecForge", "speculators", "speculators of Qwen3", "EAGLE-1", "speculators of EAGLE"])
def test_any_variant_can_be_captured(name, target, tmp_path):
    """No value on the device decides what a pass runs; the fake raises where one did."""
    case = CASES[name]
    count = 1 if case.width != WIDTH else 3
    heads = [load_drafter(write(tmp_path / str(n), case, tensors_of(case, target, n, own_embedding=False)), target)
             for n in range(count)]  # fmt: skip
    stack, graphs = HeadStack(heads), CudaGraphs(FakeCuda())
    texts, found = [text_of(target, case.layers, 12, seed) for seed in (1, 2)], []
    for captures in (None, graphs):
        session = StackSession(stack, 2, graphs=captures)
        session.score([0, 1], *zip(*[(tokens[:6], states[:6]) for tokens, states in texts]))
        led = session.begin_draft([0, 1], [count - 1, 0], *zip(*[(tokens[6:8], states[6:8]) for tokens, states in texts]))
        stepped = session.draft_next([0, 1], torch.tensor([3, 4]))
        found.append([led, stepped, session.score([0, 1], *zip(*[(tokens[6:], states[6:]) for tokens, states in texts]))])
        assert session.graphs is captures
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


def test_the_targets_own_output_lies_in_a_stack_once(target, tmp_path):
    case = CASES["EAGLE-1"]
    heads = [load_drafter(write(tmp_path / str(n), case, tensors_of(case, target, n)), target) for n in range(3)]
    rows = target.get_output_embeddings().weight
    assert all(head.lm_head.weight.data_ptr() == rows.data_ptr() for head in heads)
    assert all(head.embedding is target.get_input_embeddings() for head in heads)
    assert HeadStack(heads).weights["lm_head.weight"].data_ptr() == rows.data_ptr()
    assert HeadStack(heads[:1]).weights["lm_head.weight"].data_ptr() == rows.data_ptr()


def test_what_equals_the_targets_is_the_targets(target, tmp_path):
    case = CASES["speculators of EAGLE"]
    tensors = tensors_of(case, target)
    tensors["lm_head.weight"] = target.get_output_embeddings().weight.clone()
    tensors["embed_tokens.weight"] = target.get_input_embeddings().weight.clone()
    head = load_drafter(write(tmp_path, case, tensors), target)
    assert head.lm_head.weight.data_ptr() == target.get_output_embeddings().weight.data_ptr()
    assert head.embedding is target.get_input_embeddings() and not head.owns_embedding
    tensors["embed_tokens.weight"][3, 3] += 1
    own = load_drafter(write(tmp_path, case, tensors), target)
    assert own.owns_embedding and own.embedding.weight.dtype is torch.float64
    assert "embed_tokens.weight" in dict(own.named_parameters())


def test_a_pool_of_all_formats_leaves_the_text_as_it_is(target, tmp_path):
    heads = [load_drafter(write(tmp_path / str(n), case, tensors_of(case, target)), target, name=name)
             for n, (name, case) in enumerate(CASES.items())]  # fmt: skip
    decoder = Decoder(target, heads, DecodeConfig(draft_length=3, learner="uniform"))
    prompt = torch.randint(VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(5))
    expected = target.generate(prompt, max_new_tokens=24, do_sample=False)
    out = decoder.generate(prompt, max_new_tokens=24, seed=0)
    assert out.sequences.tolist() == expected.tolist()
    assert not out.stats[0].failures
    assert sum(map(bool, out.stats[0].picks)) > 3


def test_a_teacher_that_does_not_fit_is_refused(target, tmp_path):
    head = load_drafter(write(tmp_path, CASES["official"], tensors_of(CASES["official"], target)), target)
    for shape in ((1, 4, 3 * WIDTH), (1, 5, 2 * WIDTH), (5, 3 * WIDTH)):
        with pytest.raises(ValueError, match=r"aux_hidden_states: expected \[B, T, 48\]"):
            head.teacher_forced_logits(torch.zeros(1, 5, dtype=torch.int64), torch.zeros(shape, dtype=torch.float64))


# --- targets --------------------------------------------------------------------------------------------------------

FAMILIES = ("Llama", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3Text")


def head_for(target, first: bool, seed: int = 0) -> EagleHead:
    """A head that reads a tiny target of `test_target`, by way of its files."""
    text = target.config.get_text_config(decoder=True)
    size, layers = text.hidden_size, text.num_hidden_layers
    config = EagleConfig(size, size, 4, 2, 8, 24, text.vocab_size, 30, (layers,) if first else (0, 1, 2),
                         version=1 if first else 3, norms=() if first else EagleConfig.norms)  # fmt: skip
    torch.manual_seed(seed)
    head = EagleHead(config, target.get_input_embeddings(), torch.arange(7, 37))
    for weight in head.parameters():
        nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.3)
    return head.requires_grad_(False).to(target.dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_inputs_of_layers_and_then_the_final_norms_output(family):
    model = tiny(family)
    tokens = torch.arange(1, 20) % 61
    inputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, given, kept: inputs.append(given[0]), with_kwargs=True)
    model.model.norm.register_forward_hook(lambda _, given, out: inputs.append(out))
    with torch.no_grad():
        states = model(tokens[None], output_hidden_states=True).hidden_states
    assert len(states) == len(inputs) == len(model.model.layers) + 1
    for given, expected in zip(states, inputs):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_decode_losslessly_over_any_target(family, tmp_path):
    model = tiny(family).double()
    heads = []
    for first in (False, True):
        folder = save_drafter(head_for(model, first), tmp_path / str(first), target=model)
        heads.append(load_drafter(folder, model, name=f"eagle-{1 if first else 3}"))
    prompt = torch.randint(1, 61, (1, 9), generator=torch.Generator().manual_seed(5))
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)
    out = Decoder(model, heads, DecodeConfig(draft_length=3, learner="uniform")).generate(prompt, max_new_tokens=24, seed=0)
    assert out.sequences.tolist() == expected.tolist()
    assert not out.stats[0].failures
    assert all(out.stats[0].picks)


@pytest.mark.parametrize("family", ["Gemma", "Gemma2", "Gemma3Text"])
def test_heads_read_rows_of_the_embedding_as_they_are(family):
    model, tokens = tiny(family), torch.tensor([3, 5])
    embedding, rows = model.get_input_embeddings(), head_for(model, False).embed(tokens)
    assert torch.equal(rows, embedding.weight[tokens])
    assert not torch.equal(rows, embedding(tokens))


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["official", "speculators"])
def test_what_is_written_is_read_again(case, made, target, tmp_path, layout):
    head = load_drafter(made[0], target)
    unplaced = layout == "official" and case.first and case.norms
    words = "layout: expected speculators for a head with embedding_layernorm, input_layernorm, norm"
    wanted = ("eagle" if case.first else "eagle3") if layout == "official" else layout
    if unplaced:
        with pytest.raises(ValueError, match=words):
            save_drafter(head, tmp_path / "again", wanted)
        return
    folder = save_drafter(head, tmp_path / "again", wanted, target=target)
    found = load_drafter(folder, target)
    assert found.config == head.config
    assert (found.name, found.owns_embedding) == ("again", head.owns_embedding)
    assert found.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(one, found.state_dict()[name]) for name, one in head.state_dict().items())
    tokens, states = text_of(target, case.layers)
    both = [one.teacher_forced_logits(tokens[None, 1:], states[None, 1:]) for one in (head, found)]
    assert torch.equal(*both)
    report = inspect_drafter(folder)
    assert not report.faults
    assert report.format == ("speculators " if layout == "speculators" else "") + ("eagle" if case.first else "eagle3")
    left = [
        one for one in report.assumed if not one.startswith(("the target's", "aux layers", "norm_output", "the head drafts"))
    ]
    assert left == []  # all that can be said is said


def test_stacked_heads_are_written_one_by_one_and_in_another_dtype(target, tmp_path):
    case = CASES["official"]
    heads = [load_drafter(write(tmp_path / str(n), case, tensors_of(case, target, n)), target) for n in range(2)]
    stack = HeadStack(heads)
    folder = save_drafter(heads[1], tmp_path / "again", dtype=torch.bfloat16)
    assert stack.is_current()
    tensors = load_file(folder / "model.safetensors")
    assert tensors["fc.weight"].dtype is torch.bfloat16 and tensors["d2t"].dtype is torch.int64
    assert torch.equal(tensors["fc.weight"], heads[1].fc.weight.bfloat16())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert sum(one.numel() for one in tensors.values()) < 5000
    assert load_drafter(folder, target).fc.weight.dtype is torch.float64


def test_the_default_layout_is_the_official_one(target, tmp_path):
    case = CASES["official"]
    head = load_drafter(write(tmp_path / "head", case, tensors_of(case, target)), target)
    assert "midlayer.hidden_norm.weight" in load_file(hedgespec.save_drafter(head, tmp_path / "again") / "model.safetensors")
    for layout in ("eagle", "klingon"):
        with pytest.raises(ValueError, match=f"layout: expected eagle3 or speculators for this head, got '{layout}'"):
            save_drafter(head, tmp_path / "again", layout)


def test_exports_say_what_engines_ask_for(target, tmp_path):
    """The fields that vLLM 0.32 reads, by either way."""
    case = CASES["official"]
    head = load_drafter(write(tmp_path / "head", case, tensors_of(case, target)), target)
    official = json.loads((save_drafter(head, tmp_path / "a", target=target) / "config.json").read_text())
    assert official["architectures"] == ["LlamaForCausalLMEagle3"] and official["model_type"] == "llama"
    assert (
        official["eagle_aux_hidden_state_layer_ids"]
        == official["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        == [2, 4, 5]
    )
    assert (official["num_aux_hidden_states"], official["num_hidden_layers"]) == (3, 1)
    assert (official["draft_vocab_size"], official["vocab_size"]) == (DRAFTED, VOCABULARY)
    assert official["norm_before_residual"] is False
    assert official["max_position_embeddings"] == 128
    other = json.loads((save_drafter(head, tmp_path / "b", "speculators", target=target) / "config.json").read_text())
    assert "model_type" not in other  # else it is not known as speculators'
    assert other["speculators_model_type"] == "eagle3" and other["norm_before_residual"] is False
    assert other["transformer_layer_config"]["model_type"] == "llama"
    assert other["speculators_config"]["proposal_methods"][0]["speculative_tokens"] >= 1
    assert other["speculators_config"]["verifier"] == {"name_or_path": None, "architectures": []}


@pytest.mark.parametrize(("given", "loaded", "expected"), [(None, "someone/model", "someone/model"), ("a/b", "c/d", "a/b"),
                                                           (None, ".", None), (None, "", None)])  # fmt: skip
def test_the_verifier_is_named_by_what_others_can_load(target, tmp_path, monkeypatch, given, loaded, expected):
    case = CASES["official"]
    head = load_drafter(write(tmp_path / "head", case, tensors_of(case, target)), target)
    monkeypatch.setattr(target, "name_or_path", loaded, raising=False)
    folder = save_drafter(head, tmp_path / "again", "speculators", target=target, verifier=given)
    assert json.loads((folder / "config.json").read_text())["speculators_config"]["verifier"]["name_or_path"] == expected


# --- where they lie -------------------------------------------------------------------------------------------------


@pytest.fixture
def official(target, tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    case = CASES["official"]
    tensors = tensors_of(case, target)
    return write(tmp_path / "official", case, tensors), tensors


def same(head: EagleHead, tensors: dict[str, torch.Tensor]) -> bool:
    return torch.equal(head.fc.weight, tensors["fc.weight"]) and torch.equal(head.lm_head.weight, tensors["lm_head.weight"])


def test_a_file_a_folder_and_shards(official, target):
    folder, tensors = official
    assert same(load_drafter(folder / "model.safetensors", target), tensors)
    assert load_drafter(str(folder), target).name == load_drafter(folder / "model.safetensors", target).name == "official"
    assert load_drafter(folder, target, name="mine").name == "mine"
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert same(load_drafter(folder, target), tensors)
    (folder / "weights.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:6], "model-2.safetensors": names[6:]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load_drafter(folder, target), tensors)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected shards beside it, found none of model-2.safetensors"):
        load_drafter(folder, target)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected an index of shards"):
        load_drafter(folder, target)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "head.pt"])
def test_a_pickle_is_read_if_asked_for_and_runs_nothing(official, target, name):
    folder, tensors = official
    torch.save({"state_dict": tensors} if name == "head.pt" else tensors, folder / name)
    assert same(load_drafter(folder, target), tensors)  # safetensors come first
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"expected weights in safetensors, got the pickle {name}.*allow_pickle"):
        load_drafter(folder, target)
    assert not is_head(folder) and is_head(folder, allow_pickle=True)
    assert same(load_drafter(folder, target, allow_pickle=True), tensors)
    assert same(load_drafter(folder / name, target, allow_pickle=True), tensors)
    (folder / name).write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(CheckpointError, match="expected a pickle of tensors that can be read"):
        load_drafter(folder, target, allow_pickle=True)
    torch.save([1, 2], folder / name)
    with pytest.raises(CheckpointError, match="expected a pickle of tensors by name"):
        load_drafter(folder, target, allow_pickle=True)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle has run",)


def test_the_hub_is_asked_after_what_is_here(official, target, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder, tensors = official
    calls: list[tuple[str, bool]] = []

    def download(repository, *, revision, allow_patterns, local_files_only=False):
        assert (revision, "*.bin" in allow_patterns) == ("v2", False)
        calls.append((repository, local_files_only))
        if local_files_only and len(calls) == 1:
            raise LocalEntryNotFoundError("not here")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    head = load_drafter("someone/EAGLE3-tiny", target, revision="v2")
    assert same(head, tensors) and head.name == "EAGLE3-tiny"
    assert calls == [("someone/EAGLE3-tiny", True), ("someone/EAGLE3-tiny", False)]
    load_drafter("someone/EAGLE3-tiny", target, revision="v2")
    assert calls[2:] == [("someone/EAGLE3-tiny", True)]

    def nothing(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing)
    with pytest.raises(CheckpointError, match=r"a repository of the hub that can be reached, got someone/none \(offline\)"):
        load_drafter("someone/none", target)
    for path in ("klingon", "/no/such/folder", "a/b/c"):
        with pytest.raises(CheckpointError, match=f"path: expected .* found none at {path}"):
            load_drafter(path, target)


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(path: Path, target, *words: str, **options) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_drafter(path, target, **options)
    for word in words:
        assert word in str(caught.value)


def test_every_fault_is_named_in_one_error(official, target):
    path = spoil(official, fc__weight=torch.ones(16, 49), norm__weight=None, midlayer__mlp__up_proj__weight=None,
                 odd=torch.ones(2), midlayer__self_attn__k_proj__weight=torch.ones(8, 31), d2t=torch.full((DRAFTED,), 39),
                 midlayer__hidden_norm__weight=torch.ones(16, dtype=torch.int64))  # fmt: skip
    words = (
        "fc.weight has shape (16, 49), expected (16, 48)", "norm.weight is missing", "midlayer.mlp.up_proj.weight is missing",
        "odd is not known", "midlayer.self_attn.k_proj.weight has shape (8, 31), expected (8, 32)",
        "d2t leaves 0..39: id = i + d2t[i], got 39 to 63", "midlayer.hidden_norm.weight is int64, expected floating point",
    )  # fmt: skip
    refused(path, target, *words)
    assert len(inspect_drafter(path).faults) == len(words)


OFFSETS = torch.zeros(DRAFTED, dtype=torch.int64)
REFUSED = {
    "an id twice": ({}, {"d2t": OFFSETS.index_fill(0, torch.tensor([1]), -1)}, "d2t names ids twice"),
    "absolute ids": ({}, {"d2t": torch.arange(15, 40)}, "d2t leaves 0..39: id = i + d2t[i]"),
    "maps that differ": ({}, {"d2t": OFFSETS}, "d2t and t2d name different ids"),
    "a map too short": ({}, {"d2t": OFFSETS[:20], "t2d": None}, "d2t names 20 ids, expected 25"),
    "no map": ({}, {"d2t": None, "t2d": None}, "d2t is missing for a draft vocabulary of 25 of 40"),
    "a vocabulary of another size": ({}, {"t2d": torch.ones(39).bool()}, "t2d has shape (39,), expected (40,)"),
    "an embedding of another size": (
        {},
        {"embed_tokens__weight": torch.ones(39, 16)},
        "embed_tokens.weight has shape (39, 16)",
    ),
    "another width": ({"target_hidden_size": 24}, {}, "expected a target of width 24, got 16"),
    "dynamic positions": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}, "rope_type default, linear, llama3, yarn"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, {}, "partial_rotary_factor 0.5"),
    "an odd width": ({"head_dim": 5}, {}, "expected an even head_dim, got 5"),
    "positions by layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, {}, "positions of one kind"),
    "half of llama3": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {},
        "expected low_freq_factor, high_freq_factor",
    ),
    "another activation": ({"hidden_act": "gelu"}, {}, "expected hidden_act silu, got gelu"),
    "scaled logits": ({"logit_scale": 0.5}, {}, "expected logit_scale 1, got 0.5"),
    "one hidden state": ({"eagle_config": {"use_aux_hidden_state": False}}, {}, "got use_aux_hidden_state false"),
    "too few aux layers": ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, {}, "fc.weight has shape (16, 48), expected (16, 32)"),
    "an aux layer twice": ({"eagle_aux_hidden_state_layer_ids": [1, 2, 2]}, {}, "a list of distinct aux layers >= 0"),
    "an aux layer that is not there": (
        {"eagle_aux_hidden_state_layer_ids": [1, 2, 9]},
        {},
        "a target of more than 9 layers, got 8",
    ),
    "the last output": (
        {"eagle_aux_hidden_state_layer_ids": [1, 2, 8]},
        {},
        "aux layer 8 is the last layer's output before the",
    ),
    "no norm that is promised": ({"norm_before_fc": True}, {}, "input_norm.weight is missing"),
    "part of a bias": ({}, {"midlayer__self_attn__q_proj__bias": torch.ones(16)}, "midlayer.self_attn.k_proj.bias is missing"),
    "a norm of EAGLE-1": ({}, {"embedding_layernorm__weight": torch.ones(16)}, "embedding_layernorm.weight is not known"),
    "two layers": ({}, {"layers__1__mlp__up_proj__weight": torch.ones(2, 2)}, "expected a head of one decoder layer, got 2"),
    "no head": ({}, {"midlayer__self_attn__o_proj__weight": None}, "expected an EAGLE head (fc.weight and one decoder layer's"),
    "a tensor twice": ({}, {"model__norm__weight": torch.ones(16)}, "is there as"),
    "no number of heads": ({"num_attention_heads": None}, {}, "expected num_attention_heads >= 1 in config.json, got None"),
    "another speculator": ({"speculators_model_type": "dflash"}, {}, "expected an EAGLE head, got speculators' dflash"),
    "heads that do not divide": ({"num_key_value_heads": 3}, {}, "expected num_key_value_heads to divide 4"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_draft_wrongly_is_refused(official, target, what):
    config, tensors, word = REFUSED[what]
    refused(spoil(official, config, **tensors), target, word)


def test_files_that_cannot_be_read(official, target, tmp_path):
    folder, _ = official
    config, weights = (folder / name for name in ("config.json", "model.safetensors"))
    kept = weights.read_bytes()
    for change, word in (
        (lambda: weights.write_bytes(kept[:-9]), "expected a readable safetensors file"),
        (lambda: weights.write_bytes(b"noise" * 99), "expected a readable safetensors file"),
        (weights.unlink, "expected weights in safetensors, found none"),
        (lambda: [weights.write_bytes(kept), config.write_text("[1]")], "expected an object in config.json, got list"),
        (lambda: config.write_text("{"), "expected a config.json that can be read"),
        (config.unlink, "expected a config.json beside the weights, found none"),
    ):
        change()
        refused(folder, target, word)
        assert not is_head(folder)


def test_other_models_are_no_heads(target, tmp_path):
    target.save_pretrained(tmp_path / "model")
    assert not is_head(tmp_path / "model")
    refused(tmp_path / "model", target, "expected an EAGLE head", "got the tensors lm_head.weight")
    head = EagleHead(EagleConfig(16, 16, 4, 2, 4, 8, 40, 10, (0, 1)), target.get_input_embeddings(), torch.arange(10))
    save_head(head, tmp_path / "zoo.safetensors")
    assert not is_head(tmp_path / "zoo.safetensors")
    refused(tmp_path / "zoo.safetensors", target, "got a head of HedgeSpec's zoo", "load_head")


# --- what is assumed ------------------------------------------------------------------------------------------------


def test_an_inspection_says_what_is_there_and_what_is_made_up(official, target):
    folder, tensors = official
    found = inspect_drafter(folder)
    assert (found.format, found.dtype, found.vocab_size, found.draft_vocab_size) == ("eagle3", "float64", VOCABULARY, DRAFTED)
    assert found.tensors == {name: tuple(one.shape) for name, one in tensors.items()}
    assert found.aux_layers is None and inspect_drafter(folder, target).aux_layers == (2, 4, 5)
    assert not found.faults
    for word in ("head_dim 4, hidden_size / num_attention_heads", "rope_theta 10000.0", "the target's embedding",
                 "aux layers (2, n // 2, n - 3)"):  # fmt: skip
        assert any(word in one for one in found.assumed), word
    assert not any("rms_norm_eps" in one for one in found.assumed)


def test_aux_layers_can_be_given_and_otherwise_ascend(official, target):
    def layers(ids=None, **options):
        return load_drafter(spoil(official, {"eagle_aux_hidden_state_layer_ids": ids}), target, **options).aux_layers

    assert layers() == (2, 4, 5)
    assert layers([5, 1, 3]) == (1, 3, 5)
    assert layers([1, 3, 5], aux_layers=(2, 4, 6)) == (2, 4, 6)
    assert layers(aux_layers=[6, 2, 4]) == (6, 2, 4)
    assert "as vLLM counts; SGLang adds 1" in str(inspect_drafter(spoil(official, {"eagle_config": {
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}})).assumed)  # fmt: skip
    refused(spoil(official, fc__weight=torch.ones(16, 32)), target, "fc.weight reads 2 layers", "give aux_layers")
    head = load_drafter(spoil(official, fc__weight=torch.ones(16, 32)), target, aux_layers=(1, 2))
    assert head.config.shapes["fc.weight"] == (16, 32)


def test_the_default_aux_layers_need_a_deep_target(official, target):
    shallow = LlamaForCausalLM(LlamaConfig(**target.config.to_dict() | {"num_hidden_layers": 4})).double()
    refused(official[0], shallow, "the default aux layers are (2, 2, 1) for a target of 4 layers: give aux_layers")
    assert load_drafter(official[0], shallow, aux_layers=(0, 1, 2)).aux_layers == (0, 1, 2)


@pytest.mark.parametrize(("said", "speculators", "expected"), [(None, True, True), (False, True, False), (None, False, False),
                                                               (True, False, True)])  # fmt: skip
def test_norm_before_residual_is_vllms(official, target, said, speculators, expected):
    config = {"norm_before_residual": said} | ({"speculators_model_type": "eagle3"} if speculators else {})
    path = spoil(official, config)
    assert load_drafter(path, target).config.norm_before_residual == expected
    assumed = any("norm_before_residual True" in one for one in inspect_drafter(path).assumed)
    assert assumed == (said is None and speculators)


def test_a_norm_that_is_switched_off_is_left_out(official, target):
    path = spoil(official, {"norm_before_fc": False}, input_norm__weight=torch.ones(48))
    assert "input_norm" not in load_drafter(path, target).config.norms
    assert any("input_norm is not used" in one for one in inspect_drafter(path).assumed)
    assert "input_norm" in load_drafter(spoil(official, input_norm__weight=torch.ones(48)), target).config.norms


def test_the_map_from_t2d_alone_and_maps_of_everything(official, target):
    ids = load_drafter(official[0], target).draft_to_target
    path = spoil(official, d2t=None)
    assert torch.equal(load_drafter(path, target).draft_to_target, ids)
    assert any("order of t2d" in one for one in inspect_drafter(path).assumed)
    path = spoil(official, {"draft_vocab_size": VOCABULARY}, d2t=torch.zeros(VOCABULARY, dtype=torch.int64),
                 t2d=torch.ones(VOCABULARY).bool(), lm_head__weight=torch.ones(VOCABULARY, 16))  # fmt: skip
    assert load_drafter(path, target).draft_to_target is None


def test_rows_of_the_targets_output_where_a_head_has_none(official, target):
    path = spoil(official, lm_head__weight=None)
    head = load_drafter(path, target)
    assert torch.equal(head.lm_head.weight, target.get_output_embeddings().weight[head.draft_to_target])
    assert any("the target's output matrix, rows" in one for one in inspect_drafter(path).assumed)


def test_the_number_of_the_layer_means_nothing(target, tmp_path):
    case = replace(CASES["official"], layer="model.layers.32.")
    tensors = tensors_of(case, target)
    assert same(load_drafter(write(tmp_path, case, tensors), target), tensors)


def test_num_hidden_layers_and_architectures_mean_nothing(official, target):
    for config in (
        {"num_hidden_layers": 32},
        {"architectures": ["Klingon"]},
        {"draft_vocab_size": None},
        {"model_type": "eagle"},
    ):
        assert same(load_drafter(spoil(official, config), target), official[1])
