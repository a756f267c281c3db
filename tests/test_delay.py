"""The delay queue: complete losses, all of them, in order, and none that is guessed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgespec.selection.delay import DelayQueue

quick = settings(max_examples=40, deadline=None)


@st.composite
def traces(draw):
    """(draft_length, acceptance_prob, acceptance_ratio): a random verified trajectory, zeros and ones well represented."""
    n, length, draft_length = draw(st.integers(1, 4)), draw(st.integers(0, 25)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    zeros, ones = draw(st.tuples(st.floats(0, 0.9), st.floats(0, 1)))

    def acceptance():
        values, kind = rng.random((n, length)), rng.random((n, length))
        return np.where(kind < zeros, 0.0, np.where(rng.random((n, length)) < ones, 1.0, values))

    return draft_length, acceptance(), acceptance()


def brute_force(draft_length, prob, ratio):
    """(position, losses) of every loss that can be known by the end of the trace, each from its own double loop."""
    n, length = prob.shape
    known = []
    for t in range(length):
        losses, certain = [], []
        for i in range(n):
            expected, product, seen = 1.0, 1.0, 0
            for k in range(min(draft_length, length - t)):
                expected += product * prob[i, t + k]
                product *= ratio[i, t + k]
                seen += 1
            losses.append(1 - expected / (draft_length + 1))
            certain.append(seen == draft_length or product == 0)
        if all(certain):
            known.append((t, losses))
    return known


def run(queue, prob, ratio, sizes=(10**6,)):
    """Push in chunks of these sizes, the last repeated; returns [(position, losses)]."""
    out, at = [], 0
    sizes = iter(sizes)
    size = next(sizes)
    while at < prob.shape[1]:
        out += queue.push(prob[:, at : at + size], ratio[:, at : at + size])
        at, size = at + size, next(sizes, max(size, 1))
    return [(feedback.position, feedback.losses.tolist()) for feedback in out]


@quick
@given(trace=traces())
def test_losses_are_the_formula(trace):
    draft_length, prob, ratio = trace
    queue = DelayQueue(len(prob), draft_length)
    out = run(queue, prob, ratio)
    expected = brute_force(draft_length, prob, ratio)
    assert [position for position, _ in out] == [position for position, _ in expected] == list(range(len(out)))
    for (_, losses), (_, awaited) in zip(out, expected):
        np.testing.assert_allclose(losses, awaited, rtol=0, atol=1e-15)
    assert queue.pending == prob.shape[1] - len(out) < draft_length
    assert all(0 <= loss < 1 for _, losses in out for loss in losses)


@quick
@given(trace=traces(), sizes=st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_the_size_of_the_chunks_does_not_matter(trace, sizes):
    draft_length, prob, ratio = trace
    whole, chunked = (DelayQueue(len(prob), draft_length) for _ in range(2))
    assert run(chunked, prob, ratio, sizes) == run(whole, prob, ratio)
    assert chunked.pending == whole.pending


@quick
@given(trace=traces())
def test_an_early_loss_is_exactly_the_awaited_one(trace):
    draft_length, prob, ratio = trace
    early = run(DelayQueue(len(prob), draft_length), prob, ratio)
    # A drafter that never fails keeps every loss waiting for all its positions.
    perfect = np.ones((1, prob.shape[1]))
    patient = DelayQueue(len(prob) + 1, draft_length)
    awaited = run(patient, np.vstack([prob, perfect]), np.vstack([ratio, perfect]))
    assert len(awaited) <= len(early)
    assert [(position, losses[:-1]) for position, losses in awaited] == early[: len(awaited)]


def test_a_loss_is_complete_as_soon_as_every_product_is_zero():
    queue = DelayQueue(2, 4)
    half = np.full((2, 1), 0.5)
    assert queue.push(half, [[1.0], [0.0]]) == []
    assert queue.pending == 1
    done = queue.push(half, [[0.0], [0.0]])
    assert [feedback.position for feedback in done] == [0, 1]
    np.testing.assert_allclose([f.losses for f in done], [[1 - 2 / 5, 1 - 1.5 / 5], [1 - 1.5 / 5] * 2], rtol=1e-15)
    assert queue.pending == 0


@quick
@given(trace=traces(), sizes=st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_lengths_are_the_partial_sums_and_the_losses_stay(trace, sizes):
    """In whatever chunks: what a queue for shorter drafts says of the same position, as soon and as exactly."""
    draft_length, prob, ratio = trace
    plain, asked = (DelayQueue(len(prob), draft_length, lengths=lengths) for lengths in (False, True))
    found, at = [], 0
    for size in [*sizes, prob.shape[1]]:
        here = slice(at, at + size)
        told, expected = asked.push(prob[:, here], ratio[:, here]), plain.push(prob[:, here], ratio[:, here])
        assert [(one.position, one.losses.tolist()) for one in told] == [
            (one.position, one.losses.tolist()) for one in expected
        ]
        assert all(one.lengths is None for one in expected)
        found, at = found + told, at + size
    for feedback in found:
        assert feedback.lengths.shape == (draft_length, len(prob)) and feedback.lengths.dtype == np.float64
        for k in range(1, draft_length + 1):
            sums = np.ones(len(prob))
            for i in range(len(prob)):
                product = 1.0
                for t in range(feedback.position, min(feedback.position + k, prob.shape[1])):
                    sums[i] += product * prob[i, t]
                    product *= ratio[i, t]
            np.testing.assert_allclose(feedback.lengths[k - 1], sums, rtol=0, atol=1e-14)
        np.testing.assert_allclose(feedback.losses, 1 - feedback.lengths[-1] / (draft_length + 1), rtol=0, atol=1e-14)


def test_an_early_length_lacks_nothing():
    """Both products are 0 after two positions: what is left of a sum of four is known."""
    [feedback, _] = DelayQueue(2, 4, lengths=True).push([[0.5, 0.25], [0.5, 0.75]], [[1.0, 0.0], [0.5, 0.0]])
    np.testing.assert_allclose(feedback.lengths, [[1.5, 1.5], [1.75, 1.875], [1.75, 1.875], [1.75, 1.875]], atol=1e-15)


@pytest.mark.parametrize("last", [0.0, 0.5])
def test_lengths_by_depth(last):
    """Each length is what a queue of that draft length says; where the products end early, the rest adds nothing."""
    prob, ratio = np.random.default_rng(0).random((2, 3, 2, 6))
    ratio[:, :, -1] = last
    found = DelayQueue(2, 3, lengths=True).push(prob, ratio)
    assert len(found) == (6 if last == 0 else 4)
    for k in (1, 2, 3):
        for feedback, shorter in zip(found, DelayQueue(2, k).push(prob[:k], ratio[:k])):
            np.testing.assert_allclose(feedback.lengths[k - 1], (1 - shorter.losses) * (k + 1), rtol=0, atol=1e-14)


def test_draft_length_one_never_waits():
    [feedback] = DelayQueue(2, 1).push(np.array([[0.5], [1.0]]), np.ones((2, 1)))
    assert feedback.losses.tolist() == [0.25, 0.0]


def test_the_end_of_a_request_drops_what_is_pending():
    prob = np.random.default_rng(1).random((2, 9))
    queue = DelayQueue(2, 4)
    run(queue, prob[:, ::-1], prob[:, ::-1])
    assert queue.close() == 3
    assert queue.pending == 0
    fresh = DelayQueue(2, 4)
    assert run(queue, prob, prob) == run(fresh, prob, prob)  # nothing of the last request is left, positions included


def test_tensors_and_rounding_above_one_are_taken():
    prob = torch.tensor([[0.5, 1.0 + 1e-6], [0.25, 1.0]])
    [feedback] = DelayQueue(2, 2).push(prob, torch.ones(2, 2))
    assert feedback.losses.dtype == np.float64
    np.testing.assert_allclose(feedback.losses, [1 - 2.5 / 3, 1 - 2.25 / 3], rtol=1e-15)


def test_losses_by_depth():
    """The same at every depth is what is not by depth; otherwise a position counts at its depth in the round."""
    random = np.random.default_rng(0)
    for _ in range(40):
        count, length, positions = (int(random.integers(1, most)) for most in (4, 5, 12))
        probs, ratios = random.random((2, length, count, positions)) * (random.random((2, length, count, positions)) < 0.6)
        flat, alike, by_depth = (DelayQueue(count, length) for _ in range(3))
        found, expected, told = [], [], []
        for start in range(0, positions, 3):
            here = slice(start, start + 3)
            expected += flat.push(probs[0][:, here], ratios[0][:, here])
            same = [np.repeat(one[:1, :, here], length, 0) for one in (probs, ratios)]
            found += alike.push(*same)
            told += by_depth.push(probs[:, :, here], ratios[:, :, here])
        assert [one.position for one in found] == [one.position for one in expected]
        for one, other in zip(found, expected):
            assert one.losses.tobytes() == other.losses.tobytes()
        for number, one in enumerate(told):
            assert one.position == number
            emitted, alive = np.ones(count), np.ones(count)
            for depth in range(min(length, positions - number)):
                emitted += alive * probs[depth, :, number + depth]
                alive *= ratios[depth, :, number + depth]
            assert number + length <= positions or not alive.any()
            np.testing.assert_allclose(one.losses, 1 - emitted / (length + 1), atol=1e-12)


def test_wrong_arguments_are_refused():
    queue, good = DelayQueue(2, 3), np.full((2, 2), 0.5)
    for value in (-0.1, 1.1, float("nan"), float("inf")):
        wrong = good.copy()
        wrong[1, 0] = value
        with pytest.raises(ValueError, match="acceptance_prob: expected values"):
            queue.push(wrong, good)
        with pytest.raises(ValueError, match="acceptance_ratio: expected values"):
            queue.push(good, wrong)
    with pytest.raises(ValueError, match=r"acceptance_prob: expected shape \(2, T\) or \(3, 2, T\), got \(3, 2\)"):
        queue.push(np.full((3, 2), 0.5), good)
    with pytest.raises(ValueError, match=r"acceptance_ratio: expected shape \(2, 2\)"):
        queue.push(good, good[:, :1])
    with pytest.raises(TypeError, match="acceptance_ratio: expected a floating dtype, got int64"):
        queue.push(good, np.ones((2, 2), dtype=np.int64))
    assert queue.pending == 0
    for arguments, message in (((0, 3), "num_drafters: expected"), ((2, 0), "draft_length: expected")):
        with pytest.raises(ValueError, match=message):
            DelayQueue(*arguments)


def test_cutting_sums_short_would_favour_drafters_that_stop_early():
    # The steady drafter is accepted with 0.71 everywhere. The bursty one is right or wrong for stretches at a time, so
    # it emits more in all, but late in the draft, where a sum that ends with the round no longer looks.
    draft_length, length, rng = 6, 15_000, np.random.default_rng(2)
    bursty = np.logical_xor.accumulate(rng.random(length) < 0.1).astype(float)
    steady = np.full(length, 0.71)
    acceptance = np.stack([steady, bursty])
    depth = np.arange(1, draft_length + 1)
    expected = 1 + np.array([(0.71**depth).sum(), (0.5 * 0.9 ** (depth - 1)).sum()])
    assert expected[1] > expected[0] + 0.2

    queued = [feedback.losses for feedback in DelayQueue(2, draft_length).push(acceptance, acceptance)]
    lengths = (1 - np.mean(queued, axis=0)) * (draft_length + 1)
    np.testing.assert_allclose(lengths, expected, atol=0.1)
    assert lengths[1] > lengths[0]

    cut, start = [], 0
    while start < length - draft_length:
        accepted = int((rng.random(draft_length) < 0.71).cumprod().sum())  # the steady drafter drafts
        revealed = acceptance[:, start : start + min(accepted + 1, draft_length)]
        cut.append(1 + revealed.cumprod(axis=1).sum(axis=1))
        start += accepted + 1
    cut_lengths = np.mean(cut, axis=0)
    assert cut_lengths[0] > cut_lengths[1]
