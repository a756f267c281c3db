"""The verification rule loses nothing: its law is the target's own, both measured step by step and sampled.

The reference is held to that in float64; every other backend in float32, and to the reference's own tokens.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import TOLERANCES
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hedgespec.ops import backends
from hedgespec.ops.verify import sample, verify, verify_reference
from hedgespec.records import Verdict

rule = importlib.import_module("hedgespec.ops.verify")  # the module: the package may export the function under this name

INF = math.inf
LAST = 1 - 2.0**-53  # the largest float64 uniform
SHARP = torch.float64


@dataclass(frozen=True)
class Budget:
    """How much a backend is put through here."""

    worlds: tuple[str, ...] | None = None  # None: all of them
    draws: int = 60_000  # of the sampled law
    batches: int = 40  # for each vocabulary against the reference
    rows: int = 24  # of each
    most: int = 10**9  # rows of any other call

    def at_most(self, rows):
        return min(rows, self.most)


def budget_of(backend):
    """Where the CPU runs kernels meant for a GPU, an emulated row takes 0.3 ms, one in Triton's interpreter 100."""
    if torch.cuda.is_available() or backend in ("reference", "cpu"):
        return Budget()
    if backend == "cuda":
        return Budget(draws=2000, batches=8, rows=8)
    return Budget(("sampled-K1-reduced",), draws=0, batches=3, rows=4, most=15)


def dtype_of(backend):
    """The widest logits that the backend takes."""
    return SHARP if backend == "reference" else torch.float32


def run(backend, **arguments):
    """`verify` on the device that the backend takes tensors on."""
    device = "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    verdict = verify(**moved, backend=backend)
    return Verdict(verdict.accepted_length.cpu(), verdict.tokens.cpu())


@pytest.fixture
def poisoned_integers(monkeypatch):
    """torch.empty hands out integers that are no token, so that an output element nobody writes is seen."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor if tensor.is_floating_point() else tensor.fill_(-77)

    monkeypatch.setattr(torch, "empty", poisoned)


def distribution(logits, temperature=1.0, threshold=-INF):
    """The softmax this file trusts: NumPy float64, written apart from the package's."""
    logits = np.where(np.asarray(logits, np.float64) < np.asarray(threshold)[..., None], -INF, logits)
    if temperature == 0:
        return np.eye(logits.shape[-1])[logits.argmax(-1)]
    weights = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return weights / weights.sum(-1, keepdims=True)


# A world: a target and a drafter that give every prefix its own logits.


@dataclass(frozen=True)
class World:
    draft_length: int
    vocabulary: int = 3
    mode: str = "sampled"
    draft_to_target: tuple[int, ...] | None = None
    target_temperature: float = 1.0
    draft_temperature: float = 1.0
    target_threshold: float | None = None
    draft_threshold: float | None = None
    impossible: bool = False  # token 0 is masked from the target, never from the drafter
    seed: int = 0

    def tables(self):
        """Logits for every prefix: target[k] is [V^k, V] for k = 0..K, draft[k] is [V^k, Vd] for k = 0..K-1.

        They are numbers of float32, so that every backend sees the same ones.
        """
        rng = np.random.default_rng(self.seed)
        width = self.vocabulary if self.draft_to_target is None else len(self.draft_to_target)

        def normal(*shape):
            return (1.5 * rng.normal(size=shape)).astype(np.float32).astype(np.float64)

        target = [normal(self.vocabulary**k, self.vocabulary) for k in range(self.draft_length + 1)]
        draft = [normal(self.vocabulary**k, width) for k in range(self.draft_length)]
        if self.impossible:
            for table in target:
                table[:, 0] = -INF
        return target, draft

    def target_probs(self):
        threshold = -INF if self.target_threshold is None else self.target_threshold
        return [distribution(table, self.target_temperature, threshold) for table in self.tables()[0]]

    def proposal_probs(self):
        """The proposal over the target's vocabulary, [V^k, V] for each position."""
        threshold = -INF if self.draft_threshold is None else self.draft_threshold
        temperature = 0 if self.mode == "argmax" else self.draft_temperature
        ids = range(self.vocabulary) if self.draft_to_target is None else self.draft_to_target
        spread = np.eye(self.vocabulary)[list(ids)]
        return [distribution(table, temperature, threshold) @ spread for table in self.tables()[1]]

    def options(self, rows):
        def threshold(value, columns):
            return None if value is None else torch.full((rows, columns), value, dtype=SHARP)

        return dict(
            mode=self.mode,
            draft_to_target=None if self.draft_to_target is None else torch.tensor(self.draft_to_target),
            target_temperature=self.target_temperature,
            draft_temperature=self.draft_temperature,
            target_threshold=threshold(self.target_threshold, self.draft_length + 1),
            draft_threshold=threshold(self.draft_threshold, self.draft_length),
        )

    def logits(self, drafts, dtype=SHARP):
        """The logits seen by each row of drafts [R, K]: target [R, K+1, V] and draft [R, K, Vd] (None for K = 0)."""
        prefixes = [prefix_index(drafts[:, :k], self.vocabulary) for k in range(self.draft_length + 1)]
        target, draft = (
            [torch.as_tensor(table[prefix], dtype=dtype) for table, prefix in zip(tables, prefixes, strict=False)]
            for tables in self.tables()
        )
        return torch.stack(target, 1), torch.stack(draft, 1) if draft else None


def prefix_index(tokens, vocabulary):
    """Tokens [R, k] as the digits of one number in base V."""
    return tokens @ (vocabulary ** np.arange(tokens.shape[1])[::-1])


def chain(probs):
    """Probability of every sequence, [V^n], from per-prefix distributions [V^k, V]."""
    law = np.ones(1)
    for table in probs:
        law = (law[:, None] * table).ravel()
    return law


WORLDS = {
    f"{mode}-K{draft_length}{name}": World(draft_length, mode=mode, seed=seed, **options)
    for seed, (mode, draft_length, (name, options)) in enumerate(
        itertools.product(
            ("sampled", "argmax"),
            (1, 2, 3),
            (("", {}), ("-reduced", dict(vocabulary=4, draft_to_target=(3, 1)))),
        )
    )
} | {
    "repeated-ids": World(2, draft_to_target=(2, 0, 2), seed=20),
    "impossible-token": World(2, impossible=True, seed=21),
    "impossible-token-argmax": World(2, mode="argmax", impossible=True, seed=22),
    "temperatures": World(2, target_temperature=0.6, draft_temperature=1.7, seed=23),
    "cold-drafter": World(2, draft_temperature=0, seed=24),
    "cold-target": World(2, target_temperature=0, seed=25),
    "cold-target-argmax": World(2, mode="argmax", target_temperature=0, seed=26),
    "cold-both": World(2, target_temperature=0, draft_temperature=0, seed=27),
    "thresholds": World(2, vocabulary=4, target_threshold=-0.5, draft_threshold=-0.8, target_temperature=0.8, seed=28),
    "draws-only": World(0, vocabulary=5, seed=29),
}


def affordable(backend, name):
    """A world, if the backend can be put through it."""
    worlds = budget_of(backend).worlds
    if worlds is not None and name not in worlds:
        pytest.skip("a world too large for an interpreted backend")
    return WORLDS[name]


# The exact law. Each uniform moves the outcome along a staircase, and bisection finds every step to the last bit of
# float64, so nothing here repeats the formulas under test.


def measure(holds, shape, steps):
    """Length of {u in [0, 1): holds(u)} for each entry, where holds is true up to some u and false beyond."""
    low, high = torch.zeros(shape, dtype=SHARP), torch.ones(shape, dtype=SHARP)
    for _ in range(steps):
        middle = (low + high) / 2
        inside = holds(middle.clamp(max=LAST))
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return high.numpy()


def staircases(world, drafts, backend):
    """What one round makes of each drafted sequence [R, K], read off `verify` alone.

    accept [K, R] is the chance that position k is accepted once it is reached; following [K+1, V, R] is the law of the
    token emitted at position k after a stop there.
    """
    rows, draft_length = drafts.shape
    last_column = draft_length
    probes = [(k, k, None) for k in range(draft_length)]  # (the uniform that moves, the position, the token's bound)
    probes += [(last_column, k, v) for k in range(draft_length + 1) for v in range(world.vocabulary - 1)]
    moving = torch.tensor([column for column, _, _ in probes])[:, None, None].expand(-1, rows, 1)
    uniforms = torch.zeros(len(probes), rows, draft_length + 1, dtype=SHARP)  # accept all that can be ...
    for probe, (_, k, bound) in enumerate(probes):
        if bound is not None and k < draft_length:
            uniforms[probe, :, k] = LAST  # ... but stop at k

    drafts = np.tile(drafts, (len(probes), 1))
    target_logits, draft_logits = world.logits(drafts, dtype_of(backend))
    arguments = dict(target_logits=target_logits, draft_tokens=torch.as_tensor(drafts), draft_logits=draft_logits)
    arguments |= world.options(len(drafts))

    def holds(moved):
        moved = uniforms.scatter(-1, moving, moved[..., None]).flatten(0, 1)
        verdict = run(backend, **arguments, uniforms=moved)
        accepted_length = verdict.accepted_length.view(len(probes), rows)
        tokens = verdict.tokens.view(len(probes), rows, -1)
        return torch.stack(
            [
                accepted_length[probe] > k if bound is None else tokens[probe, :, k] <= bound
                for probe, (_, k, bound) in enumerate(probes)
            ]
        )

    measured = measure(holds, (len(probes), rows), steps=60 if backend == "reference" else 22)
    below = measured[draft_length:].reshape(draft_length + 1, world.vocabulary - 1, rows)
    return measured[:draft_length], np.diff(below, axis=1, prepend=0, append=1)


def exact_law(world, backend):
    """Probability of every sequence of K+1 tokens: emitted by one round, completed by the target. [V^(K+1)]."""
    vocabulary, draft_length = world.vocabulary, world.draft_length
    drafts = np.array(list(itertools.product(range(vocabulary), repeat=draft_length)), np.int64)
    reached = chain(world.proposal_probs())
    drafts, reached = drafts[reached > 0], reached[reached > 0]
    accept, following = staircases(world, drafts, backend)

    law = np.ones(1)
    for k, table in enumerate(world.target_probs()):
        stops = reached * (1 - accept[k] if k < draft_length else 1)
        prefix = prefix_index(drafts[:, :k], vocabulary)
        emitted = np.zeros(vocabulary ** (k + 1))
        for token in range(vocabulary):
            np.add.at(emitted, prefix * vocabulary + token, stops * following[k, token])
        law = emitted if k == 0 else (law[:, None] * table).ravel() + emitted
        reached = reached * accept[k] if k < draft_length else reached
    return law


def law_error(world, backend="reference"):
    return np.abs(exact_law(world, backend) - chain(world.target_probs())).max()


@pytest.mark.parametrize("name", WORLDS)
def test_exact_law_is_the_targets(backend, name):
    assert law_error(affordable(backend, name), backend) < TOLERANCES[dtype_of(backend)]


# The sampled law, through the public functions a decoder calls.


def chi_square_p_value(world, backend="reference", draws=60_000):
    generator = torch.Generator().manual_seed(world.seed)
    vocabulary, draft_length = world.vocabulary, world.draft_length
    target, draft = world.tables()
    options = world.options(draws)

    tokens = np.zeros((draws, 0), np.int64)
    for table in draft:
        logits = torch.as_tensor(table[prefix_index(tokens, vocabulary)])
        threshold = None if world.draft_threshold is None else options["draft_threshold"][:, 0]
        temperature = 0 if world.mode == "argmax" else world.draft_temperature
        ids = sample(logits, torch.rand(draws, generator=generator), temperature=temperature, threshold=threshold)
        ids = ids if world.draft_to_target is None else options["draft_to_target"][ids]
        tokens = np.column_stack([tokens, ids.numpy()])
    target_logits, draft_logits = world.logits(tokens, dtype_of(backend))
    arguments = dict(target_logits=target_logits, draft_tokens=torch.as_tensor(tokens), draft_logits=draft_logits)
    verdict = run(backend, **arguments, uniforms=torch.rand(draws, draft_length + 1, generator=generator), **options)

    emitted = verdict.tokens.numpy().copy()
    for k in range(draft_length + 1):
        known = emitted[:, :k].copy()
        threshold = None if world.target_threshold is None else options["target_threshold"][:, 0]
        logits = torch.as_tensor(target[k][prefix_index(known, vocabulary)])
        drawn = torch.rand(draws, generator=generator)
        own = sample(logits, drawn, temperature=world.target_temperature, threshold=threshold).numpy()
        emitted[:, k] = np.where(emitted[:, k] < 0, own, emitted[:, k])

    counts = np.bincount(prefix_index(emitted, vocabulary), minlength=vocabulary ** (draft_length + 1))
    expected = draws * chain(world.target_probs())
    if counts[expected == 0].any():
        return 0.0
    if (expected > 0).sum() == 1:
        return 1.0
    return stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue


@pytest.mark.parametrize("name", WORLDS)
def test_sampled_law_is_the_targets(backend, name):
    world, draws = affordable(backend, name), budget_of(backend).draws
    if draws == 0:
        pytest.skip("too many draws for an interpreted backend")
    assert chi_square_p_value(world, backend, draws) > 1e-3


# Tokens the target never says. Uniforms of exactly 0 have a real probability, and no law of measure sees them.


def emits_the_impossible(world, backend="reference"):
    drafts = np.array(list(itertools.product(range(world.vocabulary), repeat=world.draft_length)), np.int64)
    corners = list(itertools.product((0.0, LAST), repeat=world.draft_length + 1))
    drafts, uniforms = np.repeat(drafts, len(corners), 0), torch.tensor(corners * len(drafts), dtype=SHARP)
    target_logits, draft_logits = world.logits(drafts, dtype_of(backend))
    arguments = dict(target_logits=target_logits, draft_tokens=torch.as_tensor(drafts), draft_logits=draft_logits)
    tokens = run(backend, **arguments, uniforms=uniforms, **world.options(len(drafts))).tokens
    return bool((tokens == 0).any())


@pytest.mark.parametrize("mode", ["sampled", "argmax"])
def test_impossible_tokens_are_never_emitted(backend, mode):
    draft_length = 2 if budget_of(backend).at_most(72) == 72 else 1
    assert not emits_the_impossible(World(draft_length, mode=mode, impossible=True, seed=30), backend)


# Mutants: each of these breaks the rule in one place, and the checks above must say so.


def accept_non_strictly(uniforms, draft_prob, target_prob):
    return uniforms * draft_prob <= target_prob


def accept_swapped(uniforms, draft_prob, target_prob):
    return uniforms * target_prob < draft_prob


def accept_everything_after_a_gap(accepted):
    return accepted.sum(-1)


def recover_from_the_target(target_probs, draft_probs, rejected):
    return target_probs


def draw_the_bonus_from_the_drafter(target_probs, draft_probs, rejected):
    return torch.where(rejected[:, None], (target_probs - draft_probs).clamp(min=0), draft_probs)


def draw_the_bonus_from_the_residual(target_probs, draft_probs, rejected):
    return (target_probs - draft_probs).clamp(min=0)


def draw_without_normalising(weights, uniforms):
    cumulative = weights.cumsum(-1, dtype=SHARP)
    drawn = torch.searchsorted(cumulative, uniforms.to(SHARP).contiguous(), right=True)
    return drawn.clamp(max=weights.shape[-1] - 1)


MUTANTS = {
    accept_swapped: "_accepts",
    accept_everything_after_a_gap: "_leading",
    recover_from_the_target: "_next_weights",
    draw_the_bonus_from_the_drafter: "_next_weights",
    draw_the_bonus_from_the_residual: "_next_weights",
    draw_without_normalising: "_inverse_cdf",
}


@pytest.mark.parametrize("mode", ["sampled", "argmax"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_both_laws_catch_the_mutant(mutant, mode, monkeypatch):
    world = World(2, mode=mode, seed=100)
    monkeypatch.setattr(rule, MUTANTS[mutant], mutant)
    assert law_error(world) > 1e-3
    assert chi_square_p_value(world) < 1e-9


@pytest.mark.parametrize("mode", ["sampled", "argmax"])
def test_corner_uniforms_catch_non_strict_acceptance(mode, monkeypatch):
    monkeypatch.setattr(rule, "_accepts", accept_non_strictly)
    assert emits_the_impossible(World(2, mode=mode, impossible=True, seed=30))


# One call at a time.


def case(batch=2, draft_length=3, vocabulary=6, draft_vocabulary=None, dtype=SHARP, seed=0, **options):
    """A random call to verify, as keyword arguments."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (2 * torch.randn(*shape, generator=generator, dtype=SHARP)).to(dtype)

    mapped = draft_vocabulary is not None
    draft_to_target = torch.randperm(vocabulary, generator=generator)[:draft_vocabulary] if mapped else None
    draft_logits = normal(batch, draft_length, draft_vocabulary if mapped else vocabulary)
    ids = sample(draft_logits, torch.rand(batch, draft_length, generator=generator))
    arguments = dict(
        target_logits=normal(batch, draft_length + 1, vocabulary),
        draft_tokens=draft_to_target[ids] if mapped else ids,
        draft_logits=draft_logits,
        uniforms=torch.rand(batch, draft_length + 1, generator=generator),
        draft_to_target=draft_to_target,
    )
    return arguments | options


def same(one, other):
    return torch.equal(one.accepted_length, other.accepted_length) and torch.equal(one.tokens, other.tokens)


def row_alone(arguments, row, length):
    """The call for one row of a batch, cut to its length: the last uniform stays the last."""
    cut = dict(
        target_logits=length + 1,
        draft_tokens=length,
        draft_logits=length,
        target_threshold=length + 1,
        draft_threshold=length,
    )
    alone = {
        name: value[row : row + 1, : cut.get(name)] if isinstance(value, torch.Tensor) and value.dim() > 1 else value
        for name, value in arguments.items()
    }
    kept = [*range(length), arguments["uniforms"].shape[1] - 1]
    alone["uniforms"] = arguments["uniforms"][row : row + 1, kept]
    if arguments["draft_to_target"] is not None and arguments["draft_to_target"].dim() == 2:
        alone["draft_to_target"] = arguments["draft_to_target"][row]
    for name in ("target_temperature", "draft_temperature"):
        alone[name] = arguments[name][row].item()
    return alone | dict(lengths=None)


@pytest.mark.parametrize("mode", ["sampled", "argmax"])
@pytest.mark.parametrize("per_row_map", [False, True])
def test_a_batch_is_its_rows_alone(backend, mode, per_row_map):
    batch, draft_length, vocabulary = budget_of(backend).at_most(150), 3, 6
    arguments = case(batch, draft_length, vocabulary, 4, dtype_of(backend), mode=mode)
    lengths = torch.arange(batch) % (draft_length + 1)
    arguments |= dict(
        lengths=lengths,
        uniforms=arguments["uniforms"] ** 8,  # accept often
        target_temperature=torch.tensor([0.0, 0.5, 1.0, 2.0, 1e-30]).repeat(batch // 5),
        draft_temperature=torch.tensor([1.0, 0.0, 0.7]).repeat(batch // 3),
        target_threshold=arguments["target_logits"].sort(-1).values[..., 2],
        draft_threshold=arguments["draft_logits"].sort(-1).values[..., 1],
    )
    if per_row_map:
        generator = torch.Generator().manual_seed(1)
        maps = torch.stack([torch.randperm(vocabulary, generator=generator)[:4] for _ in range(batch)])
        arguments |= dict(draft_to_target=maps, draft_tokens=maps[:, :draft_length].flip(1))
    padding = torch.arange(draft_length) >= lengths[:, None]
    arguments["draft_tokens"] = arguments["draft_tokens"].masked_fill(padding, -1)
    together = run(backend, **arguments)
    for row, length in enumerate(lengths.tolist()):
        alone = run(backend, **row_alone(arguments, row, length))
        assert together.accepted_length[row] == alone.accepted_length[0]
        assert together.tokens[row, : length + 1].tolist() == alone.tokens[0].tolist()
        assert (together.tokens[row, length + 1 :] == -1).all()
    assert len(set(together.accepted_length.tolist())) == draft_length + 1 or batch < 100


def test_a_full_draft_takes_its_bonus_from_its_own_length(backend):
    target_logits = torch.full((2, 3, 4), -INF)
    target_logits[:, torch.arange(3), torch.tensor([2, 0, 3])] = 0.0  # the target says 2, 0, 3
    verdict = run(
        backend,
        target_logits=target_logits,
        draft_tokens=torch.tensor([[2, 0], [2, -1]]),
        draft_logits=None,
        uniforms=torch.full((2, 3), 0.5),
        mode="argmax",
        lengths=torch.tensor([2, 1]),
    )
    assert verdict.accepted_length.tolist() == [2, 1]
    assert verdict.tokens.tolist() == [[2, 0, 3], [2, 0, -1]]


@pytest.mark.parametrize("temperature", [0, 0.0, torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)])
@pytest.mark.parametrize("mode", ["sampled", "argmax"])
def test_cold_target_breaks_ties_towards_the_lowest_id(backend, mode, temperature):
    arguments = dict(
        target_logits=torch.tensor([[[0.0, 5.0, 5.0], [7.0, 7.0, 7.0], [1.0, 2.0, 2.0]]]),
        draft_logits=None,
        uniforms=torch.zeros(1, 3),
        mode=mode,
        target_temperature=temperature,
    )
    accept = run(backend, **arguments, draft_tokens=torch.tensor([[1, 0]]))
    reject = run(backend, **arguments, draft_tokens=torch.tensor([[2, 0]]))
    assert (accept.accepted_length.tolist(), accept.tokens.tolist()) == ([2], [[1, 0, 1]])
    assert (reject.accepted_length.tolist(), reject.tokens.tolist()) == ([0], [[1, -1, -1]])


@pytest.mark.parametrize("size", [3000, 5000])
def test_cold_target_breaks_ties_across_blocks_of_the_row(backend, size):
    logits = torch.zeros(1, 3, size)
    logits[0, 0, [size - 1, size // 2, 700]] = 1.0
    logits[0, 1, [size - 2, 1500]] = 1.0
    verdict = run(
        backend,
        target_logits=logits,
        draft_tokens=torch.tensor([[700, size - 2]]),
        draft_logits=None,
        uniforms=torch.zeros(1, 3),
        target_temperature=0,
    )
    assert verdict.tokens.tolist() == [[700, 1500, -1]]


def test_cold_target_ignores_the_proposal_in_a_mixed_batch(backend):
    """A row at temperature 0 beside a warm one takes the general path and must end where the quick one does."""
    rows = budget_of(backend).at_most(64) // 2
    arguments = case(batch=2 * rows, dtype=dtype_of(backend), seed=5)
    mixed = run(backend, **arguments, target_temperature=torch.tensor([0.0, 1.0]).repeat(rows))
    cold = run(backend, **arguments, target_temperature=0)
    assert torch.equal(mixed.tokens[::2], cold.tokens[::2])


def test_a_cold_rejection_whose_proposal_rounds_to_the_argmax_still_emits_it(backend):
    verdict = run(
        backend,
        target_logits=torch.tensor([[[0.0, 3.0], [0.0, 3.0]]] * 2),
        draft_tokens=torch.tensor([[0], [0]]),
        draft_logits=torch.tensor([[[-500.0, 500.0]]] * 2),
        uniforms=torch.full((2, 2), 0.9),
        target_temperature=torch.tensor([0.0, 1.0]),
    )
    assert verdict.tokens[0].tolist() == [1, -1]


def test_zero_residual_falls_back_to_the_target():
    """q in float64 covers p rounded down to float32, and the last uniform rejects all the same."""
    size = next(size for size in range(2, 99) if torch.zeros(size).softmax(-1)[0].double() < 1 / size)
    verdict = verify(
        torch.zeros(1, 2, size),
        torch.tensor([[0]]),
        torch.zeros(1, 1, size, dtype=SHARP),
        torch.tensor([[LAST, 2.5 / size]], dtype=SHARP),
    )
    assert verdict.accepted_length.tolist() == [0]
    assert verdict.tokens.tolist() == [[2, -1]]


@pytest.mark.parametrize("mapped", [False, True])
def test_a_rejection_that_only_rounding_makes_still_emits_a_token(backend, mapped):
    """The drafter is the target, so only rounding can reject, and it leaves no residual but rounding."""
    rows, vocabulary = budget_of(backend).at_most(400), 37
    logits = torch.randn(rows, 2, vocabulary)
    logits[:, :, 1::2] = -INF
    order = torch.randperm(vocabulary) if mapped else torch.arange(vocabulary)
    verdict = run(
        backend,
        target_logits=logits,
        draft_tokens=2 * torch.randint(vocabulary // 2, (rows, 1)),
        draft_logits=logits[:, :1, order],
        uniforms=torch.full((rows, 2), LAST, dtype=SHARP),
        draft_to_target=order if mapped else None,
    )
    emitted = verdict.tokens[verdict.tokens >= 0]
    assert (verdict.accepted_length + 1).sum() == len(emitted)
    assert ((emitted < vocabulary) & (emitted % 2 == 0)).all()


def test_zero_uniforms_accept_whatever_the_target_may_say(backend):
    arguments = case(batch=20, dtype=dtype_of(backend), uniforms=torch.zeros(20, 4))
    assert (run(backend, **arguments).accepted_length == 3).all()


def test_a_token_outside_the_draft_vocabulary_is_accepted_wherever_the_target_may_say_it(backend):
    verdict = run(
        backend,
        target_logits=torch.zeros(2, 2, 3).index_fill_(2, torch.tensor(1), -INF),
        draft_tokens=torch.tensor([[0], [1]]),
        draft_logits=torch.zeros(2, 1, 1),
        uniforms=torch.full((2, 2), 0.99),
        draft_to_target=torch.tensor([2]),
    )
    assert verdict.accepted_length.tolist() == [1, 0]


def test_no_draft_samples_from_the_target(backend):
    rows = budget_of(backend).at_most(50)
    logits, uniforms = torch.randn(rows, 7, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 0.999, rows)
    for mode, temperature in itertools.product(("sampled", "argmax"), (0, 1.0)):
        verdict = run(
            backend,
            target_logits=logits[:, None],
            draft_tokens=torch.empty(rows, 0, dtype=torch.int64),
            draft_logits=None,
            uniforms=uniforms[:, None],
            mode=mode,
            target_temperature=temperature,
        )
        assert (verdict.accepted_length == 0).all()
        assert torch.equal(verdict.tokens[:, 0], sample(logits, uniforms, temperature=temperature))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_no_rows(backend, temperature):
    arguments = case(dtype=dtype_of(backend))
    arguments = {name: value[:0] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    verdict = run(backend, **arguments, target_temperature=temperature)
    assert (verdict.accepted_length.shape, verdict.tokens.shape) == ((0,), (0, 4))


def test_argmax_mode_needs_and_reads_no_proposal(backend):
    arguments = case(batch=budget_of(backend).at_most(100), dtype=dtype_of(backend), mode="argmax")
    assert same(run(backend, **arguments), run(backend, **arguments | dict(draft_logits=None)))


def test_a_threshold_masks_below_and_keeps_what_it_equals():
    logits, uniforms = torch.tensor([[1.0, 2.0, 3.0]]).expand(100, 3), torch.linspace(0, 0.999, 100)
    drawn = sample(logits, uniforms, threshold=torch.full((100,), 2.0), temperature=0.5)
    assert set(drawn.tolist()) == {1, 2}


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_logits_of_any_size_and_temperatures_of_any_size(backend, scale):
    batch = budget_of(backend).at_most(48) // 3
    for dtype in {torch.float32, dtype_of(backend)}:
        arguments = case(batch=batch, dtype=dtype)
        for name in ("target_logits", "draft_logits"):
            arguments[name] = (arguments[name] * scale).index_fill(-1, torch.tensor(4), -INF)
        for temperature in (1e-40, 1.0, 1e30, torch.linspace(1e-30, 2, batch)):
            tokens = run(backend, **arguments, target_temperature=temperature, draft_temperature=temperature).tokens
            assert ((tokens >= -1) & (tokens < 6) & (tokens[:, :1] >= 0)).all()


def test_strided_arguments_and_gradients_change_nothing(backend):
    arguments = case(batch=8, draft_vocabulary=4, dtype=dtype_of(backend))
    strided = dict(arguments)
    for name in ("target_logits", "draft_logits", "draft_tokens", "uniforms"):
        strided[name] = arguments[name].mT.contiguous().mT
    strided["target_logits"].requires_grad_()
    assert same(run(backend, **arguments), run(backend, **strided))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_start_anywhere_change_nothing(backend, dtype):
    """Slices of larger tensors, no row aligned for vector loads; odd sizes, so every row starts at another offset."""
    arguments = case(3, 2, 1031, 517, dtype)
    strided = dict(arguments)
    for name in ("target_logits", "draft_logits"):
        batch, positions, vocabulary = arguments[name].shape
        wider = torch.full((batch + 1, positions + 1, vocabulary + 4), math.nan, dtype=dtype)
        wider[1:, 1:, 3:-1] = arguments[name]
        strided[name] = wider[1:, 1:, 3:-1]
    assert same(run(backend, **arguments), run(backend, **strided))


def test_arguments_are_left_alone(backend):
    arguments = case(lengths=torch.tensor([1, 3]), dtype=dtype_of(backend), target_temperature=torch.tensor([0.0, 1.0]))
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    run(backend, **arguments)
    assert all(torch.equal(arguments[name], value) for name, value in before.items() if isinstance(value, torch.Tensor))


# The inverse CDF.


def test_sample_inverts_the_cumulative_distribution():
    probs = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0], dtype=SHARP)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, LAST], dtype=SHARP)
    assert sample(probs.log().expand(6, 5), uniforms).tolist() == [0, 0, 2, 2, 3, 3]


def test_sample_takes_any_leading_shape_and_a_temperature_a_row():
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(3, 4, 9, generator=generator), torch.rand(3, 4, generator=generator)
    temperature = torch.rand(3, 4, generator=generator).round(decimals=1).mul(2)
    drawn = sample(logits, uniforms, temperature=temperature)
    for i, j in itertools.product(range(3), range(4)):
        assert drawn[i, j] == sample(logits[i, j], uniforms[i, j], temperature=temperature[i, j].item())


def test_sample_at_temperature_zero_takes_the_first_argmax():
    assert sample(torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([0.9]), temperature=0).tolist() == [1]


@pytest.mark.parametrize("total", [5e-324, 1e-310, 1e-30, 1.0, 3.0])
def test_the_draw_stays_on_positive_weights_however_it_rounds(total):
    """A subnormal total rounds u * total up to itself."""
    weights = torch.tensor([[0.0, total, 0.0, total, 0.0, 0.0]], dtype=SHARP)
    [drawn] = rule._inverse_cdf(weights, torch.tensor([[0.0, 0.5, 0.75, LAST]], dtype=SHARP))
    assert (weights[0, drawn] > 0).all()
    assert (drawn[0], drawn[-1]) == (1, 3)


# Properties.


@st.composite
def calls(draw):
    batch, draft_length, vocabulary = draw(st.integers(1, 4)), draw(st.integers(0, 4)), draw(st.integers(1, 6))
    draft_vocabulary = draw(st.none() | st.integers(1, vocabulary))
    arguments = case(batch, draft_length, vocabulary, draft_vocabulary, seed=draw(st.integers(0, 2**32)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    masked = torch.rand(arguments["target_logits"].shape, generator=generator) < draw(st.sampled_from([0, 0.3, 0.9]))
    masked.scatter_(-1, torch.randint(vocabulary, (batch, draft_length + 1, 1), generator=generator), False)
    dtype, columns = draw(st.sampled_from([SHARP, torch.float32, torch.bfloat16])), draft_length + 1
    uniforms = st.lists(st.sampled_from([0.0, 0.5, LAST]) | st.floats(0, LAST), min_size=columns, max_size=columns)
    return arguments | dict(
        target_logits=arguments["target_logits"].masked_fill(masked, -INF).to(dtype),
        uniforms=torch.tensor(draw(st.lists(uniforms, min_size=batch, max_size=batch)), dtype=SHARP),
        lengths=torch.tensor(draw(st.lists(st.integers(0, draft_length), min_size=batch, max_size=batch))),
        mode=draw(st.sampled_from(["sampled", "argmax"])),
        target_temperature=draw(st.sampled_from([0, 0.5, 1.0])),
        draft_temperature=draw(st.sampled_from([0, 1.0])),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(calls())
def test_every_verdict_is_well_formed(backend, arguments):
    if budget_of(backend).draws == 0:
        pytest.skip("too many examples for an interpreted backend")
    for name in ("target_logits", "draft_logits"):
        if arguments[name].dtype is SHARP:
            arguments[name] = arguments[name].to(dtype_of(backend))
    verdict = run(backend, **arguments)
    logits = arguments["target_logits"].double().numpy()
    for row, length in enumerate(arguments["lengths"].tolist()):
        accepted, tokens = verdict.accepted_length[row].item(), verdict.tokens[row].tolist()
        assert 0 <= accepted <= length
        assert tokens[:accepted] == arguments["draft_tokens"][row, :accepted].tolist()
        assert tokens[accepted + 1 :] == [-1] * (len(tokens) - accepted - 1)
        for position, token in enumerate(tokens[: accepted + 1]):
            assert distribution(logits[row, position], arguments["target_temperature"])[token] > 0
        if accepted < length and arguments["mode"] == "argmax":
            assert tokens[accepted] != arguments["draft_tokens"][row, accepted].item()


# Bad input.

BAD = [
    (dict(target_logits=[[1.0]]), TypeError, "target_logits: expected a torch.Tensor, got list"),
    (dict(target_logits=torch.zeros(2, 4, 6, dtype=torch.int64)), TypeError, "target_logits: .*got torch.int64"),
    (dict(target_logits=torch.zeros(2, 6)), ValueError, r"target_logits: expected shape \[B, K\+1, V\] .*, got \[2, 6\]"),
    (
        dict(target_logits=torch.zeros(2, 0, 6)),
        ValueError,
        r"target_logits: expected .*K >= 0, got \[2, 0, 6\]",
    ),
    (dict(target_logits=torch.zeros(2, 4, 0)), ValueError, r"target_logits: expected .*at least 1, got \[2, 4, 0\]"),
    (
        dict(draft_tokens=torch.zeros(2, 3, dtype=torch.int32)),
        TypeError,
        "draft_tokens: expected torch.int64, got torch.int32",
    ),
    (
        dict(draft_tokens=torch.zeros(2, 4, dtype=torch.int64)),
        ValueError,
        r"draft_tokens: expected shape \[2, 3\], got \[2, 4\]",
    ),
    (
        dict(draft_tokens=torch.tensor([[0, 1, 6]] * 2)),
        ValueError,
        r"draft_tokens: expected values in 0\.\.5, got 6",
    ),
    (dict(draft_tokens=torch.tensor([[0, 1, -1]] * 2)), ValueError, "draft_tokens: .*got -1"),
    (
        dict(draft_tokens=torch.tensor([[0, -1, -1], [0, 1, -1]]), lengths=torch.tensor([1, 3])),
        ValueError,
        "draft_tokens: .*got -1",
    ),
    (dict(draft_logits=None), ValueError, 'draft_logits: expected a tensor in mode "sampled" with .*, got None'),
    (dict(draft_logits=None, target_temperature=torch.tensor([0.0, 1.0])), ValueError, "draft_logits: "),
    (dict(draft_logits=torch.zeros(2, 3, 6, dtype=torch.int64)), TypeError, "draft_logits: .*got torch.int64"),
    (dict(draft_logits=torch.zeros(2, 3)), ValueError, r"draft_logits: expected shape \[B, K, Vd\] .*, got \[2, 3\]"),
    (dict(draft_logits=torch.zeros(2, 4, 6)), ValueError, r"draft_logits: expected shape \[2, 3, 6\], got \[2, 4, 6\]"),
    (dict(draft_logits=torch.zeros(2, 3, 5)), ValueError, r"draft_logits: expected shape \[2, 3, 6\], got \[2, 3, 5\]"),
    (dict(draft_logits=torch.zeros(2, 3, 6, device="meta")), ValueError, "draft_logits: expected device cpu, .*, got meta"),
    (
        dict(uniforms=torch.zeros(2, 4, dtype=torch.bfloat16)),
        TypeError,
        "uniforms: expected torch.float32 or torch.float64, got torch.bfloat16",
    ),
    (dict(uniforms=torch.zeros(2, 3)), ValueError, r"uniforms: expected shape \[2, 4\], got \[2, 3\]"),
    (dict(uniforms=torch.ones(2, 4)), ValueError, r"uniforms: expected values in \[0, 1\), got 1.0"),
    (dict(uniforms=torch.full((2, 4), -0.5)), ValueError, "uniforms: .*got -0.5"),
    (dict(uniforms=torch.full((2, 4), math.nan)), ValueError, "uniforms: .*got nan"),
    (dict(mode="greedy"), ValueError, "mode: expected one of sampled, argmax, got 'greedy'"),
    (dict(lengths=[1, 2]), TypeError, "lengths: expected a torch.Tensor, got list"),
    (dict(lengths=torch.tensor([1.0, 2.0])), TypeError, "lengths: .*got torch.float32"),
    (dict(lengths=torch.tensor([1])), ValueError, r"lengths: expected shape \[2\], got \[1\]"),
    (dict(lengths=torch.tensor([0, 4])), ValueError, r"lengths: expected values in 0\.\.3, got 4"),
    (dict(draft_to_target=[0, 1]), TypeError, "draft_to_target: expected a torch.Tensor, got list"),
    (dict(draft_to_target=torch.arange(6, dtype=torch.int16)), TypeError, "draft_to_target: .*got torch.int16"),
    (dict(draft_to_target=torch.arange(5)), ValueError, r"draft_to_target: expected shape \[6\], got \[5\]"),
    (
        dict(draft_to_target=torch.zeros(3, 6, dtype=torch.int64)),
        ValueError,
        r"draft_to_target: expected shape \[2, 6\], got \[3, 6\]",
    ),
    (
        dict(draft_to_target=torch.arange(1, 7)),
        ValueError,
        r"draft_to_target: expected values in 0\.\.5, got 6",
    ),
    (dict(target_temperature="hot"), TypeError, "target_temperature: expected a number or a torch.Tensor .*, got str"),
    (dict(target_temperature=True), TypeError, "target_temperature: .*got bool"),
    (dict(target_temperature=-1), ValueError, "target_temperature: expected a finite number >= 0, got -1"),
    (dict(target_temperature=math.nan), ValueError, "target_temperature: .*got nan"),
    (dict(draft_temperature=INF), ValueError, "draft_temperature: .*got inf"),
    (dict(draft_temperature=torch.tensor([1, 1])), TypeError, "draft_temperature: .*got torch.int64"),
    (dict(draft_temperature=torch.ones(3)), ValueError, r"draft_temperature: expected shape \[2\], got \[3\]"),
    (
        dict(draft_temperature=torch.tensor([1.0, -1.0])),
        ValueError,
        "draft_temperature: expected finite values >= 0, got -1.0",
    ),
    (dict(target_temperature=torch.tensor([1.0, math.nan])), ValueError, "target_temperature: .*nan"),
    (dict(target_threshold=0.5), TypeError, "target_threshold: .*got float"),
    (dict(target_threshold=torch.zeros(2, 3)), ValueError, r"target_threshold: expected shape \[2, 4\], got \[2, 3\]"),
    (dict(draft_threshold=torch.zeros(2, 4)), ValueError, r"draft_threshold: expected shape \[2, 3\], got \[2, 4\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        verify(**case() | change)


BAD_SAMPLES = [
    (dict(logits=1.0), TypeError, "logits: expected a torch.Tensor, got float"),
    (dict(logits=torch.zeros(2, 0)), ValueError, r"logits: expected shape \[..., V\] .*, got \[2, 0\]"),
    (dict(logits=torch.tensor(1.0)), ValueError, r"logits: expected .*, got \[\]"),
    (dict(uniforms=torch.zeros(3)), ValueError, r"uniforms: expected shape \[2\], got \[3\]"),
    (dict(uniforms=torch.ones(2)), ValueError, "uniforms: expected values in"),
    (dict(temperature=-0.1), ValueError, "temperature: expected a finite number >= 0, got -0.1"),
    (dict(temperature=torch.ones(1)), ValueError, r"temperature: expected shape \[2\], got \[1\]"),
    (dict(threshold=torch.zeros(1)), ValueError, r"threshold: expected shape \[2\], got \[1\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_SAMPLES)
def test_bad_samples_are_named(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        sample(**dict(logits=torch.zeros(2, 6), uniforms=torch.zeros(2)) | change)


# Every backend against the reference in float64.


def variety(rng, rows, vocabulary, mode, dtypes, draft_length=3):
    """A batch of random rows under random options, as arguments of verify."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))

    def normal(*shape, dtype=SHARP):
        return (3 * torch.randn(*shape, generator=generator, dtype=SHARP)).to(dtype)

    def uniforms(*shape):
        return torch.rand(*shape, generator=generator, dtype=SHARP)

    def integers(high, *shape):
        return torch.randint(high, shape, generator=generator)

    draft_length = int(rng.integers(1, draft_length + 1))
    target_dtype, draft_dtype = (dtypes[int(rng.integers(len(dtypes)))] for _ in range(2))
    mapping = str(rng.choice(["none", "shared", "per row", "repeats"]))
    draft_vocabulary = vocabulary if mapping == "none" else int(rng.integers(1, vocabulary + 1))
    draft_to_target = {
        "none": lambda: None,
        "shared": lambda: torch.randperm(vocabulary, generator=generator)[:draft_vocabulary],
        "per row": lambda: uniforms(rows, vocabulary).argsort(-1)[:, :draft_vocabulary].int(),
        "repeats": lambda: integers(vocabulary, draft_vocabulary),
    }[mapping]()

    target_logits = normal(rows, draft_length + 1, vocabulary, dtype=target_dtype)
    draft_logits = normal(rows, draft_length, draft_vocabulary, dtype=draft_dtype)
    if rng.random() < 0.5:  # a drafter that knows something
        known = torch.arange(vocabulary) if draft_to_target is None else draft_to_target.long()
        seen = target_logits[:, :-1].gather(-1, known.expand(rows, -1)[:, None].expand_as(draft_logits))
        draft_logits = (0.3 * draft_logits.double() + seen.double()).to(draft_dtype)
    for logits in (target_logits, draft_logits):
        if rng.random() < 0.3:
            masked = uniforms(*logits.shape) < 0.4
            logits.masked_fill_(masked.scatter(-1, integers(logits.shape[-1], *logits.shape[:-1], 1), False), -INF)

    def threshold(logits):
        """One of the row's own finite logits, so that some lie below it and it keeps what it equals."""
        finite = logits.double().masked_fill(logits == -INF, 1e9)
        return finite.sort(-1).values[..., logits.shape[-1] // 3].clamp(max=logits.double().amax(-1)).float()

    temperatures = [1.0, 0, 0.7, 1e-30, torch.tensor([0.0, 1.0, 0.5, 1e-30, 2.0])[integers(5, rows)]]
    chosen = [temperatures[i] for i in rng.choice(len(temperatures), 2, p=[0.35, 0.1, 0.15, 0.1, 0.3])]
    draft_threshold = threshold(draft_logits) if rng.random() < 0.3 else None

    draft_temperature = chosen[1][:, None].double() if isinstance(chosen[1], torch.Tensor) else chosen[1]
    draft_temperature = torch.as_tensor(draft_temperature).expand(rows, draft_length).double()
    ids = sample(draft_logits.double(), uniforms(rows, draft_length), temperature=draft_temperature, threshold=draft_threshold)
    if draft_to_target is not None:
        ids = draft_to_target.long().expand(rows, -1).gather(-1, ids)
    # What was drafted is mostly the proposal's own; some of it the target's favourite, some of it anything.
    lot, anything = uniforms(rows, draft_length), integers(vocabulary, rows, draft_length)
    tokens = torch.where(lot < 0.2, target_logits[:, :-1].argmax(-1), torch.where(lot > 0.9, anything, ids))

    drawn = uniforms(rows, draft_length + 1)
    drawn[:, :-1] **= float(rng.choice([1, 8]))  # the second accepts often
    wide = rng.random() < 0.5
    corner = uniforms(rows, draft_length + 1)
    drawn = drawn.masked_fill(corner < 0.05, 0.0).masked_fill(corner > 0.95, LAST)
    drawn = drawn if wide else drawn.clamp(max=1 - 2.0**-24).float()

    lengths = integers(draft_length + 1, rows) if rng.random() < 0.5 else None
    if lengths is not None:
        tokens = tokens.masked_fill(torch.arange(draft_length) >= lengths[:, None], -1)
    return dict(
        target_logits=target_logits,
        draft_tokens=tokens,
        draft_logits=draft_logits,
        uniforms=drawn,
        mode=mode,
        lengths=lengths,
        draft_to_target=draft_to_target,
        target_temperature=chosen[0],
        draft_temperature=chosen[1],
        target_threshold=threshold(target_logits) if rng.random() < 0.3 else None,
        draft_threshold=draft_threshold,
    )


def is_close_call(arguments, row, accepted):
    """Whether some decision of a row lies so close to its step that float32 may take the other side of it.

    The steps are computed here, in float64: |u * q - p| against the larger of them where a token is tested, and the distance
    of u * total to the nearest value of the cumulative weights where one is drawn.
    """
    target_logits, draft_logits = arguments["target_logits"][row].double(), arguments["draft_logits"][row].double()
    drafted = arguments["draft_tokens"][row].tolist()
    length = len(drafted) if arguments["lengths"] is None else arguments["lengths"][row].item()
    uniforms = arguments["uniforms"][row].double().numpy()
    ids = arguments["draft_to_target"]
    ids = np.arange(draft_logits.shape[-1]) if ids is None else ids.long().expand(len(arguments["uniforms"]), -1)[row].numpy()

    def law(side, logits, position):
        temperature, threshold = arguments[f"{side}_temperature"], arguments[f"{side}_threshold"]
        temperature = temperature[row].item() if isinstance(temperature, torch.Tensor) else temperature
        threshold = -INF if threshold is None else threshold[row, position].item()
        return distribution(logits[position].numpy(), temperature, np.asarray(threshold)), temperature

    for position in range(accepted + 1):
        target, temperature = law("target", target_logits, position)
        if temperature == 0:
            continue  # nothing is rounded
        weights = target
        if position < length:
            draft = np.zeros_like(target)
            if arguments["mode"] == "argmax":
                draft[drafted[position]] = 1
            else:
                np.add.at(draft, ids, law("draft", draft_logits, position)[0])
            raised, level = uniforms[position] * draft[drafted[position]], target[drafted[position]]
            if level > 0 and abs(raised - level) <= 2e-5 * max(raised, level) + 1e-30:
                return True
            residual = (target - draft).clip(min=0)
            weights = residual if residual.any() else target
        if position == accepted:
            cumulative = weights.cumsum()
            if np.abs(uniforms[-1] * cumulative[-1] - cumulative).min() <= 5e-6:
                return True
    return False


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 33, 1031, 4099])
@pytest.mark.parametrize("mode", ["sampled", "argmax"])
def test_every_backend_emits_the_tokens_of_the_reference_in_float64(backend, mode, vocabulary, poisoned_integers):
    dtypes = [torch.float32, torch.bfloat16] + ([] if backend == "cpu" else [torch.float16])
    budget, rng = budget_of(backend), np.random.default_rng(vocabulary)
    excused = 0
    for _ in range(budget.batches):
        arguments = variety(rng, budget.rows, vocabulary, mode, dtypes)
        wide = {name: value.double() if name.endswith("_logits") else value for name, value in arguments.items()}
        expected, verdict = verify(**wide, backend="reference"), run(backend, **arguments)
        assert verdict.tokens.dtype is verdict.accepted_length.dtype is torch.int64
        differing = (verdict.tokens != expected.tokens).any(-1) | (verdict.accepted_length != expected.accepted_length)
        for row in differing.nonzero().flatten().tolist():
            # The first decision that differs: up to it both rows are alike.
            accepted = min(verdict.accepted_length[row].item(), expected.accepted_length[row].item())
            assert is_close_call(arguments, row, accepted), (row, verdict.tokens[row], expected.tokens[row], arguments)
            excused += 1
    assert excused <= budget.batches * budget.rows // 20  # uniforms of 0 and just below 1 lie beside a step; others hardly ever


def test_threads_change_nothing(backend):
    """Few rows and many: what is decided ahead of time must not show."""
    before = torch.get_num_threads()
    logits = 60_000 if budget_of(backend).rows > 8 else 2_000
    for batch in (1, 2, 9) if budget_of(backend).draws else (1,):
        arguments = case(batch, 5, logits // batch, logits // 7 // batch, torch.float32)
        arguments["uniforms"] **= 4
        verdicts = []
        try:
            for threads in (1, 2, 3, 16):
                torch.set_num_threads(threads)
                verdicts.append(run(backend, **arguments))
        finally:
            torch.set_num_threads(before)
        assert all(same(verdicts[0], verdict) for verdict in verdicts)


def test_backends_share_one_signature():
    def signature(function):
        parameters = inspect.signature(function).parameters.values()
        return [(each.name, each.kind, each.default, each.annotation.replace("torch.", "")) for each in parameters]

    public = [parameter for parameter in signature(verify) if parameter[0] != "backend"]
    for name in backends.available("verify"):
        device = "cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
        assert signature(backends.resolve("verify", name, device)) == public
    assert signature(verify_reference) == public
