"""The steps of CONTRIBUTING.md, walked with a toy learner, a toy drafter kind and a toy backend through public names only."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers.docs import tiny_llama

import hedgespec
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.errors import BackendUnavailableError
from hedgespec.learners import Learner, make
from hedgespec.ops import backends
from hedgespec.ops.linear import linear


@pytest.fixture(scope="module")
def target():
    return tiny_llama()


def prompt_of(target, length: int = 12) -> torch.Tensor:
    return torch.randint(target.config.vocab_size, (1, length))


def greedy(target, prompt: torch.Tensor, count: int) -> list[int]:
    """Returns the argmax continuation, one full forward a token."""
    tokens = prompt
    with torch.inference_mode():
        for _ in range(count):
            tokens = torch.cat([tokens, target(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens[0].tolist()


# A learner


class FollowTheLeader(Learner):
    """losses_sum += losses; all weight is on the drafters with the smallest sum.

    >>> learner = FollowTheLeader(2)
    >>> learner.update([0.5, 0.0])
    >>> learner.weights().tolist()
    [0.0, 1.0]
    """

    name = "follow_the_leader"
    feedback = "full"
    STATE = ("losses_sum",)

    def _learn(self, losses, chosen, chosen_weight):
        self.losses_sum += losses

    def _weigh(self):
        leaders = self.losses_sum == self.losses_sum.min()
        return leaders / leaders.sum()


def test_a_learner_is_added_in_five_steps(target, tmp_path):
    hedgespec.learners.register(FollowTheLeader)  # steps 1 to 4
    assert "follow_the_leader" in hedgespec.learners.NAMES
    learner = make("follow_the_leader", 3)
    for losses in ([0.5, 0.1, 0.4], [0.0, 0.3, 0.4]):
        learner.update(losses)
    assert learner.weights().tolist() == np.eye(3)[1].tolist() or learner.weights().argmax() == 1
    again = make("follow_the_leader", 3)
    again.load_state_dict(json.loads(json.dumps(learner.state_dict())))
    assert again.weights().tolist() == learner.weights().tolist()

    drafters = [RepeatDrafter(target.config.vocab_size), NGramDrafter(target.config.vocab_size)]
    decoder = hedgespec.Decoder(target, drafters, hedgespec.DecodeConfig(learner="follow_the_leader", warm_start=0))
    prompt = prompt_of(target)
    out = decoder.generate(prompt, max_new_tokens=24, seed=0)
    [stats] = out.stats
    assert out.sequences[0].tolist() == greedy(target, prompt, 24)
    expected = np.sum(stats.losses, axis=0)  # step 5: a second implementation of the formula
    assert stats.learner_state["losses_sum"] == pytest.approx(expected.tolist())
    assert set(np.unique(stats.weights)) <= {0.0, 0.5, 1.0}
    hedgespec.save_learner_state(tmp_path / "state.json", stats)
    assert hedgespec.load_learner_state(tmp_path / "state.json", decoder)["name"] == "follow_the_leader"


def test_a_learner_is_registered_once_by_name_and_as_a_learner():
    class Other(FollowTheLeader):
        name = "normal_hedge"

    with pytest.raises(ValueError, match="normal_hedge"):
        hedgespec.learners.register(Other)
    with pytest.raises(TypeError, match="Learner"):
        hedgespec.learners.register(object)
    assert type(make("normal_hedge", 2)) is not Other


# A drafter kind


class RepeatDrafter:
    """Proposes the last token again, with certainty."""

    name, draft_to_target, aux_layers = "repeat", None, ()

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def session(self):
        return RepeatSession(self.vocab_size)


class RepeatSession:
    def __init__(self, vocab_size: int):
        self.vocab_size, self.verified = vocab_size, 0

    def consume(self, tokens, features, logits_to_keep):
        self.verified += len(tokens)
        return self._logits(tokens[-logits_to_keep:])

    def step(self, token):
        return self._logits(token)[0]

    def _logits(self, tokens):
        return torch.full((len(tokens), self.vocab_size), -math.inf).scatter(1, tokens[:, None], 0.0)


class OldSession:
    """A session written for 0.1, whose `consume` was called `prefill`."""

    def __init__(self, session):
        self.prefill, self.step, self._session = session.consume, session.step, session

    @property
    def verified(self):
        return self._session.verified


class OldDrafter(RepeatDrafter):
    def session(self):
        return OldSession(super().session())


def make_repeat(vocab_size: int) -> RepeatDrafter:
    """The factory that a pool for vLLM would name."""
    return RepeatDrafter(vocab_size)


@pytest.mark.parametrize("learner", ["normal_hedge", "ucb", "uniform"])
def test_a_drafter_kind_is_added_in_five_steps(target, learner):
    vocab_size = target.config.vocab_size
    drafters = [make_repeat(vocab_size), NGramDrafter(vocab_size)]  # steps 1 to 4
    decoder = hedgespec.Decoder(target, drafters, hedgespec.DecodeConfig(learner=learner))
    prompt = prompt_of(target)
    out = decoder.generate(prompt, max_new_tokens=24, seed=0)
    assert out.sequences[0].tolist() == greedy(target, prompt, 24)  # step 5
    assert out.stats[0].failures == {}
    assert out.stats[0].picks[0] > 0 or learner != "uniform"
    tokens = torch.randint(vocab_size, (9,))
    whole, parts = drafters[0].session(), drafters[0].session()
    at_once = whole.consume(tokens, None, 9)
    in_parts = torch.cat([parts.consume(tokens[:4], None, 4), parts.consume(tokens[4:], None, 5)])
    assert at_once.equal(in_parts)
    assert whole.verified == parts.verified == 9


# A backend


def toy_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The launcher of the toy kernel: one dot product after another."""
    rows = x.reshape(-1, x.shape[-1])
    columns = [torch.stack([torch.dot(row, column) for column in weight]) for row in rows]
    return torch.stack(columns).reshape(*x.shape[:-1], len(weight))


def test_a_backend_is_added_in_five_steps():
    calls = []

    def load():  # steps 1 to 3: nothing else on this machine serves "triton" for `linear`
        def launch(x, weight):
            calls.append(x.shape)
            return toy_linear(x, weight)

        return launch

    backends.register("linear", "triton", load, devices=("cpu",), dtypes=(torch.float32,))
    x, weight = torch.randn(2, 3, 5), torch.randn(4, 5)
    found = linear(x, weight, backend="triton")  # step 4
    assert calls == [x.shape]
    torch.testing.assert_close(found, linear(x, weight, backend="reference"))  # step 5
    assert "triton" in backends.available("linear")
    with pytest.raises(TypeError, match="backend: 'triton' takes float32"):
        linear(x.double(), weight.double(), backend="triton")


def test_a_backend_that_cannot_be_loaded_says_why():
    def load():
        raise ImportError("no such module: toy")

    backends.register("linear", "triton", load, devices=("cpu",))
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    with pytest.raises(BackendUnavailableError, match="no such module: toy") as caught:
        linear(x, weight, backend="triton")
    assert isinstance(caught.value.__cause__, ImportError)
    assert linear(x, weight).shape == (3, 4)  # "auto" does not depend on it
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu, triton, cuda"):
        backends.register("linear", "toy", load)


def test_the_steps_are_five():
    """CONTRIBUTING.md has five numbered steps under each of the three headings."""
    from helpers.docs import ROOT

    text = (ROOT / "CONTRIBUTING.md").read_text()
    for heading in ("Add a learner", "Add a drafter kind", "Add a kernel backend"):
        section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        assert [line[:3] for line in section.splitlines() if line[:1].isdigit()] == [f"{step}. " for step in range(1, 6)]


def test_a_session_may_still_call_consume_prefill(target):
    drafter = OldDrafter(target.config.vocab_size)
    prompt = torch.arange(1, 9)[None]
    with pytest.warns(DeprecationWarning, match="drafter repeat: the method `prefill` of a session is now `consume`"):
        out = hedgespec.Decoder(target, [drafter]).generate(prompt, max_new_tokens=12)
    assert not out.stats[0].failures
    assert out.sequences.tolist() == target.generate(prompt, max_new_tokens=12, do_sample=False).tolist()
