"""What callers hand to a decoder: numbers of every kind, drafters of every kind, and which of them are refused how."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.decoding import VOCABULARY, WIDTH, pool, prompt_of, target, tiny_head, tiny_llama  # noqa: F401  fixtures

import hedgespec
from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.datastore import Datastore, DatastoreDrafter
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.errors import VocabularyMismatchError
from hedgespec.learners import NAMES, make
from hedgespec.learners.base import Learner
from hedgespec.ops.linear import FewRowLinear
from hedgespec.selection.select import select
from hedgespec.zoo.storage import load_head, save_head

PROMPT, LENGTH = prompt_of(0), 24


@pytest.fixture(scope="module")
def plain(target) -> list[int]:
    """The target's own continuation."""
    return target.generate(PROMPT, max_new_tokens=LENGTH, do_sample=False)[0, PROMPT.shape[1] :].tolist()


@pytest.fixture
def decoder(target) -> Decoder:
    return Decoder(target, [NGramDrafter(VOCABULARY)])


def continued(decoder: Decoder, **options) -> list[int]:
    return decoder.generate(PROMPT, **{"max_new_tokens": LENGTH} | options).sequences[0, PROMPT.shape[1] :].tolist()


# Ids that end a text


ENDS = {
    "an int": int, "NumPy's": np.int64, "an array": np.array, "an array [1]": lambda one: np.array([one]),
    "a tensor": torch.tensor, "a tensor [1]": lambda one: torch.tensor([one]), "a list": lambda one: [one],
    "a list of tensors": lambda one: [torch.tensor(one)], "a set": lambda one: {one},
    "int32": lambda one: torch.tensor([one], dtype=torch.int32),
    "a tensor [2]": lambda one: torch.tensor([one, one]), "mixed": lambda one: (np.int32(one), torch.tensor([one])),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("door", ["argument", "generation config", "custom_generate"])
def test_an_id_of_any_kind_ends_the_text(target, decoder, plain, kind, door, monkeypatch):
    end = ENDS[kind](plain[5])
    expected = plain[: plain.index(plain[5]) + 1]
    if door == "argument":
        found = continued(decoder, eos_token_id=end)
    else:
        monkeypatch.setattr(target.generation_config, "eos_token_id", end)
        if door == "custom_generate":
            if kind in ("a list of tensors", "a set", "mixed"):
                pytest.skip("plain generate refuses it")
            out = target.generate(PROMPT, max_new_tokens=LENGTH, do_sample=False, custom_generate=decoder, pad_token_id=0)
            found = out[0, PROMPT.shape[1] :].tolist()
        else:
            found = continued(decoder)
    assert found == expected


def test_no_id_ends_the_text(target, decoder, plain, monkeypatch):
    for none in ((), [], torch.tensor([], dtype=torch.int64), None):
        assert continued(decoder, eos_token_id=none) == plain
    monkeypatch.setattr(target.generation_config, "eos_token_id", -1)  # as some configurations say "none"
    assert continued(decoder) == plain
    for wrong in (-1, VOCABULARY, [1, VOCABULARY]):
        with pytest.raises(ValueError, match=r"eos_token_id: expected 0\.\.52 or a sequence of ints or None, got"):
            continued(decoder, eos_token_id=wrong)
    for wrong in ("2", 2.0, True, [None], torch.tensor([2.0]), torch.tensor([[2]]), {2: 2}):
        with pytest.raises(TypeError, match="eos_token_id: expected an int or a sequence of ints"):
            continued(decoder, eos_token_id=wrong)


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor, lambda one: torch.tensor([one])])
def test_ids_that_fill_up_and_counts_may_be_of_any_kind(target, decoder, plain, kind, monkeypatch):
    ids = torch.cat([PROMPT, prompt_of(1)])
    ends = plain[: plain.index(plain[5]) + 1]
    for options in ({"pad_token_id": kind(7)}, {}):
        if not options:
            monkeypatch.setattr(target.generation_config, "pad_token_id", kind(7))
        out = decoder.generate(ids, max_new_tokens=kind(LENGTH), eos_token_id=kind(plain[5]), seed=kind(3), **options)
        row = out.sequences[0, PROMPT.shape[1] :].tolist()
        assert row == ends + [7] * (len(row) - len(ends))
    with pytest.raises(TypeError, match="pad_token_id: expected an int or None, got '7'"):
        continued(decoder, pad_token_id="7")


@pytest.mark.parametrize("kind", [int, np.uint32, np.array, torch.tensor])
def test_a_seed_of_any_kind_is_that_seed(target, kind):
    decoder = Decoder(target, pool(target)[:2])
    options = {"temperature": 1.0, "top_k": 20}
    expected = continued(decoder, seed=11, **options)
    assert continued(decoder, seed=kind(11), temperature=np.float32(1), top_k=torch.tensor(20)) == expected
    assert continued(decoder, seed=kind(12), **options) != expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        *(({"max_new_tokens": value}, TypeError, "max_new_tokens: expected an int, got")
          for value in (1.5, True, "8", None, torch.tensor(8.0))),
        ({"max_new_tokens": torch.tensor(0)}, ValueError, "max_new_tokens: expected at least 1, got 0"),
        *(({"seed": value}, TypeError, "seed: expected an int or None, got") for value in (1.5, True, "1", [1])),
        ({"seed": -1}, ValueError, "seed: expected at least 0 or None, got -1"),
        *(({"top_k": value}, TypeError, "top_k: expected an int or None, got") for value in (1.5, "5", True)),
        *(({"temperature": value}, TypeError, "temperature: expected a number, got") for value in ("1", None, True, [1.0])),
        *(({name: "0.5"}, TypeError, f"{name}: expected a number or None, got '0.5'") for name in ("top_p", "min_p")),
        *(({"attention_mask": value}, TypeError, "attention_mask: expected a torch.Tensor or None, got")
          for value in ([[1] * 11], np.ones((1, 11)), "1")),
        *(({"learner_state": value}, TypeError, "learner_state: expected a dict as Learner.state_dict() returns")
          for value in ("tenant.json", b"x", 3, [3], ["tenant.json"], {1}, torch.ones(2))),
        ({"learner_state": [{}, {}]}, ValueError, "learner_state: expected one for each of 1 rows, got 2"),
        ({"learner_state": {}}, ValueError, "missing"),
        ({"on_tokens": 3}, TypeError, "on_tokens: expected a function or None, got 3"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids: expected an int64 tensor, got list"),
        ({"input_ids": torch.ones(1, 3).half()}, TypeError, "input_ids: expected an int64 tensor, got torch.float16"),
    ],
)  # fmt: skip
def test_arguments_of_another_type_are_refused_by_name(decoder, arguments, error, message):
    with pytest.raises(error) as caught:
        decoder.generate(**{"input_ids": PROMPT, "max_new_tokens": LENGTH} | arguments)
    assert message in str(caught.value)


def test_a_path_as_a_state_says_who_reads_it(decoder, tmp_path):
    for path in ("tenant.json", tmp_path / "tenant.json"):
        with pytest.raises(TypeError, match="hedgespec.load_learner_state reads a file"):
            continued(decoder, learner_state=path)


def test_int32_ids_are_read_as_in_plain_generate(target, decoder, plain):
    out = decoder.generate(PROMPT.int(), max_new_tokens=LENGTH)
    assert out.sequences.dtype == torch.int64 and out.sequences[0, PROMPT.shape[1] :].tolist() == plain


# Drafters


def drafter(**attributes) -> NGramDrafter:
    made = NGramDrafter(VOCABULARY, name="odd")
    vars(made).update(attributes)
    return made


IDS = torch.arange(VOCABULARY)


@pytest.mark.parametrize(
    ("attributes", "error", "message"),
    [
        ({"draft_to_target": IDS + 1}, VocabularyMismatchError, "draft_to_target: expected ids in 0..52, got 53"),
        ({"draft_to_target": IDS - 1}, VocabularyMismatchError, "draft_to_target: expected ids in 0..52, got -1"),
        ({"draft_to_target": IDS // 2}, VocabularyMismatchError, "expected draft_to_target of distinct ids, got some twice"),
        ({"draft_to_target": IDS[:0]}, VocabularyMismatchError, "draft_to_target: expected at least one id, got none"),
        ({"draft_to_target": IDS.float()}, TypeError, "draft_to_target: expected an int64 tensor [Vd] or None, got"),
        ({"draft_to_target": IDS[None]}, TypeError, "draft_to_target: expected an int64 tensor [Vd] or None, got"),
        ({"draft_to_target": [1, 2]}, TypeError, "draft_to_target: expected an int64 tensor [Vd] or None, got [1, 2]"),
        ({"aux_layers": (99,)}, ValueError, "aux_layers: expected 0..4, got 99"),
        ({"aux_layers": (-1,)}, ValueError, "aux_layers: expected 0..4, got -1"),
        ({"aux_layers": (1.5,)}, TypeError, "aux_layers: expected an int, got 1.5"),
        ({"aux_layers": 2}, TypeError, "aux_layers: expected a tuple of layers, got 2"),
        ({"aux_layers": "12"}, TypeError, "aux_layers: expected a tuple of layers, got '12'"),
        ({"vocab_size": "53"}, TypeError, "vocab_size: expected an int, got '53'"),
        ({"vocab_size": VOCABULARY - 1}, VocabularyMismatchError, "expected the target's vocabulary of 53 tokens"),
        ({"vocab_size": VOCABULARY + 1}, VocabularyMismatchError, "expected the target's vocabulary of 53 tokens"),
    ],
)
def test_drafters_that_cannot_draft_for_the_target_are_refused_by_name(target, attributes, error, message):
    with pytest.raises(error) as caught:
        Decoder(target, [NGramDrafter(VOCABULARY), drafter(**attributes)])
    assert str(caught.value).startswith("drafter odd: ") and message in str(caught.value)


def test_what_is_no_drafter_and_no_pool_is_refused(target):
    with pytest.raises(TypeError, match="drafters: expected drafters with the attribute name, got str at 1"):
        Decoder(target, [NGramDrafter(VOCABULARY), "ngram"])
    for wrong in ("ngram", 3, None):
        with pytest.raises(TypeError, match="drafters: expected a sequence of drafters, got"):
            Decoder(target, wrong)
    with pytest.raises(TypeError, match=r"drafters\[0\].name: expected a str, got 3"):
        Decoder(target, [drafter(name=3)])
    with pytest.raises(TypeError, match="config: expected a DecodeConfig or None, got dict"):
        Decoder(target, [drafter()], {"draft_length": 3})


class Uncounted(NGramDrafter):
    """Its sessions count what they have taken in wrongly."""

    def __init__(self, count):
        super().__init__(VOCABULARY, name="uncounted")
        self.count = count

    def session(self):
        session = super().session()
        consume = session.consume

        def counted(tokens, features, logits_to_keep):
            before = session.verified
            logits = consume(tokens, features, logits_to_keep)
            session.verified = self.count(before, len(tokens))
            return logits

        session.consume = counted
        return session


@pytest.mark.parametrize("count", [lambda before, new: 0, lambda before, new: before, lambda before, new: before + 1])
def test_a_session_that_does_not_count_is_taken_out(target, plain, count):
    for others in ([], [tiny_head(target, 1), NGramDrafter(VOCABULARY)]):
        with pytest.warns(UserWarning, match="uncounted is out of this request: ValueError: expected consume to add its"):
            out = Decoder(target, [*others, Uncounted(count)]).generate(PROMPT, max_new_tokens=LENGTH, seed=0)
        assert out.sequences[0, PROMPT.shape[1] :].tolist() == plain
        assert list(out.stats[0].failures) == ["uncounted"]


def test_a_resized_target_is_told(tmp_path):
    model = tiny_llama(seed=0, layers=4)
    head, lookup = tiny_head(model, 1), NGramDrafter(VOCABULARY)
    save_head(head, tmp_path / "head.safetensors")
    before = Decoder(model, [head, lookup])
    model.resize_token_embeddings(VOCABULARY + 3)
    words = "make the drafters? .*anew"
    with pytest.raises(VocabularyMismatchError, match=f"drafter ngram: .*got 53; .*resize_token_embeddings, {words}"):
        Decoder(model, [lookup])
    with pytest.raises(VocabularyMismatchError, match=f"target: .*53 tokens .*got 56: after resize_token_embeddings, {words}"):
        before.generate(PROMPT)
    with pytest.raises(VocabularyMismatchError, match="resize_token_embeddings"):
        model.generate(PROMPT, custom_generate=before, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="vocabulary 53 .* got 56 and 16; .*resize_token_embeddings"):
        load_head(tmp_path / "head.safetensors", model)
    Decoder(model, [head, NGramDrafter(VOCABULARY + 3)]).generate(PROMPT, max_new_tokens=4)


# Constructors


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor, lambda one: torch.tensor([one])])
def test_constructors_keep_plain_ints(target, kind, tmp_path):
    lookup = NGramDrafter(kind(VOCABULARY), kind(2))
    store = Datastore.build([[1, 2, 3, 4]], kind(3))
    found = DatastoreDrafter(store, kind(VOCABULARY))
    for one in (lookup.vocab_size, lookup.max_ngram, store.max_ngram, found.vocab_size):
        assert type(one) is int
    sizes = (WIDTH, WIDTH, 4, 2, 4, 24, VOCABULARY, 29)
    config = EagleConfig(*map(kind, sizes), aux_layers=[kind(1), kind(2), kind(3)], rope_theta=kind(10000))
    assert config == EagleConfig(*sizes, (1, 2, 3), rope_theta=10000.0) and hash(config)
    save_head(EagleHead(config, target.get_input_embeddings(), torch.arange(29)), tmp_path / "head.safetensors")
    assert load_head(tmp_path / "head.safetensors", target).config == config
    for name in NAMES:
        learner = make(name, kind(3), **({"drafter": kind(1)} if name == "fixed" else {}))
        learner.update([0.1, 0.2, 0.3], chosen=kind(1), chosen_weight=kind(1))
        assert type(learner.num_drafters) is int
        assert learner.weights().shape == (3,)
        twin = make(name, 3, **({"drafter": 1} if name == "fixed" else {}))
        twin.load_state_dict(learner.state_dict())
    queue = hedgespec.DelayQueue(kind(2), kind(3))
    assert (type(queue.num_drafters), type(queue.draft_length)) == (int, int)


@pytest.mark.parametrize(
    ("make_it", "name"),
    [
        (lambda wrong: NGramDrafter(wrong), "vocab_size"),
        (lambda wrong: NGramDrafter(5, wrong), "max_ngram"),
        (lambda wrong: Datastore.build([[1, 2]], wrong), "max_ngram"),
        (lambda wrong: DatastoreDrafter(Datastore.build([[1, 2]]), wrong), "vocab_size"),
        (lambda wrong: EagleConfig(wrong, 8, 4, 2, 2, 8, 9, 9, (1,)), "hidden_size"),
        (lambda wrong: EagleConfig(8, 8, 4, 2, 2, 8, 9, 9, (wrong,)), "aux_layers"),
        *((lambda wrong, name=name: make(name, wrong), "num_drafters") for name in NAMES),
        (lambda wrong: make("fixed", 3, drafter=wrong), "drafter"),
        (lambda wrong: make("exp3", 3).update([0.1, 0.2, 0.3], chosen=wrong), "chosen"),
        (lambda wrong: hedgespec.DelayQueue(wrong, 2), "num_drafters"),
        (lambda wrong: hedgespec.DelayQueue(2, wrong), "draft_length"),
    ],
)
def test_constructors_refuse_what_is_no_int(make_it, name):
    for wrong in (1.0, "1", True, torch.tensor(1.0), np.float64(1), [1, 2]):
        with pytest.raises(TypeError, match=f"{name}: expected an int"):
            make_it(wrong)


def test_constructors_refuse_other_things(target):
    for wrong in ("0.5", True, [0.5]):
        with pytest.raises(TypeError, match="eta: expected a number or None, got"):
            make("hedge", 2, eta=wrong)
        with pytest.raises(TypeError, match="chosen_weight: expected a number, got"):
            make("exp3", 2).update([0.5, 0.5], chosen=0, chosen_weight=wrong)
        with pytest.raises(TypeError, match="uniform: expected a number, got"):
            select([0.5, 0.5], wrong)
    assert make("hedge", 2, eta=torch.tensor(0.5)).state_dict()["eta"] == 0.5
    assert select([0.5, 0.5], np.float32(0.75)) == select([0.5, 0.5], torch.tensor(0.75)) == 1
    for wrong in ("ab", ["a", "b"], [None, None], [[1], [1, 2]], [True, True]):
        with pytest.raises(TypeError, match="prior: expected 2 numbers or None, got"):
            make("normal_hedge", 2, prior=wrong)
    with pytest.raises(TypeError, match="name: expected a str, got 3"):
        make(3, 2)
    for make_it in (
        lambda: NGramDrafter(5, name=3),
        lambda: DatastoreDrafter(Datastore.build([[1, 2]]), 5, 3),
        lambda: CausalLMDrafter(tiny_llama(1, 1), target, name=3),
    ):
        with pytest.raises(TypeError, match="name: expected a str, got 3"):
            make_it()
    with pytest.raises(TypeError, match="datastore: expected a Datastore, got 'x.safetensors'; Datastore.load reads a file"):
        DatastoreDrafter("x.safetensors", 5)
    assert isinstance(make(np.str_("hedge"), 2), Learner)


# Heads that were in a decoder


def test_a_decoder_leaves_its_drafters_as_they_were(target, plain):
    heads = [tiny_head(target, seed) for seed in (1, 2)]
    before = [(weight.data_ptr(), weight._version, weight.clone()) for head in heads for weight in head.parameters()]
    decoders = [Decoder(target, heads), Decoder(target, heads[::-1], DecodeConfig(learner="uniform"))]
    for decoder in decoders:
        assert continued(decoder, seed=0) == plain
    for (place, version, value), weight in zip(before, (weight for head in heads for weight in head.parameters())):
        assert (weight.data_ptr(), weight._version) == (place, version) and torch.equal(weight, value)


@pytest.mark.parametrize("size", [13, 29, VOCABULARY])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_copy_with_another_draft_vocabulary_drafts(target, plain, size, renamed):
    """Its configuration may, or may not, have been told of its size. The suite fails on "stacked heads work apart"."""
    heads = [tiny_head(target, seed) for seed in (1, 2)]
    Decoder(target, heads).generate(PROMPT, max_new_tokens=4)
    twin = copy.deepcopy(heads[0])
    twin.name, twin.draft_to_target = "twin", torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))[:size]
    twin.lm_head = FewRowLinear(WIDTH, size, bias=False).double().requires_grad_(False)
    if renamed:
        twin.config = replace(twin.config, draft_vocab_size=size)
    for drafters in ([*heads, twin], [twin], [twin, tiny_head(target, 3)]):
        out = Decoder(target, drafters, DecodeConfig(learner="uniform")).generate(PROMPT, max_new_tokens=LENGTH, seed=0)
        assert out.sequences[0, PROMPT.shape[1] :].tolist() == plain
        assert out.stats[0].failures == {} and all(out.stats[0].picks)


def test_a_head_that_is_trained_moved_or_saved_goes_on_drafting(target, plain, tmp_path):
    heads = [tiny_head(target, seed) for seed in (1, 2)]
    decoder = Decoder(target, heads)
    first = decoder.stacks()[0][1]
    assert continued(decoder) == plain and decoder.stacks()[0][1] is first

    optimizer = torch.optim.SGD(heads[0].requires_grad_(True).parameters(), lr=0.1)
    logits = heads[0].teacher_forced_logits(PROMPT[:, 1:], torch.randn(1, PROMPT.shape[1] - 1, 3 * WIDTH, dtype=torch.float64))
    logits.square().mean().backward()
    optimizer.step()
    heads[0].requires_grad_(False)
    assert continued(decoder) == plain
    second = decoder.stacks()[0][1]
    assert second is not first and torch.equal(second.weights["fc.weight"][0], heads[0].fc.weight)
    assert torch.equal(second.weights["fc.weight"][1], heads[1].fc.weight)

    heads[1].float().double()  # moved, and moved back
    assert continued(decoder) == plain
    heads[0].load_state_dict(tiny_head(target, 5).state_dict())
    assert torch.equal(decoder.stacks()[0][1].weights["o_proj.weight"][0], heads[0].o_proj.weight)
    hedgespec.save_drafter(heads[0], tmp_path / "saved")
    torch.save(heads[0].state_dict(), tmp_path / "head.pt")
    assert continued(decoder) == plain


def test_a_decoder_can_be_copied_and_pickled(target, plain):
    decoder = Decoder(target, pool(target), DecodeConfig(objective="throughput"))
    assert continued(decoder, seed=0) == plain
    copies = [copy.deepcopy(decoder), copy.copy(decoder), pickle.loads(pickle.dumps(decoder))]
    for twin in copies:
        assert twin._lock is not decoder._lock
        assert continued(twin, seed=0) == plain
    assert copies[0].target is not target and copies[0].drafters[0].embedding is copies[0].target.get_input_embeddings()
    assert copies[0].stacks()[0][1] is not decoder.stacks()[0][1]


def test_decoders_do_not_wait_for_each_other(target, monkeypatch):
    """One that stacks its heads, or measures, holds no lock of another's."""
    decoders = [Decoder(target, pool(target)[:2], DecodeConfig(objective="throughput")) for _ in range(2)]
    with decoders[0]._lock, decoders[0].costs._lock:
        worker = threading.Thread(target=lambda: (decoders[1].stacks(), decoders[1].costs.drafted(1, 0, 0.5)))
        worker.start()
        worker.join(timeout=60)
        assert not worker.is_alive()
