"""Configuration of a decoder: frozen dataclasses, validated on construction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from hedgespec.utils.scalars import flag, integer, integers, shown, text

CHOICES = {
    "proposal": ("sampled", "argmax", "coupled"),
    "objective": ("tokens", "throughput"),
}

MAX_NODES = 512
"""Most nodes of a draft tree. The mask of a forward has one row and one column for each node."""
MAX_CHILDREN = 32
"""Most children of a node: the number of candidates that the kernels of `evaluate` keep."""


@dataclass(frozen=True)
class Tree:
    """Shape of a draft tree. Its depth is the draft length K.

    Args:
        branching: number of children of a node, 1..32: one number for all depths, or one for each depth, the root first, kept
            as a tuple.
        size: None for a static tree, in which every node above depth K has its children. A number, 1..512, for a dynamic tree:
            at each depth the `branching` most likely nodes get `branching` children each, and the `size` most likely of all
            nodes are verified. Default: None.

    Only EAGLE heads branch at every node. Any other drafter continues from the first child only, so its tree is a chain whose
    nodes have siblings without children.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    Source: Li et al., "EAGLE", arXiv 2401.15077 (static) and "EAGLE-2", arXiv 2406.16858 (dynamic).
    """

    branching: int | tuple[int, ...]
    size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.branching, (set, frozenset)):
            raise TypeError(f"branching: expected an int or a sequence of ints, got {shown(self.branching)}")
        counts = integers("branching", self.branching)
        if not counts or not all(1 <= count <= MAX_CHILDREN for count in counts):
            raise ValueError(f"branching: expected 1..{MAX_CHILDREN} children of a node, got {self.branching}")
        several = isinstance(self.branching, Iterable) and not (hasattr(self.branching, "shape") and not self.branching.shape)
        object.__setattr__(self, "branching", counts if several else counts[0])
        if self.size is None:
            return
        object.__setattr__(self, "size", integer("size", self.size, otherwise=" or None"))
        if not 1 <= self.size <= MAX_NODES:
            raise ValueError(f"size: expected 1..{MAX_NODES} nodes or None, got {self.size}")
        if isinstance(self.branching, tuple):
            raise ValueError(f"branching: expected one number for a dynamic tree, got {self.branching}")

    def check(self, draft_length: int) -> None:
        """Raises ValueError where the tree does not fit the draft length, or has too many nodes."""
        if isinstance(self.branching, tuple) and len(self.branching) != draft_length:
            raise ValueError(
                f"branching: expected a number of children for each of the {draft_length} depths, got {len(self.branching)}"
            )
        if (nodes := self.nodes(draft_length)) > MAX_NODES:
            raise ValueError(f"tree: expected at most {MAX_NODES} nodes, got {nodes}; a `size` bounds them")

    def children(self, depth: int) -> int:
        """Children of a node at this depth; the root's is 0."""
        return self.branching if isinstance(self.branching, int) else self.branching[depth]

    @property
    def widest(self) -> int:
        """Most children of a node."""
        return self.branching if isinstance(self.branching, int) else max(self.branching)

    def nodes(self, draft_length: int) -> int:
        """M, most nodes that are verified; the root is none of them."""
        if self.size is not None:
            return self.size
        total, level = 0, 1
        for depth in range(draft_length):
            level *= self.children(depth)
            total += level
        return total


@dataclass(frozen=True)
class DecodeConfig:
    """Options of a decoder that are the same for all requests.

    Numbers may be Python's, NumPy's, or tensors with one element; they are kept as Python's.

    Args:
        draft_length: K, most tokens drafted in a round, >= 1. Default: 5.
        proposal: how the drafter proposes tokens. "sampled" samples from the drafter's distribution. "argmax" takes the most
            likely token. "coupled" takes the most likely token after adding Gumbel noise that target and drafter share: a seed
            then gives the same text whatever the drafters, the learner and the other options are, and somewhat fewer tokens are
            accepted than with "sampled". In a tree the children of a node are independent samples, the most likely tokens, or
            the most likely tokens after the noise. At temperature 0 every proposal is the most likely token. Default:
            "sampled".
        tree: a `hedgespec.Tree`, `draft_length` deep; None drafts a chain. A dynamic tree requires proposal "argmax" or
            "coupled". The target must use an attention that accepts a mask (attn_implementation "sdpa" or "eager").
            Default: None.
        learner: a name in `hedgespec.learners.NAMES`, or a function that takes the number of arms and returns a fresh
            `hedgespec.learners.Learner`, for example `functools.partial(hedgespec.learners.Hedge, eta=0.1)`. With objective
            "tokens" the arms are the drafters. Default: "normal_hedge".
        objective: "tokens" maximises tokens a round, and every drafter drafts K. "throughput" maximises tokens a second, by the
            measured costs of drafting and verifying: the learner then chooses a drafter and a length 1..K together, or plain
            decoding (`hedgespec.selection.arms.DraftersAndLengths` has the mathematics). The first rounds of a decoder measure
            every length 0..K. Because choices depend on a clock, a seed repeats a sampled text with proposal "coupled" only.
            Requires chains and a learner with full feedback. On a GPU a round waits for the device after drafting and after
            verifying. Default: "tokens".
        evaluate_every: rounds from one evaluation of all drafters to the next, >= 1; the paper uses 1. An evaluation reads the
            weights of the drafters once, however many tokens it covers, so its cost falls as 1 / evaluate_every; the learner
            receives the same losses later, which its delay queue allows. A learner with full feedback changes the drafter only
            after an evaluation. "adaptive" starts at 1, doubles up to 8 while the same drafter is drawn again (up to 64 while
            plain decoding is), and returns to 1 when another one is drawn; with learner "meta_sd" it stays 1. Default:
            "adaptive".
        warm_start: number of final prompt positions from which the learner is initialised, >= 0; the paper uses 0. Each
            position gives one loss, 1 - acceptance_prob of sampled proposals at temperature 1. This costs no forward of the
            target. It is skipped with a `learner_state`, with logits processors (their state must not see the prompt), with
            learners without full feedback, and, with objective "throughput", until costs are measured. These losses are not
            part of the regret. The distribution of the text does not depend on them. Default: 32.
        drafter_window: most verified tokens of a request that the cache of an EAGLE head keeps, >= 16; the head then drafts as
            if the text started later. None keeps all. Default: None.
        backend: implementation of `evaluate` and `verify`: "auto" or a name in `hedgespec.ops.backends.BACKENDS`. Default:
            "auto".
        compile: captures forwards of fixed shapes once for each shape. On a GPU the target's forward over the tokens of a round
            and the passes of stacked heads become CUDA graphs. On a CPU the target's layers are compiled: this gains little,
            takes about 10 s for a request (up to 30 s the first time), and repeats for a new batch size and at 256, 512, 1024
            ... tokens. A target that cannot be captured runs without, with a warning. Default: False.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range. The learner is checked by `Decoder`, the
            backend at its first use.
    """

    draft_length: int = 5
    proposal: Literal["sampled", "argmax", "coupled"] = "sampled"
    tree: Tree | None = None
    learner: str | Callable[[int], Any] = "normal_hedge"
    objective: Literal["tokens", "throughput"] = "tokens"
    evaluate_every: int | Literal["adaptive"] = "adaptive"
    warm_start: int = 32
    drafter_window: int | None = None
    backend: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if not isinstance(self.evaluate_every, str) or self.evaluate_every != "adaptive":
            keep("evaluate_every", integer("evaluate_every", self.evaluate_every, 1, otherwise=' or "adaptive"'))
        keep("draft_length", integer("draft_length", self.draft_length, 1))
        keep("warm_start", integer("warm_start", self.warm_start, 0))
        if self.drafter_window is not None:
            keep("drafter_window", integer("drafter_window", self.drafter_window, 16, otherwise=" or None"))
        keep("compile", flag("compile", self.compile))
        text("backend", self.backend)
        if not isinstance(self.learner, str) and not callable(self.learner):
            raise TypeError(f"learner: expected a name, or a function that returns a learner, got {shown(self.learner)}")
        for name, choices in CHOICES.items():
            if text(name, getattr(self, name)) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        if self.tree is not None:
            self._check_tree(self.tree)

    def _check_tree(self, tree: Tree) -> None:
        if not isinstance(tree, Tree):
            raise TypeError(f"tree: expected a hedgespec.Tree or None, got {tree!r}")
        if self.objective == "throughput":
            raise ValueError(f"tree: expected None with objective 'throughput', which chooses lengths, got {tree!r}")
        tree.check(self.draft_length)
        if tree.size is not None and self.proposal == "sampled":
            raise ValueError(
                f'proposal: expected "argmax" or "coupled" with a dynamic tree, whose nodes are ranked, got {self.proposal!r}'
            )

    @property
    def max_drafted(self) -> int:
        """Most draft tokens that the target reads in a round, beside the last verified token."""
        return self.draft_length if self.tree is None else self.tree.nodes(self.draft_length)
