"""The drop-in against the model's own generate: one line changes, and everything a user passes keeps its meaning.

Models are random and tiny, in float64, so that no tie turns with the order of sums.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib.util
import inspect
import math
import pickle
import string
import threading
import warnings

import pytest
import torch
import transformers
from helpers.decoding import Broken
from helpers.learners import ScoredUniform
from torch import nn
from transformers import (
    AsyncTextIteratorStreamer,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MistralConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import (
    BaseStreamer,
    EosTokenCriteria,
    EpsilonLogitsWarper,
    GenerateDecoderOnlyOutput,
    MinPLogitsWarper,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkingConfig,
)

import hedgespec
from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.integrations.transformers.checks import check_positions
from hedgespec.integrations.transformers.processors import split
from hedgespec.ops.sampling import Sampling
from hedgespec.runtime.compat import CACHE_NAME

VOCABULARY, WIDTH, PAD, PROMPT = 53, 16, 0, 9
LETTERS = "~ " + string.ascii_letters[: VOCABULARY - 2]
TINY = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    pad_token_id=None,
)  # fmt: skip


def tiny(kind=LlamaConfig, seed: int = 0, **options):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**TINY | options)).double().eval()
    model.generation_config.pad_token_id = PAD  # without one, generate talks about it at every call
    return model


def tiny_head(target, seed: int = 1) -> EagleHead:
    generator = torch.Generator().manual_seed(seed)
    config = EagleConfig(WIDTH, WIDTH, 4, 2, 4, 24, VOCABULARY, 29, (0, 1, 2))
    ids = torch.randperm(VOCABULARY, generator=generator)[:29].sort().values
    head = EagleHead(config, target.get_input_embeddings(), ids, name=f"head-{seed}").double()
    for weight in head.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return head.to(target.dtype).requires_grad_(False).eval()


def pool(model) -> list:
    """One that is always right, so that long drafts are accepted; a head and prompt lookup, mostly wrong."""
    return [CausalLMDrafter(model, model, name="right"), tiny_head(model), NGramDrafter(VOCABULARY)]


@functools.cache
def shared():
    model = tiny()
    return model, Decoder(model, pool(model), DecodeConfig(draft_length=3))


@pytest.fixture
def model():
    return shared()[0]


@pytest.fixture
def decoder():
    return shared()[1]


def prompts(rows: int = 1) -> dict[str, torch.Tensor]:
    """The first has no padding, the others have some on the left."""
    ids = torch.randint(1, VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 7, 2)[:rows]):
        ids[row, :padding], mask[row, :padding] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def lengths_of(sequences: torch.Tensor, eos: set[int]) -> list[int]:
    """How many tokens each row emitted, its last one included."""
    emitted = sequences[:, PROMPT:].tolist()
    return [next((place for place, token in enumerate(row, start=1) if token in eos), len(row)) for row in emitted]


# Greedy decoding


OPTIONS = {
    "plain": {},
    "repetition_penalty": dict(repetition_penalty=1.3),
    "no_repeat_ngram": dict(no_repeat_ngram_size=2),
    "encoder_no_repeat_ngram": dict(encoder_no_repeat_ngram_size=2),
    "encoder_repetition_penalty": dict(encoder_repetition_penalty=1.5),
    "bad_words": dict(bad_words_ids=[[5], [7, 8], [9, 10, 11]]),
    "suppress": dict(suppress_tokens=[3, 4, 9], begin_suppress_tokens=[12, 13, 14]),
    "sequence_bias": dict(sequence_bias={(5,): 3.0, (6, 7): 4.0, (9,): -8.0}),
    "eos": dict(eos_token_id=7),
    "several_eos": dict(eos_token_id=[7, 11, 20, 21, 22]),
    "pad": dict(eos_token_id=[7, 11, 20], pad_token_id=2),
    "min_new_tokens": dict(eos_token_id=[7, 11, 20, 21, 22], min_new_tokens=10),
    "min_length": dict(eos_token_id=[7, 11, 20, 21, 22], min_length=PROMPT + 10),
    "max_length": dict(max_length=PROMPT + 7, max_new_tokens=None),
    "forced_eos": dict(forced_eos_token_id=3, repetition_penalty=1.2),
    "exponential_decay": dict(exponential_decay_length_penalty=(5, 1.5), eos_token_id=7),
    "prefix_allowed": dict(
        prefix_allowed_tokens_fn=lambda row, tokens: [(int(tokens[-1]) * 7 + row) % VOCABULARY, 5 + row, int(tokens[-1])]
    ),
    "remove_invalid": dict(remove_invalid_values=True, renormalize_logits=True),
    "watermark": dict(watermarking_config=WatermarkingConfig(bias=4.0)),
    "synthid": dict(watermarking_config=SynthIDTextWatermarkingConfig(keys=[1, 2, 3, 4, 5], ngram_len=3)),
    "guidance": dict(guidance_scale=1.5),
    "mixture": dict(
        repetition_penalty=1.2, no_repeat_ngram_size=3, bad_words_ids=[[5]], eos_token_id=[7, 11], min_new_tokens=4
    ),
}
if hasattr(GenerationConfig(), "presence_penalty"):
    OPTIONS["presence_penalty"] = dict(presence_penalty=0.7, frequency_penalty=0.3)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("option", OPTIONS)
def test_greedy_text_scores_and_logits_are_generates_own(model, decoder, option, rows):
    asked = dict(do_sample=False, return_dict_in_generate=True, max_new_tokens=14) | OPTIONS[option]
    expected = model.generate(**prompts(rows), output_scores=True, output_logits=True, **asked)
    out = model.generate(**prompts(rows), output_scores=True, output_logits=True, custom_generate=decoder, **asked)
    quick = model.generate(**prompts(rows), custom_generate=decoder, **asked)  # without processors no walk, one verification
    assert out.sequences.tolist() == quick.sequences.tolist() == expected.sequences.tolist()
    assert out.sequences.dtype == expected.sequences.dtype
    eos = OPTIONS[option].get("eos_token_id", OPTIONS[option].get("forced_eos_token_id"))
    eos = set(eos) if isinstance(eos, list) else {eos}
    emitted = lengths_of(expected.sequences, eos)
    assert [stats.emitted_tokens for stats in out.hedgespec] == emitted
    for ours, theirs in ((out.scores, expected.scores), (out.logits, expected.logits)):
        assert [tuple(one.shape) for one in ours] == [tuple(one.shape) for one in theirs]
        for step, (own, wanted) in enumerate(zip(ours, theirs)):
            under_way = [row for row, count in enumerate(emitted) if step < count]
            torch.testing.assert_close(own[under_way], wanted[under_way], atol=1e-4, rtol=1e-4)


def test_results_have_generates_types(model, decoder):
    out = model.generate(**prompts(4), max_new_tokens=5, return_dict_in_generate=True, custom_generate=decoder)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert (out.scores, out.logits, out.attentions, out.hidden_states) == (None, None, None, None)
    assert [stats.emitted_tokens for stats in out.hedgespec] == [5] * 4 and out["hedgespec"] is out.hedgespec
    assert type(model.generate(**prompts(4), max_new_tokens=5, custom_generate=decoder)) is torch.Tensor


def test_a_forced_first_token(model, decoder):
    asked = dict(forced_bos_token_id=17, begin_suppress_tokens=[3, 4], max_new_tokens=8, do_sample=False)
    first = torch.tensor([[4]])
    out = model.generate(first, custom_generate=decoder, **asked)
    assert out.tolist() == model.generate(first, **asked).tolist() and out[0, 1] == 17


@pytest.mark.parametrize("override", [{}, {"max_new_tokens": 5}, {"repetition_penalty": 1.0, "eos_token_id": 20}])
def test_a_generation_config_and_what_overrides_it(model, decoder, override):
    config = GenerationConfig(max_new_tokens=15, repetition_penalty=1.4, do_sample=False, pad_token_id=PAD)
    before = config.to_dict()
    expected = model.generate(**prompts(4), generation_config=config, **override)
    out = model.generate(**prompts(4), generation_config=config, custom_generate=decoder, **override)
    assert out.tolist() == expected.tolist() and config.to_dict() == before


def test_the_models_own_generation_config_counts():
    model = tiny()
    model.generation_config.update(max_new_tokens=9, no_repeat_ngram_size=1, suppress_tokens=[3])
    decoder = Decoder(model, pool(model))
    assert model.generate(**prompts(4), custom_generate=decoder).tolist() == model.generate(**prompts(4)).tolist()


@pytest.mark.parametrize(
    "asked",
    [
        {"logits_to_keep": 1},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
        {"num_assistant_tokens": 2},
    ],
)
def test_arguments_that_leave_the_text_alone(model, decoder, asked):
    expected = model.generate(**prompts(), do_sample=False, **{"max_new_tokens": 8} | asked)
    out = model.generate(**prompts(), do_sample=False, custom_generate=decoder, **{"max_new_tokens": 8} | asked)
    assert out.tolist() == expected.tolist()


def test_no_prompt_at_all(model, decoder):
    asked = dict(bos_token_id=5, max_new_tokens=6, do_sample=False)
    assert model.generate(custom_generate=decoder, **asked).tolist() == model.generate(**asked).tolist()


def test_inference_mode(model, decoder):
    asked = prompts(4) | dict(max_new_tokens=6, do_sample=False, repetition_penalty=1.2)
    with torch.inference_mode():
        out = model.generate(**asked, custom_generate=decoder)
    assert out.tolist() == model.generate(**asked).tolist()


def test_a_learner_goes_on_from_a_state(ours):
    asked = dict(max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    stats = ours[0](**prompts(4), **asked).hedgespec
    states = [one.learner_state for one in stats]
    learner = shared()[1].new_learner()
    learner.load_state_dict(states[0])
    for given in (states[0], states):
        following = ours[0](**prompts(4), learner_state=given, **asked).hedgespec
        assert (following[0].weights[0] == learner.weights()).all()
        assert len(stats[0].prompt_losses) > len(following[0].prompt_losses) == 0
    with pytest.raises(ValueError, match="learner_state: expected one for each of 4 rows, got 2"):
        ours[0](**prompts(4), learner_state=states[:2], **asked)


def test_a_tenants_state_goes_through_a_file(ours, tmp_path):
    """Saved after one call and loaded for the next, it is the state itself."""
    asked = dict(max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    first = ours[0](**prompts(), **asked).hedgespec[0]
    hedgespec.save_learner_state(tmp_path / "tenant.json", first)
    read = hedgespec.load_learner_state(tmp_path / "tenant.json", shared()[1])
    assert read == first.learner_state
    through, straight = (ours[0](**prompts(2), learner_state=one, **asked) for one in (read, first.learner_state))
    assert through.sequences.tolist() == straight.sequences.tolist()
    for one, other in zip(through.hedgespec, straight.hedgespec, strict=True):
        assert (one.weights[0] == other.weights[0]).all() and one.learner_state == other.learner_state


def test_an_end_inside_an_accepted_draft_is_the_end(model):
    """As transformers tests it of prompt lookup: a draft goes on past the end of the text, the text does not."""
    decoder = Decoder(model, [CausalLMDrafter(model, model)], DecodeConfig(draft_length=8))
    whole = model.generate(**prompts(), max_new_tokens=20, do_sample=False)[0, PROMPT:].tolist()
    for end in sorted({whole.index(token) for token in whole}):
        asked = dict(max_new_tokens=20, do_sample=False, eos_token_id=whole[end], custom_generate=decoder)
        assert model.generate(**prompts(), **asked)[0, PROMPT:].tolist() == whole[: end + 1]


# Sampling


WARPERS = {  # what is asked, the processors that stay, and what Sampling does in place of the others
    "temperature": (dict(temperature=0.6), [], dict(temperature=0.6)),
    "top_k": (dict(top_k=4), [], dict(top_k=4)),
    "top_p": (dict(top_p=0.7), [], dict(top_p=0.7)),
    "min_p": (dict(min_p=0.2), [], dict(min_p=0.2)),
    "all": (dict(temperature=0.8, top_k=9, top_p=0.9, min_p=0.05), [], dict(temperature=0.8, top_k=9, top_p=0.9, min_p=0.05)),
    "typical_p": (dict(typical_p=0.6, temperature=0.8), ["TemperatureLogitsWarper", "TypicalLogitsWarper"], {}),
    "epsilon": (dict(epsilon_cutoff=0.02, top_k=9), ["TopKLogitsWarper", "EpsilonLogitsWarper"], {}),
    "eta": (dict(eta_cutoff=0.02), ["EtaLogitsWarper"], {}),
    "top_h": (dict(top_h=0.4, top_k=5), ["TopHLogitsWarper"], dict(top_k=5)),
    "normalized": (dict(top_k=5, renormalize_logits=True), ["TopKLogitsWarper", "LogitNormalization"], {}),
    "penalized": (dict(top_k=5, repetition_penalty=1.5), ["RepetitionPenaltyLogitsProcessor"], dict(top_k=5)),
}


@pytest.mark.parametrize("name", WARPERS)
def test_sampled_tokens_follow_the_processed_scores(model, name):
    """The first token of 150 texts, and the second of those that begin alike, against generate's own scores there."""
    scipy_stats = pytest.importorskip("scipy.stats")
    drafter = CausalLMDrafter(tiny(seed=5, num_hidden_layers=1), model)
    decoder = Decoder(model, [drafter], DecodeConfig(draft_length=1, learner="fixed"))
    asked, prompt = dict(do_sample=True, top_k=0) | WARPERS[name][0], prompts()["input_ids"]
    drawn = model.generate(prompt, max_new_tokens=3, num_return_sequences=150, custom_generate=decoder, **asked)
    assert drawn.shape == (150, PROMPT + 3)
    often, compared = drawn[:, PROMPT].mode().values, 0
    for prefix, seen in (
        (prompt, drawn[:, PROMPT]),
        (torch.cat([prompt, often.view(1, 1)], 1), drawn[drawn[:, PROMPT] == often, PROMPT + 1]),
    ):
        plain = model.generate(prefix, max_new_tokens=1, return_dict_in_generate=True, output_scores=True, **asked)
        probs, counts = plain.scores[0][0].double().softmax(-1), seen.bincount(minlength=VOCABULARY).double()
        assert counts[probs == 0].sum() == 0
        likely = probs * len(seen) >= 5
        cells = [(counts[token].item(), probs[token].item() * len(seen)) for token in likely.nonzero()[:, 0]]
        if probs[~likely].sum() > 1e-9:  # the others share a cell
            cells.append((counts[~likely].sum().item(), probs[~likely].sum().item() * len(seen)))
        if len(cells) > 1:
            compared += 1
            assert scipy_stats.chisquare(*zip(*cells)).pvalue > 1e-4
    assert compared  # or every token was certain, and nothing was compared


@pytest.mark.parametrize("name", WARPERS)
def test_split_takes_exactly_the_last_warpers_that_sampling_has(model, name):
    asked, left, sampling = WARPERS[name]
    config, _ = model._prepare_generation_config(GenerationConfig(do_sample=True, **{"top_k": 0} | asked))
    model._prepare_special_tokens(config)
    processors = model._get_logits_processor(config, input_ids_seq_length=PROMPT, device="cpu", logits_processor=[])
    rest, found = split(processors)
    assert [type(one).__name__ for one in rest] == left
    assert found == Sampling(**{"temperature": 1.0} | sampling)


@pytest.mark.parametrize(
    ("processors", "left"),
    [
        ([TopKLogitsWarper(3), TemperatureLogitsWarper(0.5)], 1),  # the other way round: another distribution
        ([TopPLogitsWarper(0.5), TopKLogitsWarper(3)], 1),
        ([TopKLogitsWarper(3), TopKLogitsWarper(2)], 1),
        ([TemperatureLogitsWarper(0.5), EpsilonLogitsWarper(0.01)], 2),
        ([TopKLogitsWarper(3, filter_value=-10.0)], 1),
        ([TopPLogitsWarper(0.5, min_tokens_to_keep=2)], 1),
        ([TemperatureLogitsWarper(0.5), MinPLogitsWarper(0.1)], 0),
    ],
)
def test_split_leaves_what_means_something_else(processors, left):
    rest, _ = split(LogitsProcessorList(processors))
    assert rest == processors[:left]


@pytest.mark.parametrize("rows", [1, 4])
def test_the_seed_decides_and_greedy_decoding_draws_nothing(model, decoder, rows):
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        asked = dict(do_sample=True, top_k=10, temperature=0.9, max_new_tokens=8, num_return_sequences=2)
        texts.append(model.generate(**prompts(rows), custom_generate=decoder, **asked).tolist())
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 2 * rows and texts[0][0] != texts[0][1]  # the same prompt, uniforms of its own
    state = torch.get_rng_state()
    model.generate(**prompts(rows), do_sample=False, max_new_tokens=5, custom_generate=decoder)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampled_scores_are_those_of_the_sampled_text(model, decoder):
    asked = dict(
        do_sample=True, top_k=8, temperature=0.7, repetition_penalty=1.2, return_dict_in_generate=True, output_scores=True
    )
    out = model.generate(**prompts(), max_new_tokens=8, custom_generate=decoder, output_logits=True, **asked)
    for step, scores in enumerate(out.scores):
        prefix = out.sequences[:, : PROMPT + step]
        plain = model.generate(prefix, max_new_tokens=1, output_logits=True, **asked)
        torch.testing.assert_close(scores, plain.scores[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.logits[step], plain.logits[0], atol=1e-4, rtol=1e-4)
        assert scores[0, out.sequences[0, PROMPT + step]].isfinite()
    transition = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert transition.shape == (1, 8) and (transition <= 0).all()


# Processors of the user's own


class Recording(LogitsProcessor):
    """Notes the texts it sees."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.tolist())
        return scores


def test_a_processor_sees_every_position_once_and_in_order(model, decoder):
    for rows in (1, 4):
        asked = dict(do_sample=False, max_new_tokens=12)
        ends = model.generate(**prompts(rows), **asked)[:, PROMPT + 3].unique().tolist()[:2]
        asked["eos_token_id"] = ends
        theirs, ours = Recording(), Recording()
        text = model.generate(**prompts(rows), logits_processor=[theirs], **asked)
        out = model.generate(**prompts(rows), logits_processor=[ours], custom_generate=decoder, **asked)
        assert out.tolist() == text.tolist() and ours.calls == theirs.calls
        assert min(lengths_of(text, set(ends))) < max(lengths_of(text, set(ends))) or rows == 1  # rows that end are padded


class Counting(LogitsProcessor):
    """Changes scores by how often it was called, in place if told to."""

    def __init__(self, in_place: bool = False):
        self.count, self.in_place = 0, in_place

    def __call__(self, input_ids, scores):
        self.count += 1
        scores = scores if self.in_place else scores.clone()
        scores[:, (self.count * 5) % VOCABULARY] += 20.0 * (self.count % 2)
        return scores.scatter_(1, input_ids[:, -1:], -math.inf)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_processor_may_keep_state(model, decoder, rows, in_place):
    asked = dict(do_sample=False, max_new_tokens=20, eos_token_id=[7, 11])
    plain, own = Counting(in_place), Counting(in_place)
    expected = model.generate(**prompts(rows), logits_processor=[plain], **asked)
    out = model.generate(**prompts(rows), logits_processor=LogitsProcessorList([own]), custom_generate=decoder, **asked)
    assert out.tolist() == expected.tolist()
    assert own.count == plain.count


class Shifting(LogitsProcessor):
    """Moves every token's score to another token: what drafters propose unprocessed is wrong every time."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __call__(self, input_ids, scores):
        return torch.stack([one.roll(int(last) % 3 + 1, -1) for one, last in zip(scores, input_ids[:, -1])])


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("sampling", [dict(do_sample=False), dict(do_sample=True, temperature=0.3)])
def test_a_stateless_processor_shapes_the_drafts_too(model, rows, sampling):
    decoder = Decoder(model, [CausalLMDrafter(model, model)], DecodeConfig(draft_length=3))
    asked = dict(max_new_tokens=20, return_dict_in_generate=True, custom_generate=decoder, **sampling)
    told, untold = (
        model.generate(**prompts(rows), logits_processor=[processor], **asked)
        for processor in (Shifting(stateless=True), Shifting())
    )
    for row in range(rows):  # 19 tokens after the first: five rounds, where each draft is accepted
        assert told.hedgespec[row].rounds == 5 < 10 < untold.hedgespec[row].rounds
    if not sampling["do_sample"]:
        assert told.sequences.tolist() == untold.sequences.tolist()
        plain = model.generate(**prompts(rows), logits_processor=[Shifting()], max_new_tokens=20, do_sample=False)
        assert told.sequences.tolist() == plain.tolist()


class Uncopyable(LogitsProcessor, StoppingCriteria):
    """Holds something like a lock or a compiled grammar."""

    def __call__(self, input_ids, scores):
        return torch.zeros(len(input_ids), dtype=torch.bool) if scores is None else scores

    def __deepcopy__(self, memo):
        raise TypeError("there is only one of me")


@pytest.mark.parametrize("place", ["logits_processor", "stopping_criteria"])
def test_what_cannot_be_copied_sees_a_batch_all_the_same(model, decoder, place):
    asked = prompts(4) | {"max_new_tokens": 3, "do_sample": False, place: [Uncopyable()]}
    assert model.generate(**asked, custom_generate=decoder).tolist() == model.generate(**asked).tolist()


class Alternating(LogitsProcessor):
    """Keeps a flag for every row of the batch, a table of what each may not say, and mixes neighbouring rows."""

    def __init__(self, rows: int, share: float):
        self.share, self.flags = share, [False] * rows
        self.banned = [[3 * row, 3 * row + 1, 40 + row] for row in range(rows)]

    def __call__(self, input_ids, scores):
        scores = scores + self.share * scores.roll(1, 0)
        for row, banned in enumerate(self.banned):
            self.flags[row] ^= int(input_ids[row, -1]) % 2 == 0
            if self.flags[row]:
                scores[row, banned] = -math.inf
            else:
                scores[row] = scores[row].roll(row)
        return scores


@pytest.mark.parametrize("options", [{}, dict(eos_token_id=[7, 11]), dict(output_scores=True, output_logits=True)])
def test_a_processor_may_keep_something_for_every_row(model, decoder, options):
    asked = prompts(4) | dict(max_new_tokens=20, do_sample=False, return_dict_in_generate=True) | options
    # What plain decoding computes for a row that has ended is not known: neighbours of such rows may not be mixed with them.
    kind = functools.partial(Alternating, 4, 0.0 if "eos_token_id" in options else 0.3)
    expected = model.generate(**asked, logits_processor=[kind()])
    out = model.generate(**asked, logits_processor=[kind()], custom_generate=decoder)
    assert out.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        if options.get(f"output_{name}"):
            for own, wanted in zip(out[name], expected[name], strict=True):
                torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [
    dict(draft_length=3), dict(draft_length=3, tree=hedgespec.Tree(2)), dict(draft_length=3, learner="exp3"),
])  # fmt: skip
@pytest.mark.parametrize("sampling", [dict(do_sample=False), dict(do_sample=True, temperature=0.7)])
def test_rows_in_step_are_drafted_and_learned_from_as_ever(model, config, sampling):
    decoder = Decoder(model, [CausalLMDrafter(model, model)], DecodeConfig(**config))
    asked = prompts(4) | dict(max_new_tokens=20, eos_token_id=[7], **sampling)
    out = model.generate(**asked, logits_processor=[Recording()], custom_generate=decoder, return_dict_in_generate=True)
    if not sampling["do_sample"]:
        assert out.sequences.tolist() == model.generate(**asked).tolist()
    for stats in out.hedgespec:
        assert not stats.failures and sum(stats.emitted_by_round) == stats.emitted_tokens - 1
        if sampling["do_sample"]:
            assert max(stats.emitted_by_round) > 1
        else:  # every draft is right; none is held back by a row that has ended
            assert set(stats.emitted_by_round[:-1]) <= {4}


def test_what_is_accepted_of_a_draft_cut_short_counts_as_accepted(model):
    """One drafter is always right and the other never. Only rounds of the latter have a rejected token, however early the other
    rows' drafts end."""
    opposite = tiny()
    with torch.no_grad():
        opposite.lm_head.weight.neg_()
    drafters = [CausalLMDrafter(model, model, name="right"), CausalLMDrafter(opposite, model, name="wrong")]
    decoder = Decoder(model, drafters, DecodeConfig(draft_length=3, learner=ScoredUniform))
    asked = prompts(4) | dict(max_new_tokens=30, do_sample=False, custom_generate=decoder, return_dict_in_generate=True)
    out = model.generate(**asked, logits_processor=[Recording()])
    cut_short = 0
    for stats in out.hedgespec:
        right, wrong = stats.choices.count(0), stats.choices.count(1)
        assert stats.reached_by_depth[0] == right + wrong and stats.accepted_by_depth[0] == right > 0 < wrong
        assert (stats.accepted_by_depth[1:] == stats.reached_by_depth[1:]).all()
        cut_short += sum(count < 4 for choice, count in zip(stats.choices, stats.emitted_by_round) if choice == 0)
    assert cut_short


def test_a_processor_that_changes_the_shape_is_named(model, decoder):
    class Wide(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.repeat(2, 1)

    for rows in (1, 4):
        with pytest.raises(ValueError, match=rf"logits_processor: expected scores of shape \({rows}, 53\) from Wide, got"):
            model.generate(**prompts(rows), logits_processor=[Wide()], max_new_tokens=3, custom_generate=decoder)


def test_rows_decoded_in_turns_are_not_processed_together():
    model = tiny(kind=transformers.BloomConfig, n_layer=2, n_head=4).float()
    decoder = Decoder(model, [NGramDrafter(VOCABULARY)])
    asked = dict(max_new_tokens=8, do_sample=False)
    for rows, processor in ((1, Counting()), (4, Shifting(stateless=True))):
        plain = model.generate(**prompts(rows), logits_processor=[copy.deepcopy(processor)], **asked)
        out = model.generate(**prompts(rows), logits_processor=[processor], custom_generate=decoder, **asked)
        assert out.tolist() == plain.tolist()
    with pytest.raises(ValueError, match="logits_processor: expected a true attribute `stateless` in a batch of 4, .*Counting"):
        model.generate(**prompts(4), logits_processor=[Counting()], custom_generate=decoder, **asked)


def test_a_processor_that_holds_the_model_does_not_copy_it(model, decoder):
    class Holding(LogitsProcessor):
        def __init__(self):
            self.model = model

        def __call__(self, input_ids, scores):
            assert self.model is model
            return scores

    model.generate(**prompts(4), logits_processor=[Holding()], max_new_tokens=2, do_sample=False, custom_generate=decoder)


# Stopping criteria


class StopAt(StoppingCriteria):
    """Notes the texts it is asked about; stops at the third token divisible by five, or at a score."""

    def __init__(self, score: float = math.inf):
        self.asked, self.count, self.score = [], 0, score

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.tolist())
        self.count += int(input_ids[0, -1]) % 5 == 0
        high = self.score < math.inf and scores[-1].max() > self.score
        return torch.full((len(input_ids),), bool(self.count == 3 or high))


def test_a_criterion_is_asked_after_every_token(model, decoder):
    theirs, ours = StopAt(), StopAt()
    expected = model.generate(**prompts(), stopping_criteria=[theirs], max_new_tokens=40, do_sample=False)
    out = model.generate(
        **prompts(), stopping_criteria=StoppingCriteriaList([ours]), max_new_tokens=40, do_sample=False, custom_generate=decoder
    )
    assert out.tolist() == expected.tolist() and ours.asked == theirs.asked and ours.count == theirs.count
    assert out.shape[1] < PROMPT + 40


class DoneTracker(StoppingCriteria):
    """As lm-evaluation-harness has it: a flag for every row, and one answer for the batch."""

    def __init__(self, rows: int, token: int = 3):
        self.done, self.token, self.asked = [False] * rows, token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.tolist())
        for row, done in enumerate(self.done):
            if not done:
                self.done[row] = int(input_ids[row, -1]) % self.token == 0
        return self.answer()

    def answer(self):
        return all(self.done)


class RowTracker(DoneTracker):
    """The same with an answer for every row."""

    def answer(self):
        return torch.tensor(self.done)


CRITERIA = {
    "done_tracker": lambda: DoneTracker(4), "late": lambda: DoneTracker(4, 17), "rows": lambda: RowTracker(4, 5),
    "first_row": StopAt,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("options", [{}, dict(eos_token_id=[7]), dict(repetition_penalty=1.3, eos_token_id=[7, 11])])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_see_a_batch_as_in_plain_decoding(family, options, criterion):
    """Rows that have ended are padded if anything ends at an id, else written on in, as `generate` does."""
    model = tiny() if family == "llama" else tiny(kind=transformers.BloomConfig, n_layer=2, n_head=4).float()
    decoder = Decoder(model, pool(model), DecodeConfig(draft_length=3))
    asked = prompts(4) | dict(max_new_tokens=25, do_sample=False, return_dict_in_generate=True, output_scores=True, **options)
    theirs, ours = CRITERIA[criterion](), CRITERIA[criterion]()
    expected = model.generate(**asked, stopping_criteria=[theirs])
    out = model.generate(**asked, stopping_criteria=[ours], custom_generate=decoder)
    assert out.sequences.tolist() == expected.sequences.tolist() and ours.asked == theirs.asked
    assert len(out.scores) == len(expected.scores)
    close(out[CACHE_NAME], expected[CACHE_NAME], 4, out.hedgespec)
    for stats in out.hedgespec:
        assert sum(stats.emitted_by_round) == stats.emitted_tokens - 1


def test_criteria_and_processors_take_turns(model, decoder):
    """One object that is both is called in the order of plain decoding."""

    class Both(LogitsProcessor, StoppingCriteria):
        def __init__(self):
            self.calls = []

        def __call__(self, input_ids, scores):
            self.calls.append((input_ids.tolist(), scores is None))
            return scores if scores is not None else torch.tensor([len(self.calls) > 12 + 2 * row for row in range(4)])

    texts, calls = [], []
    for custom in (None, decoder):
        both = Both()
        asked = prompts(4) | dict(max_new_tokens=20, do_sample=False, logits_processor=[both], stopping_criteria=[both])
        texts.append(model.generate(**asked, custom_generate=custom).tolist())
        calls.append(both.calls)
    assert texts[0] == texts[1] and calls[0] == calls[1] and len(texts[0][0]) < PROMPT + 20


def test_a_criterion_may_read_the_scores(model, decoder):
    asked = dict(max_new_tokens=40, do_sample=False, return_dict_in_generate=True, output_scores=True)
    plain = model.generate(**prompts(), **asked)
    score = sorted(float(one.max()) for one in plain.scores)[-3]
    expected = model.generate(**prompts(), stopping_criteria=[StopAt(score - 1e-3)], **asked)
    out = model.generate(**prompts(), stopping_criteria=[StopAt(score - 1e-3)], custom_generate=decoder, **asked)
    assert out.sequences.tolist() == expected.sequences.tolist() and len(out.scores) == len(expected.scores)


@pytest.mark.parametrize("criterion", [MaxLengthCriteria(PROMPT + 6), EosTokenCriteria([7, 11, 20, 21, 22, 23, 24])])
@pytest.mark.parametrize("rows", [1, 4])
def test_criteria_of_transformers_handed_over_by_the_user_count(model, decoder, criterion, rows):
    asked = dict(max_new_tokens=20, do_sample=False, stopping_criteria=[criterion])
    expected = model.generate(**prompts(rows), **asked)
    assert model.generate(**prompts(rows), custom_generate=decoder, **asked).tolist() == expected.tolist()


def test_no_time_is_one_token(model, decoder):
    out = model.generate(**prompts(4), max_time=0.0, max_new_tokens=30, do_sample=False, custom_generate=decoder)
    assert out.tolist() == model.generate(**prompts(4), max_time=0.0, max_new_tokens=30, do_sample=False).tolist()
    assert out.shape[1] == PROMPT + 1


@functools.cache
def tokenizer():
    """A letter is a token."""
    from tokenizers import Tokenizer, decoders, models

    letters = Tokenizer(models.BPE({letter: token for token, letter in enumerate(LETTERS)}, []))
    letters.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="~", padding_side="left")


@pytest.mark.parametrize("place", ["argument", "config", "models_own"])
@pytest.mark.parametrize("rows", [1, 4])
def test_stop_strings(decoder, rows, place):
    model = tiny()
    text = model.generate(**prompts(rows), max_new_tokens=20, do_sample=False)
    strings = [tokenizer().decode(row[PROMPT + 4 + number :][:2]) for number, row in enumerate(text)]
    asked = dict(max_new_tokens=20, do_sample=False, tokenizer=tokenizer())
    if place == "config":
        asked["generation_config"] = GenerationConfig(stop_strings=strings, pad_token_id=PAD)
    elif place == "argument":
        asked["stop_strings"] = strings
    else:
        model.generation_config.stop_strings = strings
    expected = model.generate(**prompts(rows), **asked)
    hedgespec.accelerate(model, pool(model))
    out = model.generate(**prompts(rows), return_dict_in_generate=True, **asked)
    assert out.sequences.tolist() == expected.tolist() and out.sequences.shape[1] < PROMPT + 20
    for config in {"config": [asked.get("generation_config")], "models_own": [model.generation_config]}.get(place, []):
        assert config.stop_strings == strings
    for lost in ({"tokenizer": None}, {"custom_generate": decoder}):  # generate drops the tokenizer before a custom loop
        with pytest.raises(ValueError, match="tokenizer"):
            model.generate(**prompts(rows), **asked | lost)


# Streamers


class Showing(BaseStreamer):
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append((value.shape, value.tolist()))

    def end(self):
        self.got.append("end")


@pytest.fixture(params=["custom_generate", "accelerate"])
def ours(request):
    """A model's generate with drafters, either way, and a twin's own."""
    model, twin = tiny(), tiny()
    decoder = Decoder(model, pool(model))
    if request.param == "accelerate":
        return hedgespec.accelerate(model, decoder).generate, twin.generate

    def generate(*args, streamer=None, **asked):
        return model.generate(*args, custom_generate=hedgespec.custom_generate(decoder, streamer=streamer), **asked)

    return generate, twin.generate


def test_a_streamer_gets_the_calls_it_gets_from_generate(ours):
    calls = []
    for generate in ours:
        streamer = Showing()
        generate(**prompts(), streamer=streamer, max_new_tokens=12, do_sample=False)
        calls.append(streamer.got)
    assert calls[0] == calls[1] and calls[0][-1] == "end" and len(calls[0]) == 14


def test_text_streamers(ours, capsys):
    texts = []
    for generate in ours:
        generate(**prompts(), streamer=TextStreamer(tokenizer(), skip_prompt=True), max_new_tokens=12, do_sample=False)
        printed = capsys.readouterr().out
        streamer = TextIteratorStreamer(tokenizer(), timeout=60)
        asked = prompts() | dict(streamer=streamer, max_new_tokens=12, do_sample=False)
        thread = threading.Thread(target=generate, kwargs=asked)
        thread.start()
        texts.append((printed, list(streamer)))
        thread.join()
    assert texts[0] == texts[1] and len("".join(texts[0][1])) == PROMPT + 12


def test_an_async_streamer(ours):
    async def read(generate) -> list[str]:
        streamer = AsyncTextIteratorStreamer(tokenizer(), timeout=60)
        asked = prompts() | dict(streamer=streamer, max_new_tokens=12, do_sample=False)
        task = asyncio.create_task(asyncio.to_thread(generate, **asked))
        text = [piece async for piece in streamer]
        await task
        return text

    texts = [asyncio.run(read(generate)) for generate in ours]
    assert texts[0] == texts[1] and len("".join(texts[0])) == PROMPT + 12


def test_a_streamer_of_a_batch_is_refused(ours):
    streamer = Showing()
    with pytest.raises(ValueError, match="streamer: expected a batch of 1"):
        ours[0](**prompts(4), streamer=streamer, max_new_tokens=3)
    assert not streamer.got


def test_generate_does_not_pass_its_streamer_to_a_custom_loop(model, decoder):
    """What docs/compatibility.md says of it. If a release of transformers does, `decode` takes it, and this test tells us."""
    streamer = Showing()
    out = model.generate(**prompts(), streamer=streamer, max_new_tokens=5, do_sample=False, custom_generate=decoder)
    assert out.tolist() == model.generate(**prompts(), max_new_tokens=5, do_sample=False).tolist()
    assert len(streamer.got) == 1  # the prompt: neither tokens nor an end


def test_a_streamer_in_the_wrong_place_is_named_where_it_can_be_seen(model, decoder):
    with pytest.raises(TypeError, match="decoder: expected a hedgespec.Decoder, got LlamaForCausalLM"):
        hedgespec.custom_generate(model)
    with pytest.raises(TypeError, match="streamer: expected put and end .* got list"):
        hedgespec.custom_generate(decoder, streamer=[])
    streamer = TextStreamer(tokenizer(), skip_prompt=True)
    loop = hedgespec.custom_generate(decoder, streamer=streamer)
    with pytest.raises(ValueError, match="streamer: expected it in hedgespec.custom_generate alone"):
        model.generate(**prompts(), streamer=streamer, max_new_tokens=3, custom_generate=loop)
    with pytest.raises(ValueError, match="custom_generate: expected a decoder whose target is this model"):
        tiny().generate(**prompts(), max_new_tokens=3, custom_generate=hedgespec.custom_generate(decoder))


def test_an_accelerated_model_passes_its_streamer_to_a_loop_of_ours():
    model = tiny()
    decoder = Decoder(model, pool(model))
    hedgespec.accelerate(model, decoder)
    asked = prompts() | dict(max_new_tokens=5, do_sample=False)
    for loop in (decoder, hedgespec.custom_generate(decoder)):
        streamer = Showing()
        model.generate(**asked, streamer=streamer, custom_generate=loop)
        assert len(streamer.got) == 1 + 5 + 1
    with pytest.raises(ValueError, match="streamer: expected it in hedgespec.custom_generate alone"):
        model.generate(**asked, streamer=Showing(), custom_generate=hedgespec.custom_generate(decoder, streamer=Showing()))


# Caches


WINDOWED = dict(kind=MistralConfig, sliding_window=6)


def close(own: DynamicCache, wanted: DynamicCache, rows: int, stats: list | None = None) -> None:
    assert own.get_seq_length() == wanted.get_seq_length() and len(own.layers) == len(wanted.layers)
    padding = prompts(rows)["attention_mask"].argmax(1).tolist()
    for one, other in zip(own.layers, wanted.layers):
        assert type(one) is type(other) and one.keys.shape == other.keys.shape
        gone = other.get_seq_length() - other.keys.shape[2]
        for row, count in enumerate(padding):  # what stands in the padding means nothing
            for name in ("keys", "values"):
                end = None if stats is None else PROMPT + stats[row].emitted_tokens - 1 - gone  # padding follows
                held = slice(max(0, count - gone), end)
                states = (getattr(layer, name)[row, :, held] for layer in (one, other))
                torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, torch.float64), (WINDOWED, torch.float64), (dict(kind=transformers.BloomConfig, n_layer=2, n_head=4), torch.float32)],
    ids=["full", "windowed", "in turns"],
)
@pytest.mark.parametrize("with_config", [False, True])
def test_a_cache_is_filled_and_read_as_generate_does(options, dtype, rows, with_config):
    model = tiny(**options).to(dtype)
    decoder = Decoder(model, pool(model), DecodeConfig(draft_length=3))
    caches, texts = [], []
    for generate in (model.generate, functools.partial(model.generate, custom_generate=decoder)):
        cache = DynamicCache(config=model.config) if with_config else DynamicCache()
        asked = prompts(rows) | {CACHE_NAME: cache, "do_sample": False}
        turns = []
        for more in (torch.zeros(rows, 0, dtype=torch.int64), torch.arange(1, 4).expand(rows, 3)):
            asked["input_ids"] = torch.cat([asked["input_ids"], more], 1)
            mask = asked["attention_mask"]
            asked["attention_mask"] = torch.cat([mask, mask.new_ones(rows, asked["input_ids"].shape[1] - mask.shape[1])], 1)
            out = generate(**asked, max_new_tokens=10, return_dict_in_generate=True)
            assert out[CACHE_NAME] is cache
            asked["input_ids"] = out.sequences
            turns.append((out.sequences.tolist(), copy.deepcopy(cache)))
        caches.append([cache for _, cache in turns])
        texts.append([text for text, _ in turns])
    assert texts[0] == texts[1]
    for theirs, own in zip(*caches):
        close(own, theirs, rows)


def test_a_cache_is_filled_without_being_asked_for(model, decoder):
    cache = DynamicCache(config=model.config)
    model.generate(**prompts(), **{CACHE_NAME: cache}, max_new_tokens=5, do_sample=False, custom_generate=decoder)
    assert cache.get_seq_length() == PROMPT + 4


def test_generates_own_cache_is_returned(model, decoder):
    out = [
        model.generate(**prompts(4), max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **asked)[CACHE_NAME]
        for asked in ({"custom_generate": decoder}, {})
    ]
    close(*out, rows=4)


def test_new_tokens_alone_behind_a_cache_are_refused(model, decoder):
    """generate takes them; drafters would not know what came before."""
    cache = DynamicCache(config=model.config)
    text = model.generate(**prompts(), **{CACHE_NAME: cache}, max_new_tokens=5, do_sample=False, custom_generate=decoder)
    mask = torch.ones(1, text.shape[1] + 3, dtype=torch.int64)
    for ids in (torch.tensor([[4, 5, 6]]), text[:, -3:]):
        with pytest.raises(ValueError, match="input_ids: expected .*whole text"):
            model.generate(
                ids, attention_mask=mask[:, : text.shape[1] - 1 + ids.shape[1]], **{CACHE_NAME: cache}, custom_generate=decoder
            )
        with pytest.raises(ValueError, match="input_ids: expected .*whole text"):
            model.generate(ids, **{CACHE_NAME: cache}, custom_generate=decoder)


def test_a_static_cache_by_name_changes_nothing(model, decoder):
    for rows in (1, 4):
        asked = dict(max_new_tokens=8, do_sample=False, disable_compile=True)
        out = model.generate(**prompts(rows), cache_implementation="static", custom_generate=decoder, **asked)
        assert out.tolist() == model.generate(**prompts(rows), **asked).tolist()


@pytest.mark.parametrize("make", [
    lambda config: {CACHE_NAME: transformers.StaticCache(config=config, max_cache_len=40)},
    lambda config: {CACHE_NAME: DynamicCache(config=config, offloading=True)},
    lambda config: {CACHE_NAME: type("QuantizedCache", (DynamicCache,), {})(config=config)},
    lambda config: dict(cache_implementation="offloaded"),
])  # fmt: skip
def test_other_caches_are_refused(model, decoder, make):
    asked = make(model.config)
    with pytest.raises(ValueError, match=f"{'|'.join(asked)}.*: expected"):
        model.generate(**prompts(), max_new_tokens=5, custom_generate=decoder, **asked)


# What is refused


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(inputs_embeds=torch.zeros(1, PROMPT, WIDTH).double(), input_ids=None, attention_mask=None), "inputs_embeds"),
        (dict(num_beams=2), "num_beams"),
        (dict(penalty_alpha=0.6, top_k=4), "generation_config: expected .*contrastive search"),
        (dict(dola_layers="low"), "generation_config: expected .*dola"),
        (dict(output_attentions=True, return_dict_in_generate=True), "output_attentions"),
        (dict(output_hidden_states=True, return_dict_in_generate=True), "output_hidden_states"),
        (dict(attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]])), "attention_mask"),
        (dict(attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 0]])), "attention_mask"),
        (dict(position_ids=torch.arange(5, 5 + PROMPT)[None]), "position_ids"),
        (dict(no_such_thing=3), "no_such_thing"),
        (dict(output_attentions=True), "output_attentions: expected False"),
        (dict(output_hidden_states=True), "output_hidden_states: expected False"),
    ],
)  # fmt: skip
def test_refused(model, decoder, asked, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts() | dict(max_new_tokens=3, do_sample=False, custom_generate=decoder) | asked)


def test_models_that_cannot_be_decoded_speculatively_are_refused(decoder):
    with pytest.raises(ValueError, match="custom_generate: expected a decoder whose target is this model"):
        tiny().generate(**prompts(), max_new_tokens=3, custom_generate=decoder)
    for config, message in (
        (
            transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2),
            "encoder-decoder",
        ),
        (
            transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4),
            "cannot take back a rejected token",
        ),
    ):
        kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        other = kind.from_config(config)
        for refused in (Decoder, hedgespec.accelerate):
            with pytest.raises(ValueError, match=f"target: expected .*{message}"):
                refused(other, [NGramDrafter(VOCABULARY)])
    hybrid = tiny()
    hybrid.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="target: expected .*linear_attention"):
        hedgespec.accelerate(hybrid, [NGramDrafter(VOCABULARY)])


# accelerate and restore


def test_accelerate_is_reversible_and_of_one_instance():
    model, other = tiny(), tiny()
    model.lm_head.train()  # a flag that accelerate has no business with
    before, expected = dict(vars(model)), other.generate(**prompts(4), max_new_tokens=8, do_sample=False)
    assert hedgespec.accelerate(model, pool(model)) is model
    out = model.generate(**prompts(4), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.tolist() == expected.tolist() and len(out.hedgespec) == 4
    again = model.generate(
        prompts(4)["input_ids"], None, attention_mask=prompts(4)["attention_mask"], max_new_tokens=8, do_sample=False
    )
    assert again.tolist() == expected.tolist()
    with pytest.raises(ValueError, match="model: expected its own generate"):
        hedgespec.accelerate(model, pool(model))
    with pytest.raises(ValueError, match="assistant_model: expected None"):
        model.generate(**prompts(), assistant_model=other)
    plain = other.generate(**prompts(), max_new_tokens=3, return_dict_in_generate=True)
    assert "generate" not in vars(other) and not hasattr(plain, "hedgespec")
    assert hedgespec.restore(model) is model
    assert vars(model) == before and [module for module in model.modules() if module.training] == [model.lm_head]
    assert not hasattr(model.generate(**prompts(), max_new_tokens=3, return_dict_in_generate=True), "hedgespec")
    with pytest.raises(ValueError, match="model: expected one that hedgespec.accelerate"):
        hedgespec.restore(model)


def test_accelerate_takes_a_decoder_of_this_model(model, decoder):
    with pytest.raises(ValueError, match="drafters: expected a decoder whose target is this model"):
        hedgespec.accelerate(tiny(), decoder)
    with pytest.raises(ValueError, match="config: expected None beside a decoder"):
        hedgespec.accelerate(model, decoder, DecodeConfig())
    assert "generate" not in vars(model)


def test_another_decoding_loop_still_takes_its_turn():
    model = hedgespec.accelerate(tiny(), pool(tiny()))
    assert model.generate(**prompts(), max_new_tokens=3, custom_generate=lambda model, input_ids, **rest: "mine") == "mine"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_is_accelerated_by_itself(copied):
    model = tiny()
    hedgespec.accelerate(model, pool(model))
    expected = model.generate(**prompts(), max_new_tokens=8, do_sample=False)
    twin = copied(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    out = twin.generate(**prompts(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.tolist() == expected.tolist() and len(out.hedgespec) == 1
    assert not out.hedgespec[0].failures
    hedgespec.restore(twin)
    assert twin.generate(**prompts(), max_new_tokens=8, do_sample=False).tolist() == expected.tolist()
    assert "generate" in vars(model)


def test_an_accelerated_model_is_saved_as_any_other(tmp_path):
    model = tiny()
    names = list(model.state_dict())
    hedgespec.accelerate(model, pool(model))
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    asked = prompts() | dict(max_new_tokens=8, do_sample=False)
    assert loaded.generate(**asked).tolist() == model.generate(**asked).tolist()


@pytest.mark.parametrize("asked", ["speculative", ["speculative", "decoding", "is", "quick brown fox"]], ids=["text", "list"])
def test_pipelines(asked):
    options = dict(max_new_tokens=10, do_sample=False, batch_size=2)
    models = [tiny(), tiny()]
    hedgespec.accelerate(models[1], pool(models[1]))
    expected, out = (
        transformers.pipeline("text-generation", model=one, tokenizer=tokenizer())(asked, **options) for one in models
    )
    assert out == expected


# Robustness


class Interrupted(Exception):
    pass


class Raising(StoppingCriteria, LogitsProcessor, BaseStreamer):
    """Raises at its fourth call, whatever it is."""

    def __init__(self, error):
        self.error, self.left = error, 4

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return scores if isinstance(scores, torch.Tensor) else torch.zeros(len(input_ids), dtype=torch.bool)

    def put(self, value):
        self(value, None)

    def end(self):
        pass


def belongings(model) -> dict:
    """What every module has: attributes, submodules, and the hooks in force."""
    return {
        name: (list(vars(module)), type(module), list(module._modules), list(module._forward_hooks.values()))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["stopping_criteria", "logits_processor", "streamer", "forward"])
def test_an_error_leaves_everything_as_it_was(decoder, error, place):
    model = tiny()
    decoder = Decoder(model, pool(model))
    cache = DynamicCache(config=model.config)
    asked = dict(do_sample=False, return_dict_in_generate=True)
    text = model.generate(**prompts(), **{CACHE_NAME: cache}, max_new_tokens=3, custom_generate=decoder, **asked).sequences
    held, raising = copy.deepcopy(cache), Raising(error)
    if place == "forward":
        hook = model.lm_head.register_forward_hook(lambda module, arguments, out: raising(out, out))
        where = {}
    else:
        where = {place: [raising]}
    if place == "streamer":
        where = {"custom_generate": hedgespec.custom_generate(decoder, streamer=raising)}
    before = belongings(model)
    with pytest.raises(error):
        model.generate(text, **{CACHE_NAME: cache}, max_new_tokens=30, **asked, **{"custom_generate": decoder} | where)
    assert belongings(model) == before
    for one, other in zip(cache.layers, held.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    if place == "forward":
        hook.remove()
    again = model.generate(text, **{CACHE_NAME: cache}, max_new_tokens=10, custom_generate=decoder, **asked).sequences
    assert again.tolist() == model.generate(text, max_new_tokens=10, **asked).sequences.tolist()


def test_two_decoders_on_two_threads_over_one_target():
    """Heads make the target hand out hidden states, the other pool does not: neither may notice the other."""
    model = tiny()
    decoders = [
        Decoder(model, pool(model)),
        Decoder(model, [tiny_head(model, 2), NGramDrafter(VOCABULARY)]),
        Decoder(model, [NGramDrafter(VOCABULARY)]),
    ]
    asked = [
        prompts(4) | dict(max_new_tokens=10, do_sample=False, custom_generate=decoder, return_dict_in_generate=True)
        for decoder in decoders
    ]
    alone = [model.generate(**one) for one in asked]
    results: dict[int, list] = {}

    def work(index: int) -> None:
        results[index] = [model.generate(**asked[index]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        for out in results[index]:
            assert out.sequences.tolist() == expected.sequences.tolist()
            for own, wanted in zip(out.hedgespec, expected.hedgespec):
                assert (own.choices, own.emitted_by_round) == (wanted.choices, wanted.emitted_by_round)


def fails(error):
    def fault(logits):
        raise error

    return fault


FAULTS = {
    "raises": fails(RuntimeError("out of order")),
    "memory": fails(torch.OutOfMemoryError("CUDA out of memory")),
    "nan": lambda logits: logits * math.nan,
    "inf": lambda logits: logits + math.inf,
    "nothing": lambda logits: logits - math.inf,
    "shape": lambda logits: logits[:, :-3],
    "dtype": lambda logits: logits.nan_to_num(neginf=-9).long(),
    "type": lambda logits: None,
}


class Stillborn(NGramDrafter):
    def session(self):
        raise RuntimeError("no session today")


@pytest.mark.parametrize(
    ("fault", "alone"), [*((fault, False) for fault in FAULTS), ("session", False), ("raises", True), ("session", True)]
)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_drafter_that_fails_is_out_with_one_warning(model, fault, rows, alone):
    broken = Stillborn(VOCABULARY, name="broken") if fault == "session" else Broken(FAULTS[fault])
    decoder = Decoder(model, [broken] if alone else [tiny_head(model), broken, NGramDrafter(VOCABULARY)])
    for options in ({}, {"repetition_penalty": 1.2}):
        asked = prompts(rows) | dict(max_new_tokens=18, do_sample=False, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = model.generate(**asked, custom_generate=decoder, return_dict_in_generate=True)
        assert len([one for one in caught if "drafter broken is out" in str(one.message)]) == 1
        assert out.sequences.tolist() == model.generate(**asked).tolist()
        assert all(set(stats.failures) == {"broken"} for stats in out.hedgespec)
        if alone:
            assert all(stats.choices[-2:] == [-1, -1] for stats in out.hedgespec)


def test_rows_decoded_in_turns_warn_once():
    model = tiny(kind=transformers.BloomConfig, n_layer=2, n_head=4).float()
    decoder = Decoder(model, [Stillborn(VOCABULARY, name="broken"), NGramDrafter(VOCABULARY)])
    with pytest.warns(UserWarning, match="drafter broken is out of this request: RuntimeError: no session") as caught:
        model.generate(**prompts(4), max_new_tokens=4, do_sample=False, custom_generate=decoder)
    assert len(caught) == 1


# Targets


class Adapted(nn.Linear):
    """As PEFT does it: a subclass of Linear around another, with something added."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, bias=False, dtype=base.weight.dtype)
        self.weight = base.weight
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Quantized(nn.Module):
    """As quantisers do it: no Linear at all, weights in int8, computed in the input's dtype."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (base.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.weight * self.scale).to(x.dtype).T


@pytest.mark.parametrize("kind", [Adapted, Quantized])
def test_layers_swapped_in_later_are_honoured(kind):
    model = tiny()
    decoder = Decoder(model, pool(model))
    asked = prompts(4) | dict(max_new_tokens=12, do_sample=False)
    before = model.generate(**asked, custom_generate=decoder)
    for layer in model.model.layers:
        layer.self_attn.q_proj, layer.mlp.down_proj = kind(layer.self_attn.q_proj), kind(layer.mlp.down_proj)
    after = model.generate(**asked, custom_generate=decoder)
    assert after.tolist() == model.generate(**asked).tolist() != before.tolist()


def test_hooks_of_the_targets_layers_are_called(model, decoder):
    hook = model.model.layers[1].mlp.register_forward_hook(lambda module, arguments, out: out * 0.5)
    try:
        asked = prompts(4) | dict(max_new_tokens=12, do_sample=False)
        assert model.generate(**asked, custom_generate=decoder).tolist() == model.generate(**asked).tolist()
    finally:
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_run(dtype):
    """Sums round differently for a chunk than for a token, so that texts may part; lengths and types may not."""
    model = tiny().to(dtype)
    decoder = Decoder(model, [CausalLMDrafter(model, model), tiny_head(model).to(dtype), NGramDrafter(VOCABULARY)])
    for asked in (dict(do_sample=True, top_p=0.9), dict(do_sample=False, repetition_penalty=1.2)):
        out = model.generate(**prompts(4), max_new_tokens=10, return_dict_in_generate=True, custom_generate=decoder, **asked)
        assert out.sequences.shape == (4, PROMPT + 10) and not any(stats.failures for stats in out.hedgespec)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.ao.quantization.*")
def test_dynamic_quantization_runs():
    """It scales a forward's activations by their largest, so that a chunk rounds differently than a token: texts may part."""
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("no quantised kernels here")
    model = torch.ao.quantization.quantize_dynamic(tiny().float(), {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in model.modules())
    decoder = Decoder(model, [CausalLMDrafter(model, model), NGramDrafter(VOCABULARY)])
    out = model.generate(
        **prompts(4), max_new_tokens=10, do_sample=False, return_dict_in_generate=True, custom_generate=decoder
    )
    assert out.sequences.shape == (4, PROMPT + 10) and not any(stats.failures for stats in out.hedgespec)
    assert all(stats.rounds < 9 for stats in out.hedgespec)


FAMILIES = {
    "qwen3": dict(kind=transformers.Qwen3Config, head_dim=8),
    "gemma2": dict(kind=transformers.Gemma2Config, sliding_window=6, head_dim=8, query_pre_attn_scalar=8),
    "gemma3": dict(kind=transformers.Gemma3TextConfig, sliding_window=6, head_dim=8, query_pre_attn_scalar=8),
    "phi": dict(kind=transformers.PhiConfig),
    "gpt_neox": dict(kind=transformers.GPTNeoXConfig),
    "mixtral": dict(kind=transformers.MixtralConfig, num_local_experts=4, sliding_window=6),
    "eager": dict(attn_implementation="eager"),
    "gpt2": dict(kind=transformers.GPT2Config, n_embd=WIDTH, n_layer=2, n_head=4),
    "opt": dict(kind=transformers.OPTConfig, ffn_dim=24, word_embed_proj_dim=WIDTH),
    "bloom": dict(kind=transformers.BloomConfig, n_layer=2, n_head=4),  # takes no positions: rows are decoded in turns
    "falcon": dict(kind=transformers.FalconConfig, alibi=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """In float32: eager attention makes NaN of padding in float64, experts do not run in it."""
    model, wrong = tiny(**FAMILIES[family]).float(), tiny(seed=5, num_hidden_layers=1).float()
    decoder = Decoder(model, [CausalLMDrafter(model, model), CausalLMDrafter(wrong, model, name="wrong")])
    asked = prompts(4) | dict(max_new_tokens=12, do_sample=False)
    out = model.generate(**asked, custom_generate=decoder, return_dict_in_generate=True)
    assert out.sequences.tolist() == model.generate(**asked).tolist()
    assert not any(stats.failures for stats in out.hedgespec)


VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)  # fmt: skip
CLIP = dict(model_type="clip_vision_model", **VISION)
QWEN_VISION = dict(depth=1, hidden_size=16, num_heads=2)
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}}
VISION_LANGUAGE = {
    "Llava": dict(text_config=dict(model_type="llama", **TINY), vision_config=CLIP),
    "LlavaNext": dict(text_config=dict(model_type="llama", **TINY), vision_config=CLIP),
    "Mistral3": dict(text_config=dict(model_type="mistral", **TINY), vision_config=dict(model_type="pixtral", **VISION)),
    "Gemma3": dict(
        text_config=dict(head_dim=4, sliding_window=6, **TINY), vision_config=dict(model_type="siglip_vision_model", **VISION),
        boi_token_index=50, eoi_token_index=51,
    ),
    "Qwen2VL": dict(text_config=TINY | MROPE, vision_config=QWEN_VISION | dict(embed_dim=16, mlp_ratio=2)),
    "Qwen2_5_VL": dict(text_config=TINY | MROPE, vision_config=QWEN_VISION | dict(intermediate_size=16, out_hidden_size=16)),
}  # fmt: skip


@pytest.mark.parametrize("name", VISION_LANGUAGE)
@pytest.mark.parametrize("rows", [1, 4])
def test_text_alone_through_vision_language_models(name, rows):
    """`generate` prepares empty arguments for pictures, and positions in three or four dimensions."""
    config = getattr(transformers, f"{name}Config")(**VISION_LANGUAGE[name], image_token_id=52)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).double().eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    decoder = Decoder(model, [NGramDrafter(VOCABULARY), CausalLMDrafter(tiny(), model)], DecodeConfig(draft_length=3))
    batch = prompts(rows)
    batch["input_ids"] = batch["input_ids"].clamp(max=49)  # 52 is a picture
    asked = batch | dict(max_new_tokens=12, do_sample=False, suppress_tokens=[50, 51, 52])
    expected = model.generate(**asked)
    assert model.generate(**asked, custom_generate=decoder).tolist() == expected.tolist()
    types = torch.zeros_like(batch["input_ids"])  # what their processors return beside text
    for kinds in ("mm_token_type_ids", "token_type_ids"):
        if kinds in inspect.signature(model.forward).parameters:
            assert model.generate(**asked, **{kinds: types}).tolist() == expected.tolist()
            assert model.generate(**asked, **{kinds: types}, custom_generate=decoder).tolist() == expected.tolist()
            with pytest.raises(ValueError, match=f"{kinds}: expected no such argument"):
                model.generate(**asked, **{kinds: types + 1}, custom_generate=decoder)


def test_pictures_are_refused():
    config = transformers.LlavaConfig(**VISION_LANGUAGE["Llava"], image_token_id=52)
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    decoder = Decoder(model, [NGramDrafter(VOCABULARY)])
    batch = prompts()
    batch["input_ids"][0, 2:6] = 52
    with pytest.raises(ValueError, match="(mm_encoder_outputs|pixel_values): expected no such argument"):
        model.generate(**batch, pixel_values=torch.zeros(1, 3, 8, 8).double(), max_new_tokens=2, custom_generate=decoder)


def test_positions_in_several_dimensions_are_looked_at():
    prompt = (torch.arange(1, 6), 2)
    good = torch.tensor([0, 0, 0, 1, 2]).expand(3, 1, 5)
    check_positions(good, [prompt])
    wrong = good.clone()
    wrong[2, 0, -1] = 7
    with pytest.raises(ValueError, match="position_ids: expected 0, 1"):
        check_positions(wrong, [prompt])


PLACES = {
    "auto": "auto",
    "cpu": {"": "cpu"},
    "disk": {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "disk"},
    "embeddings on disk": {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
                           "lm_head": "cpu"},
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
@pytest.mark.parametrize("place", PLACES)
def test_targets_placed_by_accelerate(tmp_path, place):
    plain = tiny(tie_word_embeddings=False)
    plain.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, device_map=PLACES[place], offload_folder=str(tmp_path / "offloaded")
    )
    decoder = Decoder(model, [CausalLMDrafter(plain, model), NGramDrafter(VOCABULARY)])
    for rows in (1, 4):
        asked = prompts(rows) | dict(max_new_tokens=8, do_sample=False)
        assert model.generate(**asked, custom_generate=decoder).tolist() == plain.generate(**asked).tolist()
