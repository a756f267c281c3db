"""Draft trees: their shape, their verification, and the decoder that drafts them against the same written down naively."""

from __future__ import annotations

import importlib
import itertools
import math

import numpy as np
import pytest
import torch
from helpers.batches import batch_of
from helpers.batches import pool as mixed_pool
from helpers.decoding import VOCABULARY, as_functions, prompt_of, tiny_head, tiny_llama
from helpers.markov import MIXED, SMALLEST_P_VALUE, V, chain, law_of, p_values, table_of
from helpers.markov import pool as chain_pool
from scipy import stats
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaForCausalLM, MistralConfig, Qwen3Config

from hedgespec import Tree, algorithm
from hedgespec.config import MAX_CHILDREN, MAX_NODES, DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.drafters.ngram import NGramDrafter
from hedgespec.errors import BackendUnavailableError
from hedgespec.ops.evaluate import evaluate, multi_draft_acceptance
from hedgespec.ops.tree_mask import ancestry
from hedgespec.ops.verify import sample, verify_tree
from hedgespec.runtime import capture
from hedgespec.runtime.compat import CACHE_NAME
from hedgespec.runtime.target import TargetSession
from hedgespec.selection.delay import DelayQueue

rule = importlib.import_module("hedgespec.ops.verify")

SHAPES = [
    (Tree(2), "argmax"), (Tree((3, 1, 2)), "argmax"), (Tree(3, size=9), "argmax"), (Tree(2, size=3), "argmax"),
    (Tree((3, 2, 1)), "sampled"), (Tree(1), "sampled"),
]  # fmt: skip


@pytest.fixture(scope="module")
def target():
    return tiny_llama(seed=0, layers=4)


# The shape.


def test_what_a_tree_refuses():
    for branching in (0, -1, MAX_CHILDREN + 1, (2, 0), ()):
        with pytest.raises(ValueError, match="branching: expected 1..32 children of a node, got"):
            Tree(branching)
    for branching in (2.0, True, "3", {2, 1}, (2, None), None):
        with pytest.raises(TypeError, match="branching: expected an int or a sequence of ints, got"):
            Tree(branching)
    for size in (0, MAX_NODES + 1):
        with pytest.raises(ValueError, match="size: expected 1..512 nodes or None, got"):
            Tree(2, size)
    with pytest.raises(TypeError, match="size: expected an int or None, got 3.0"):
        Tree(2, 3.0)
    with pytest.raises(ValueError, match="branching: expected one number for a dynamic tree"):
        Tree((2, 2), 4)
    with pytest.raises(ValueError, match="a number of children for each of the 3 depths, got 2"):
        DecodeConfig(draft_length=3, tree=Tree((2, 2)))
    with pytest.raises(ValueError, match="tree: expected at most 512 nodes, got 780; a `size` bounds them"):
        DecodeConfig(draft_length=4, tree=Tree(5))
    with pytest.raises(TypeError, match="tree: expected a hedgespec.Tree or None, got 4"):
        DecodeConfig(tree=4)
    with pytest.raises(ValueError, match='proposal: expected "argmax" or "coupled" with a dynamic tree'):
        DecodeConfig(tree=Tree(2, size=4))


def test_what_a_tree_counts():
    assert Tree((3, 2, 1)).nodes(3) == 3 + 6 + 6
    assert Tree(2).nodes(3) == 2 + 4 + 8
    assert Tree(8, size=20).nodes(5) == 20
    assert (Tree((3, 2, 1)).widest, Tree(4).widest) == (3, 4)
    assert [Tree((3, 2, 1)).children(depth) for depth in range(3)] == [3, 2, 1]
    assert DecodeConfig(draft_length=3, tree=Tree(2)).max_drafted == 14
    assert DecodeConfig(draft_length=3).max_drafted == 3


def test_ancestry():
    random = torch.Generator().manual_seed(0)
    parents = torch.stack([torch.randint(-1, node, (20,), generator=random) for node in range(12)], 1)
    depths, lines = ancestry(parents, 12)
    for row, of in enumerate(parents.tolist()):
        for node in range(-1, 12):
            line, one = {node}, node
            while one >= 0:
                one = of[one]
                line.add(one)
            assert set((lines[row, node + 1].nonzero()[:, 0] - 1).tolist()) == line
            assert depths[row, node + 1] == len(line) - 1
    depths, lines = ancestry(torch.empty(2, 0, dtype=torch.int64), 3)
    assert (depths.tolist(), lines.tolist()) == ([[0], [0]], [[[True]], [[True]]])


# Verification.


def naive_walk(target_logits, tokens, parents, draft_logits, origins, uniforms, depth, temperature=1.0):
    """One tree in plain Python: every rejection renormalises what is left."""
    node, path, emitted = -1, [], []
    width = (len(uniforms) - 1) // depth
    for level in range(depth + 1):
        p = algorithm.distribution(target_logits[node + 1], temperature)
        children = [one for one in range(len(tokens)) if parents[one] == node and tokens[one] >= 0]
        if draft_logits is None:
            x = algorithm.inverse_cdf(p, float(uniforms[level if tokens else -1]))
            hit = [one for one in children if tokens[one] == x]
            emitted.append(x)
        else:
            q = algorithm.distribution(draft_logits[origins.index(node)], temperature) if children else None
            hit = []
            for number, one in enumerate(children):
                if uniforms[level * width + number] * q[tokens[one]] < p[tokens[one]]:
                    hit = [one]
                    break
                left = (p - q).clamp(min=0)
                if not left.sum() > 0:
                    break
                p = left / left.sum()
            emitted.append(tokens[hit[0]] if hit else algorithm.inverse_cdf(p, float(uniforms[-1])))
        if not hit:
            break
        node = hit[0]
        path.append(node)
    return emitted, path


def random_trees(count: int, nodes: int, depth: int, vocabulary: int, random):
    """Parents of random trees with nodes that are none, children of a node distinct."""
    parents = torch.full((count, nodes), -1)
    tokens = torch.full((count, nodes), -1)
    for row in range(count):
        depths: dict[int, int] = {-1: 0}
        taken: dict[int, list[int]] = {}
        for node in range(nodes):
            parent = int(torch.randint(-1, node, (), generator=random)) if node else -1
            free = sorted(set(range(vocabulary)) - set(taken.get(parent, [])))
            if parent not in depths or depths[parent] == depth or not free or torch.rand((), generator=random) < 0.1:
                continue
            depths[node] = depths[parent] + 1
            tokens[row, node] = free[int(torch.randint(len(free), (), generator=random))]
            parents[row, node] = parent
            taken.setdefault(parent, []).append(int(tokens[row, node]))
    return tokens, parents


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("mode", ["argmax", "sampled"])
def test_verification_equals_the_naive_walk(mode, temperature):
    random = torch.Generator().manual_seed(1)
    count, nodes, depth, vocabulary, reached = 200, 9, 3, 5, []
    tokens, parents = random_trees(count, nodes, depth, vocabulary, random)
    target_logits = 2 * torch.randn(count, nodes + 1, vocabulary, generator=random, dtype=torch.float64)
    draft_logits = origins = None
    uniforms = torch.rand(count, depth + 1, generator=random, dtype=torch.float64)
    if mode == "sampled":
        draft_logits = torch.randn(count, nodes + 1, vocabulary, generator=random, dtype=torch.float64)
        origins = torch.stack([torch.randperm(nodes + 1, generator=random) - 1 for _ in range(count)])
        uniforms = torch.rand(count, depth * vocabulary + 1, generator=random, dtype=torch.float64)
    verdict = verify_tree(
        target_logits, tokens, parents, draft_logits, uniforms, depth=depth, mode=mode, origins=origins,
        target_temperature=temperature, draft_temperature=temperature,
    )  # fmt: skip
    for row in range(count):
        given = (None, None) if mode == "argmax" else (draft_logits[row], origins[row].tolist())
        emitted, path = naive_walk(
            target_logits[row], tokens[row].tolist(), parents[row].tolist(), *given, uniforms[row], depth, temperature
        )
        assert verdict.tokens[row].tolist() == emitted + [-1] * (depth + 1 - len(emitted))
        assert verdict.path[row].tolist() == path + [-1] * (depth - len(path))
        assert verdict.accepted_length[row] == len(path)
        reached.append(len(path))
    assert set(reached) == set(range(depth + 1))


@pytest.mark.parametrize("mapped", [False, True])
def test_samples_at_a_node_leave_the_targets_law(mapped):
    """Three draws, then three for the likeliest two of them: the joint law of two emitted tokens."""
    random = torch.Generator().manual_seed(2)
    count, vocabulary, known = 40_000, 5, torch.tensor([3, 0, 4]) if mapped else None
    size = len(known) if mapped else vocabulary
    tables = torch.randn(vocabulary + 1, vocabulary, generator=random, dtype=torch.float64)  # the last is the root's
    draft = torch.randn(vocabulary + 1, size, generator=random, dtype=torch.float64)
    draws = torch.rand(count, 3, generator=random, dtype=torch.float64)
    first = sample(draft[-1].expand(count, -1), draws)
    first = known[first] if mapped else first
    second = sample(draft[first], torch.rand(count, 3, 3, generator=random, dtype=torch.float64)).flatten(1)
    second = known[second] if mapped else second
    tokens = torch.cat([first, second], 1)
    parents = torch.tensor([-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3).expand(count, -1)
    verdict = verify_tree(
        torch.cat([tables[-1].expand(count, 1, -1), tables[tokens]], 1), tokens, parents,
        torch.cat([draft[-1].expand(count, 1, -1), draft[first]], 1),
        torch.rand(count, 7, generator=random, dtype=torch.float64), depth=2, mode="sampled",
        origins=torch.tensor([-1, 0, 1, 2]).expand(count, -1), draft_to_target=known,
    )  # fmt: skip
    probs = tables.softmax(-1)
    law = probs[-1].numpy() * count
    assert stats.chisquare(np.bincount(verdict.tokens[:, 0], minlength=vocabulary), law).pvalue > SMALLEST_P_VALUE
    went_on = verdict.tokens[:, 1] >= 0
    for token in range(vocabulary):
        then = verdict.tokens[went_on & (verdict.tokens[:, 0] == token), 1]
        if len(then) > 100:
            law = probs[token].numpy() * len(then)
            assert stats.chisquare(np.bincount(then, minlength=vocabulary), law).pvalue > SMALLEST_P_VALUE
    # As often as the closed form says.
    scores = multi_draft_acceptance(
        tables[-1].expand(1, 1, -1), draft[-1].expand(1, 1, 1, -1), first[:1, :1], 3,
        draft_to_target=None if known is None else known[None],
    )  # fmt: skip
    accepted = float((verdict.accepted_length > 0).double().mean())
    assert accepted == pytest.approx(float(scores[4]), abs=5 * math.sqrt(0.25 / count))


def test_a_proposal_that_covers_the_target_is_defined():
    """q = p: the first child is accepted; a uniform next to 1 finds nothing left of p, and p is drawn from."""
    logits = torch.zeros(1, 3, 2, dtype=torch.float64)
    tokens, parents = torch.tensor([[0, 0]]), torch.tensor([[-1, -1]])
    for u, length in ((0.0, 1), (0.9999, 1)):
        uniforms = torch.tensor([[u, u, 0.7]], dtype=torch.float64)
        verdict = verify_tree(
            logits, tokens, parents, logits[:, :1], uniforms, depth=1, mode="sampled", origins=torch.tensor([[-1]])
        )
        assert verdict.accepted_length.tolist() == [length]
    never = torch.tensor([[[0.0, -math.inf]]], dtype=torch.float64)  # q = 1 at a token of probability p = 0
    verdict = verify_tree(
        torch.tensor([[[-math.inf, 0.0]] * 3], dtype=torch.float64), tokens, parents, never,
        torch.zeros(1, 3, dtype=torch.float64), depth=1, mode="sampled", origins=torch.tensor([[-1]]),
    )  # fmt: skip
    assert verdict.tokens.tolist() == [[1, -1]]


def test_what_verification_refuses():
    logits, tokens, parents = torch.randn(2, 4, 5), torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), -1)
    uniforms = torch.rand(2, 3)
    good = dict(target_logits=logits, draft_tokens=tokens, parents=parents, draft_logits=None, uniforms=uniforms, depth=2)
    verify_tree(**good)
    sampled = good | {"mode": "sampled", "draft_logits": torch.randn(2, 1, 5), "origins": torch.full((2, 1), -1)}
    verify_tree(**sampled)
    for wrong, error, match in [
        (good | {"mode": "top"}, ValueError, "mode: expected one of sampled, argmax"),
        (good | {"depth": 0}, ValueError, "depth: expected an int of at least 1"),
        (good | {"draft_tokens": tokens + 5}, ValueError, "draft_tokens: expected"),
        (good | {"parents": tokens[:, :2]}, ValueError, "parents: expected shape"),
        (good | {"parents": tokens + 3}, ValueError, "parents: expected"),
        (good | {"uniforms": uniforms[:, :2]}, ValueError, "uniforms: expected shape"),
        (good | {"uniforms": uniforms + 1}, ValueError, "uniforms: expected values"),
        (good | {"target_threshold": torch.zeros(2, 3)}, ValueError, "target_threshold: expected shape"),
        (good | {"target_logits": logits[:, :0]}, ValueError, "target_logits: expected shape"),
        (sampled | {"draft_logits": None}, TypeError, "draft_logits: expected"),
        (sampled | {"draft_logits": torch.randn(2, 1, 4)}, ValueError, "draft_logits: expected a vocabulary of 5"),
        (sampled | {"origins": None}, TypeError, "origins: expected"),
        (sampled | {"uniforms": torch.rand(2, 4)}, ValueError, "uniforms: expected shape"),
        (sampled | {"draft_threshold": torch.zeros(2, 2)}, ValueError, "draft_threshold: expected shape"),
        (sampled | {"draft_to_target": torch.tensor([9, 1, 2, 3, 4])}, ValueError, "draft_to_target: expected"),
    ]:
        with pytest.raises(error, match=match):
            verify_tree(**wrong)


def test_a_backend_that_samples_do_not_have_is_refused():
    """Asked for by name it raises, and never becomes another one."""
    config = DecodeConfig(draft_length=2, tree=Tree(2), backend="cpu")
    decoder = Decoder(tiny_llama(seed=0, layers=2).float(), [NGramDrafter(VOCABULARY)], config)
    with pytest.raises(BackendUnavailableError, match="verify_tree has no cpu backend; it has reference"):
        decoder.generate(prompt_of(0), max_new_tokens=20, temperature=1.0, seed=0)
    logits = torch.randn(1, 2, 5)
    with pytest.raises(BackendUnavailableError, match="multi_draft_acceptance has no triton backend; it has reference"):
        multi_draft_acceptance(logits, logits[None], torch.zeros(1, 2, dtype=torch.int64), 2, backend="triton")


# The target's forward.


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("gemma2", "eager"), ("qwen3", "sdpa")],
)
def test_a_tree_in_one_forward_is_every_path_by_itself(kind, attention):
    """Ragged rows, sliding windows shorter than the text; and what is kept of it is what a forward of the path leaves."""
    model = target_of(kind, attention)
    tolerance = {"atol": 1e-9 if attention == "sdpa" else 1e-5, "rtol": 0}  # eager attention has its softmax in float32
    lengths, rows = [9, 4], 2
    prompts = [prompt_of(row, length) for row, length in enumerate(lengths)]
    session = TargetSession(model, [(1, 2)], rows)
    with torch.no_grad():
        padded = torch.zeros(rows, 9, dtype=torch.int64)
        for row, one in enumerate(prompts):
            padded[row, : one.shape[1]] = one[0]
        session.forward(padded, 1)
        session.keep([length - 1 for length in lengths])
        parents = torch.tensor([[-1, -1, 0, 0, 1, 2, 5], [-1, 0, 1, 1, -1, 4, -1]])
        nodes = torch.randint(VOCABULARY, parents.shape)
        tokens = torch.cat([torch.stack([one[0, -1:] for one in prompts]), nodes], 1)
        depths, lines = ancestry(parents, 4)
        logits = session.forward(tokens, tokens.shape[1], (depths, lines))
        for row, one in enumerate(prompts):
            for node in range(parents.shape[1] + 1):
                line = lines[row, node].nonzero()[:, 0]
                text = torch.cat([one[0, :-1], tokens[row, line]])[None]
                out = model(text, output_hidden_states=True)
                torch.testing.assert_close(logits[row, node], out.logits[0, -1], **tolerance)
        paths = [[0, 1, 3], [0, 5, 6, 7]]
        session.keep([3, 2], paths)
        further = torch.randint(VOCABULARY, (rows, 2))
        logits = session.forward(further, 2)
        for row, (one, path, count) in enumerate(zip(prompts, paths, (3, 2))):
            text = torch.cat([one[0, :-1], tokens[row, path[:count]], further[row]])[None]
            out = model(text, output_hidden_states=True)
            torch.testing.assert_close(logits[row], out.logits[0, -2:], **tolerance)
            states = torch.cat([out.hidden_states[layer][0] for layer in (1, 2)], -1)[: -further.shape[1]]
            torch.testing.assert_close(session.features[row][1, 2][1:], states, **tolerance)


def target_of(kind: str, attention: str = "sdpa"):
    shape = dict(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=256, initializer_range=0.25, eos_token_id=None,
        bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    if kind == "llama":
        model = tiny_llama(seed=3, layers=3)
        model.set_attn_implementation(attention)
        return model
    config = {
        "mistral": lambda: MistralConfig(**shape, sliding_window=6),
        "gemma2": lambda: Gemma2Config(**shape, sliding_window=5, query_pre_attn_scalar=4),
        "qwen3": lambda: Qwen3Config(**shape),
    }[kind]()
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()


# The decoder.


def naive_decode(target, drafters, branches, prompt, *, max_new_tokens, draft_length, temperature, random, tree, mode):
    """`algorithm.decode` with trees; `branches` says which drafters take in several tokens at one depth."""
    N, K, end = len(drafters), draft_length, len(prompt) + max_new_tokens
    one_hot = mode == "argmax" or temperature == 0
    draws, tests = (0, K + 1) if one_hot else (tree.nodes(K), K * tree.widest + 1)
    queue, regrets = DelayQueue(N, K), np.zeros(N)
    tokens = [*prompt, algorithm.inverse_cdf(algorithm.distribution(target(prompt), temperature), random.random(1)[0])]
    choices, weights_seen, widths = [], [], []
    while len(tokens) < end:
        uniforms = random.random(1 + draws + tests)
        weights = algorithm.normal_hedge(regrets)
        depth = min(K, end - len(tokens) - 1)
        chosen = algorithm.inverse_cdf(torch.from_numpy(weights), uniforms[0]) if depth else -1
        nodes: list[tuple[int, list[int], float]] = []  # parent, path, score
        frontier, drawn, sources = [(-1, [], 0.0)], 0, {}
        for level in range(depth):
            new = []
            for number, path, score in frontier:
                logits = drafters[chosen](tokens, path)
                sources[number] = logits
                if one_hot:
                    picks = logits.topk(min(tree.children(level), int(logits.isfinite().sum()))).indices.tolist()
                else:
                    dist = algorithm.distribution(logits, temperature)
                    own = uniforms[1 + drawn : 1 + drawn + tree.children(level)]
                    picks, drawn = [algorithm.inverse_cdf(dist, u) for u in own], drawn + tree.children(level)
                log_probs = (logits / (temperature or 1.0)).log_softmax(-1)
                new += [(number, [*path, pick], score + float(log_probs[pick])) for pick in picks]
            first = len(nodes)
            nodes += new
            order = range(len(new))
            if tree.size is not None:
                order = sorted(order, key=lambda one: -new[one][2])[: tree.widest]
            order = list(order) if branches[chosen] else list(order)[:1]
            frontier = [(first + one, *new[one][1:]) for one in order]
        kept = range(len(nodes))
        if tree.size is not None:
            kept = sorted(sorted(kept, key=lambda one: -nodes[one][2])[: tree.size])
        places = {-1: -1} | {one: place for place, one in enumerate(kept)}
        parents = [places[nodes[one][0]] for one in kept]
        paths = [nodes[one][1] for one in kept]
        counts = [tree.children(level) for level in range(K)]
        if depth and tree.size is not None:
            node, own = -1, []
            for _ in range(K):
                children = [one for one, parent in enumerate(parents) if parent == node]
                own.append(len(children))
                node = children[0] if children else -2
            widths.append(own)
        if widths:
            counts = np.rint(np.mean(widths, axis=0)).astype(int)
        logits = torch.stack([target(tokens), *(target(tokens + path) for path in paths)])
        draft_logits, origins = None, None
        if not one_hot:
            origins, draft_logits = list(sources), list(sources.values())
        walked = [path[-1] for path in paths], parents, draft_logits, origins
        emitted, _ = naive_walk(logits, *walked, uniforms[1 + draws :], K, temperature)
        prob, ratio = np.zeros((2, K, N, len(emitted)))
        for place, token in enumerate(emitted):
            p = algorithm.distribution(target(tokens + emitted[:place]), temperature)
            for one, drafter in enumerate(drafters):
                logits = drafter(tokens + emitted[:place], [])
                for level, count in enumerate(counts):
                    prob[level, one, place], ratio[level, one, place] = naive_score(
                        p, logits, token, count, temperature, one_hot
                    )
                    if count and not branches[one]:
                        ratio[level, one, place] = naive_score(p, logits, token, 1, temperature, one_hot)[1]
        tokens = tokens + emitted
        choices.append(chosen)
        weights_seen.append(weights)
        for feedback in queue.push(prob, ratio):
            regrets += algorithm.normal_hedge(regrets) @ feedback.losses - feedback.losses
    return tokens, choices, weights_seen


def naive_score(p, logits, token, count, temperature, one_hot) -> tuple[float, float]:
    """acceptance_prob and acceptance_ratio of a node with `count` children."""
    if one_hot:
        ids = logits.topk(min(count, int(logits.isfinite().sum()))).indices
        return float(p[ids].sum()), float(token in ids)
    q, left, scale, mass = algorithm.distribution(logits, temperature), p, 0.0, 1.0
    for _ in range(count):
        scale, left = scale + mass, (p - (scale + mass) * q).clamp(min=0)
        mass = float(left.sum())
    return 1 - mass, 1 - float(left[token] / p[token])


@pytest.mark.parametrize(("tree", "mode"), SHAPES, ids=str)
def test_the_decoder_equals_the_naive_one(target, tree, mode):
    small = CausalLMDrafter(tiny_llama(seed=7, layers=1), target, name="small")
    drafters = [tiny_head(target, 1), tiny_head(target, 2), small]
    config = DecodeConfig(draft_length=3, proposal=mode, tree=tree, evaluate_every=1, warm_start=0, backend="reference")
    for seed, temperature in enumerate((0.8, 0.0)):
        prompt = prompt_of(seed)
        out = Decoder(target, drafters, config).generate(prompt, max_new_tokens=16, temperature=temperature, seed=seed)
        with torch.inference_mode():
            tokens, choices, weights = naive_decode(
                *as_functions(target, drafters), [True, True, False], prompt[0].tolist(), max_new_tokens=16, draft_length=3,
                temperature=temperature, random=np.random.default_rng(seed), tree=tree, mode=mode,
            )  # fmt: skip
        assert out.sequences[0].tolist() == tokens
        assert out.stats[0].choices == choices
        np.testing.assert_allclose(out.stats[0].weights, weights, atol=1e-9)


@pytest.mark.parametrize(("tree", "mode"), SHAPES[1:5], ids=str)
@pytest.mark.parametrize("every", [1, "adaptive"])
def test_temperature_0_is_the_targets_own_text(target, tree, mode, every):
    """Two stacks of unequal heads, a small model, prompt lookup; five ragged rows; with processors and without."""
    decoder = Decoder(
        target, mixed_pool(target, True), DecodeConfig(draft_length=3, tree=tree, proposal=mode, evaluate_every=every)
    )
    for options in ({}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}):
        request = batch_of(3) | {"max_new_tokens": 20, "do_sample": False} | options
        expected = target.generate(**request)
        assert target.generate(**request, custom_generate=decoder).tolist() == expected.tolist()
    out = decoder.generate(**batch_of(5), max_new_tokens=30, seed=0)
    assert not any(one.failures for one in out.stats)
    assert all(len(one.losses) > 3 for one in out.stats)


@pytest.mark.parametrize(("tree", "mode"), [SHAPES[2], SHAPES[4]], ids=str)
def test_the_drop_in_tells_of_the_path_only(target, tree, mode):
    """Scores, logits and the cache are those of the emitted tokens, whatever else the tree held."""
    decoder = Decoder(target, mixed_pool(target, True), DecodeConfig(draft_length=3, tree=tree, proposal=mode))
    request = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.2, "return_dict_in_generate": True}
    request |= {"output_scores": True, "output_logits": True}
    plain = target.generate(prompt_of(2), **request)
    ours = target.generate(prompt_of(2), custom_generate=decoder, **request)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for one, other in ((ours.scores, plain.scores), (ours.logits, plain.logits)):
        torch.testing.assert_close(torch.stack(one), torch.stack(other), atol=1e-6, rtol=0)
    for one, other in zip(ours[CACHE_NAME].layers, plain[CACHE_NAME].layers, strict=True):
        count = min(one.get_seq_length(), other.get_seq_length())
        torch.testing.assert_close(one.keys[:, :, :count], other.keys[:, :, :count], atol=1e-9, rtol=0)
        torch.testing.assert_close(one.values[:, :, :count], other.values[:, :, :count], atol=1e-9, rtol=0)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("learner", ["normal_hedge", "exp3", "meta_sd"])
def test_trees_go_with_the_other_options(target, learner, overlaps):
    for tree, mode in (SHAPES[2], SHAPES[4]):
        config = DecodeConfig(draft_length=3, tree=tree, proposal=mode, learner=learner)
        decoder = Decoder(target, mixed_pool(target, True), config)
        decoder.overlaps = overlaps
        out = decoder.generate(**batch_of(3), max_new_tokens=20, seed=0)
        assert out.sequences.tolist() == target.generate(**batch_of(3), max_new_tokens=20, do_sample=False).tolist()
        assert not any(one.failures for one in out.stats)
        decoder.generate(**batch_of(3), max_new_tokens=12, temperature=1.0, seed=0)


@pytest.mark.parametrize("fault", ["raises", "nan"])
@pytest.mark.parametrize("method", ["consume", "step"])
def test_a_drafter_that_fails_in_a_tree_leaves_its_row(target, monkeypatch, method, fault):
    """In the second row, in the midst of the text: the others go on with it, and nothing is emitted because of it."""
    small = CausalLMDrafter(tiny_llama(seed=7, layers=1), target, name="small")
    session, begun = small.session, []

    def spoilt():
        one = session()
        begun.append(one)
        if len(begun) == 2:
            plain = getattr(one, method)

            def fail(*arguments):
                given = plain(*arguments)
                if one.verified < 15:
                    return given
                return given * math.nan if fault == "nan" else 1 / 0

            setattr(one, method, fail)
        return one

    monkeypatch.setattr(small, "session", spoilt)
    decoder = Decoder(target, [small], DecodeConfig(draft_length=3, proposal="argmax", tree=Tree(3, size=6)))
    with pytest.warns(UserWarning, match="small is out of this request"):
        out = decoder.generate(**batch_of(3), max_new_tokens=25, seed=0)
    assert out.sequences.tolist() == target.generate(**batch_of(3), max_new_tokens=25, do_sample=False).tolist()
    assert [len(one.failures) for one in out.stats] == [0, 1, 0]
    choices = out.stats[1].choices
    assert choices[-1] == -1 and choices[0] == 0


@pytest.mark.parametrize("shape", [{}, {"tree": Tree(2)}, {"tree": Tree((2, 1, 1))}], ids=str)
def test_rows_at_the_end_of_a_table_of_positions(shape):
    """What fills up a short row lies past the target's context."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=None, eos_token_id=None,
        initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    decoder = Decoder(model, [NGramDrafter(VOCABULARY)], DecodeConfig(draft_length=3, **shape))
    prompts = torch.tensor([[3, 4, 3, 4, 3, 4, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12], [1, 1, 1, 1, 1, 1, 1, 1]])
    out = decoder.generate(prompts, max_new_tokens=32)
    assert out.sequences.tolist() == model.generate(prompts, max_new_tokens=32, do_sample=False).tolist()


def test_a_compiled_target_takes_trees(target, monkeypatch):
    monkeypatch.setattr(capture, "compiled", lambda graph: graph)  # inductor's code takes seconds to make
    config = DecodeConfig(draft_length=3, proposal="argmax", tree=Tree(3, size=7), compile=True)
    drafters = [tiny_head(target, 1), NGramDrafter(VOCABULARY)]
    decoder = Decoder(target, drafters, config)
    out = decoder.generate(**batch_of(2), max_new_tokens=25)
    assert out.sequences.tolist() == target.generate(**batch_of(2), max_new_tokens=25, do_sample=False).tolist()
    assert decoder.captures.count == 8 and decoder.captures.compilations


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "qwen3"])
def test_temperature_0_with_other_targets(kind):
    target = target_of(kind, "eager" if kind == "gemma2" else "sdpa")
    heads = [tiny_head(target, seed) for seed in (1, 2)]
    request = batch_of(3)
    config = DecodeConfig(draft_length=3, proposal="argmax", tree=Tree(3, size=10), drafter_window=16)
    decoder = Decoder(target, heads, config)
    out = decoder.generate(**request, max_new_tokens=30)
    for one, ids, mask in zip(out.sequences, request["input_ids"], request["attention_mask"].bool()):
        # By itself: with padding longer than its window the target does not say what it says without.
        expected = target.generate(ids[mask][None], max_new_tokens=30, do_sample=False)
        assert one[int((~mask).sum()) :].tolist() == expected[0].tolist()


def chain_with_a_layer() -> LlamaForCausalLM:
    """A Markov chain whose one layer adds nothing, so that there is a hidden state for heads to read."""
    target = chain(seed=0, layers=1)
    for weight in (target.model.layers[0].self_attn.o_proj.weight, target.model.layers[0].mlp.down_proj.weight):
        torch.nn.init.zeros_(weight)
    return target


def chain_head(target, seed: int) -> EagleHead:
    config = EagleConfig(16, 16, 2, 2, 8, 16, V, 5, (0,))
    head = EagleHead(config, target.get_input_embeddings(), torch.tensor([0, 2, 3, 5, 6]), name=f"head-{seed}")
    generator = torch.Generator().manual_seed(seed)
    for weight in head.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.4, generator=generator)
    return head.requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("tree", "mode", "processed"),
    [(Tree(2), "argmax", False), (Tree(3, size=6), "argmax", False), (Tree((3, 2)), "sampled", False),
     (Tree((2, 2)), "sampled", True), (Tree(2, size=4), "argmax", True)],
    ids=str,
)  # fmt: skip
def test_sampled_text_has_the_targets_law(tree, mode, processed):
    """Chi-squares of tests/test_lossless.py, over heads that draft whole trees and drafters that draft combs."""
    target = chain_with_a_layer()
    drafters = [chain_head(target, 1), chain_head(target, 2), *chain_pool(target, *MIXED)]
    config = DecodeConfig(draft_length=2, tree=tree, proposal=mode)
    decoder = Decoder(target, drafters, config)
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(V, (64, 4), generator=generator)
    table, options = table_of(target), {"temperature": 0.8, "top_k": 5}
    law = law_of(table, **options)
    if processed:
        torch.manual_seed(3)
        found = target.generate(
            prompts, do_sample=True, max_new_tokens=60, custom_generate=decoder, return_dict_in_generate=True,
            renormalize_logits=True, **options,
        )  # fmt: skip
        sequences, rounds = found.sequences, [one.emitted_by_round for one in found.hedgespec]
    else:
        out = decoder.generate(prompts, max_new_tokens=200, seed=11, **options)
        sequences, rounds = out.sequences, [one.emitted_by_round for one in out.stats]
        assert max(map(max, rounds)) == 3
    assert min(p_values(sequences, rounds, law)) > SMALLEST_P_VALUE


@pytest.mark.parametrize("mode", ["argmax", "sampled"])
def test_the_exact_estimator_is_exact_in_trees(mode):
    """Over all texts of a Markov chain: the mean of the estimate is the mean of what a round emits."""
    random = torch.Generator().manual_seed(4)
    vocabulary, counts = 4, (3, 2, 1)
    table = 1.5 * torch.randn(vocabulary, vocabulary, generator=random, dtype=torch.float64)
    draft = 1.5 * torch.randn(vocabulary, vocabulary, generator=random, dtype=torch.float64)
    p = table.softmax(-1)

    def scores(before: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """By number of children, [2 * 3, 1, texts, 1]."""
        arguments = table[before][:, None], draft[before][None, :, None], token[:, None]
        if mode == "argmax":
            return evaluate(*arguments, top_k=3).scores[4:]
        return multi_draft_acceptance(*arguments, 3)

    texts = torch.tensor(list(itertools.product(range(vocabulary), repeat=3)))
    before = torch.cat([torch.zeros(len(texts), 1, dtype=torch.int64), texts[:, :-1]], 1)
    probability = p[before, texts].prod(1)
    rows = [scores(before[:, level], texts[:, level]) for level in range(3)]
    estimate = torch.ones(len(texts), dtype=torch.float64)
    survival = torch.ones(len(texts), dtype=torch.float64)
    reached = torch.ones(len(texts), dtype=torch.float64)
    emitted = torch.zeros((), dtype=torch.float64)
    for level, count in enumerate(counts):
        prob, ratio = rows[level][2 * count - 2, 0, :, 0], rows[level][2 * count - 1, 0, :, 0]
        estimate, survival = estimate + survival * prob, survival * ratio
        reached = reached * ratio  # the chance that these very tokens were drafted and accepted, over their own
        emitted = emitted + (probability * reached).sum()
        queue = DelayQueue(1, 3)
        values = [np.array([[[float(one[2 * c - 2 + which, 0, 7, 0]) for one in rows]] for c in counts]) for which in (0, 1)]
        [*_, first] = queue.push(*values)[:1] or [None]
    assert float((probability * estimate).sum()) == pytest.approx(float(1 + emitted), abs=1e-12)
    assert 1 - first.losses[0] == pytest.approx(float(estimate[7]) / 4, abs=1e-12)


def test_a_target_without_masks_is_refused(target):
    model = tiny_llama(seed=0, layers=2)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="tree: expected a target that takes positions and a mask"):
        Decoder(model, [NGramDrafter(VOCABULARY)], DecodeConfig(proposal="argmax", tree=Tree(2)))
