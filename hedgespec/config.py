"""The options of a decoder: frozen records, validated when they are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hedgespec.scalars import flag, integer, integers, real, shown, text

CHOICES = {
    "mode": ("sampled", "argmax", "coupled"),
    "estimator": ("exact", "product"),
    "loss": ("length", "acceptance_rate"),
    "selection": ("sample", "argmax"),
    "objective": ("tokens", "throughput"),
}


MOST_NODES = 512
"""Largest number of nodes of a tree. A forward's mask has a row and a column for each."""
MOST_CHILDREN = 32
"""Largest number of children of a node, which is how many candidates the kernels of `evaluate` keep."""


@dataclass(frozen=True)
class Tree:
    """The shape of a draft tree. Its depth is the draft length K.

    Args:
        branching: children of a node, 1..32: one number for all depths, or one for each depth, the root's first, kept as a
            tuple.
        size: None makes a static tree, in which every node above depth K has its children. A number M, 1..512, makes a dynamic
            one: at each depth the `branching` likeliest nodes get `branching` children each, and the M likeliest of all nodes
            are verified. Default: None.

    EAGLE heads draft whole trees. Any other drafter takes one token after another, so it goes on from the first child only: its
    tree is a chain whose nodes have siblings without children.

    Raises: TypeError or ValueError naming the argument, what was expected and what came.

    Source: Li et al., "EAGLE", arXiv 2401.15077 (static) and "EAGLE-2", arXiv 2406.16858 (dynamic).
    """

    branching: int | Sequence[int]
    size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.branching, (set, frozenset)):
            raise TypeError(f"branching: expected an int or a sequence of ints, got {shown(self.branching)}")
        counts = integers("branching", self.branching)
        if not counts or not all(1 <= count <= MOST_CHILDREN for count in counts):
            raise ValueError(f"branching: expected 1..{MOST_CHILDREN} children of a node, got {self.branching}")
        several = isinstance(self.branching, Iterable) and not (hasattr(self.branching, "shape") and not self.branching.shape)
        object.__setattr__(self, "branching", counts if several else counts[0])
        if self.size is None:
            return
        object.__setattr__(self, "size", integer("size", self.size, otherwise=" or None"))
        if not 1 <= self.size <= MOST_NODES:
            raise ValueError(f"size: expected 1..{MOST_NODES} nodes or None, got {self.size}")
        if isinstance(self.branching, tuple):
            raise ValueError(f"branching: expected one number for a dynamic tree, got {self.branching}")

    def check(self, draft_length: int) -> None:
        """Raises ValueError where the tree does not fit the draft length, or has too many nodes."""
        if isinstance(self.branching, tuple) and len(self.branching) != draft_length:
            raise ValueError(
                f"branching: expected a number of children for each of the {draft_length} depths, got {len(self.branching)}"
            )
        if (nodes := self.nodes(draft_length)) > MOST_NODES:
            raise ValueError(f"tree: expected at most {MOST_NODES} nodes, got {nodes}; a `size` bounds them")

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
    """Options of a `Decoder`, the same for all its requests.

    Numbers may be Python's, NumPy's, or tensors with one element; they are kept as Python's.

    Args:
        draft_length: K, the most tokens drafted in a round, >= 1. Default: 5.
        mode: how the drafter proposes: "sampled" draws from its distribution, "argmax" takes its likeliest token, "coupled"
            takes the likeliest after adding Gumbel noise that drafters and target share. In mode "coupled" the tokens of a seed
            are the same whatever the drafters, the learner and the other options here, and somewhat fewer drafted tokens are
            accepted than in mode "sampled". The children of a node in a tree are independent samples, the likeliest tokens, or
            the likeliest with the noise added. At temperature 0 every mode takes the likeliest tokens. Default: "sampled".
        learner: a name from `hedgespec.learners.NAMES`. Default: "normal_hedge".
        learner_options: keyword options of that learner. Default: {}.
        prior: belief in each drafter before the first loss, [N], non-negative; None is uniform. Default: None.
        estimator: of the expected emitted length: "exact" or "product" (`hedgespec.DelayQueue` has the formulas). Default:
            "exact".
        loss: "length", 1 - expected length / (K + 1), or "acceptance_rate", 1 - acceptance_prob. Default: "length".
        selection: "sample" draws a drafter from the weights, "argmax" takes the one of the largest weight. Default: "sample".
        objective: "tokens" maximises tokens a round, and every drafter drafts K. "throughput" maximises tokens a second, by
            costs of drafting and verifying that are measured while decoding: the learner chooses a drafter and a length 1..K
            together, or plain decoding where no draft pays (`hedgespec.decoder.arms.DraftersAndLengths` has the formulas). The
            first rounds of a decoder measure every length 0..K. Since a clock then takes part in the choice, a seed repeats a
            sampled text in mode "coupled" only. "throughput" needs chains, the loss "length" and a learner with full feedback;
            on a GPU each round waits for the device after drafting and after verifying. Default: "tokens".
        evaluate_every: m, rounds from one evaluation of all drafters to the next, >= 1, or "adaptive". The drafters' weights
            are read once an evaluation, however many tokens it covers, so its cost falls as 1/m; the learner receives the same
            losses, later, and with full feedback changes the drafter only after an evaluation. 1 is the paper's method.
            "adaptive" begins with 1, doubles m up to 8 while the same drafter is drawn again (up to 64 while plain decoding
            is), and returns to 1 when another one is drawn; it stays at 1 with the learner "meta_sd". Default: "adaptive".
        back_off: evaluations in a row, >= 1, after which a drafter of negligible weight is left out of the next evaluation;
            None scores all drafters in every evaluation. The drafter then catches up on all it missed in one pass, and while
            its weight stays negligible it is left out of the next 2, 4, 8 and at most 16 evaluations. Negligible is a weight of
            exactly 0 for normal_hedge and ada_normal_hedge, and a weight up to 0.001 for hedge. Losses are never guessed: they
            arrive later, for that drafter alone, and if its weight was 0 throughout, the learner ends where it would have
            without this option, except that the last K - 1 losses may complete a little earlier. Each row keeps the target's
            logits for what was missed, at most 128 tokens and those of one evaluation, and the heads' caches keep as many
            tokens beyond `drafter_window`. All drafters catch up at the end of a request. Ignored with a learner without full
            feedback; refused with objective "throughput" and with `depth_correction`. Default: None.
        warm_start: M, the most positions at the end of a prompt on which the learner compares all drafters before the first
            round, >= 0; 0 turns it off, as in the paper. Target and drafters read the prompt anyway. Since a prompt's tokens
            were not drawn from the target, the loss of such a position is 1 - acceptance_prob of sampled proposals at
            temperature 1, whatever the request's own temperature. Skipped if a `learner_state` is given, if the caller
            processes the target's logits (a processor's state must not see the prompt), with a learner without full feedback,
            and with objective "throughput" until costs are measured; after that a position stands for every length through
            powers of its acceptance_prob. Regret and `DecodeStats.losses` count the continuation alone. The distribution of the
            emitted tokens does not depend on it. Default: 32.
        drafter_window: the most verified tokens of a request that each EAGLE head keeps in its cache, >= 16, which bounds its
            memory; the head then drafts as if the text began later. None keeps all. Default: None.
        depth_correction: from the second drafted token on, an EAGLE head reads its own features, but it is scored with the
            target's. True multiplies its scores by factors for each depth, learned from the rounds that it drafted in the
            request (`hedgespec.depth`). Refused with a tree and with loss "acceptance_rate". Default: False.
        overlap: True begins the next round while the drafters are being scored; the learner receives the losses one round
            later. None does so on a GPU only, where it saves time. Default: None.
        track_regret: True scores every drafter after each round even if the learner does not need it. Default: False.
        backend: of `evaluate` and `verify`: "auto" or a name from `hedgespec.backends.BACKENDS`. Default: "auto".
        compile: True captures forwards of fixed shapes once for each shape and keeps them in the decoder. On a GPU the target's
            forward over a round's tokens and the stacked heads' passes become CUDA graphs. On a CPU the target's layers are
            compiled, which gains little and makes a request wait some 10 s, up to half a minute the first time, and again at a
            new length of the text (256, 512, 1024 ... tokens) or size of the batch. A target that cannot be captured runs as it
            is, with a warning. Default: False.
        tree: a `hedgespec.Tree` of drafts, `draft_length` deep; None drafts a chain. A dynamic tree needs mode "argmax" or
            "coupled". The target needs an attention that takes a mask of its own ("sdpa" or "eager"). Default: None.

    Raises: TypeError or ValueError naming the argument, what was expected and what came. The learner's name and options and the
    size of the prior are checked by `Decoder`, which knows the number of drafters; the backend when it is first used.
    """

    draft_length: int = 5
    mode: str = "sampled"
    learner: str = "normal_hedge"
    learner_options: Mapping[str, Any] = field(default_factory=dict)
    prior: tuple[float, ...] | None = None
    estimator: str = "exact"
    loss: str = "length"
    selection: str = "sample"
    objective: str = "tokens"
    evaluate_every: int | Literal["adaptive"] = "adaptive"
    back_off: int | None = None
    warm_start: int = 32
    drafter_window: int | None = None
    depth_correction: bool = False
    overlap: bool | None = None
    track_regret: bool = False
    backend: str = "auto"
    compile: bool = False
    tree: Tree | None = None

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if not isinstance(self.evaluate_every, str) or self.evaluate_every != "adaptive":
            keep("evaluate_every", integer("evaluate_every", self.evaluate_every, 1, otherwise=' or "adaptive"'))
        keep("draft_length", integer("draft_length", self.draft_length, 1))
        keep("warm_start", integer("warm_start", self.warm_start, 0))
        for name, least in (("back_off", 1), ("drafter_window", 16)):
            if (value := getattr(self, name)) is not None:
                keep(name, integer(name, value, least, otherwise=" or None"))
        if self.overlap is not None:
            keep("overlap", flag("overlap", self.overlap, otherwise=" or None"))
        for name in ("compile", "depth_correction", "track_regret"):
            keep(name, flag(name, getattr(self, name)))
        for name in ("learner", "backend"):
            text(name, getattr(self, name))
        for name, choices in CHOICES.items():
            if text(name, getattr(self, name)) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        if self.objective == "throughput" and self.loss != "length":
            raise ValueError(f"loss: expected 'length' with objective 'throughput', got {self.loss!r}")
        if self.back_off is not None and (self.objective == "throughput" or self.depth_correction):
            raise ValueError(
                f"back_off: expected None with objective 'throughput' or depth_correction, got {self.back_off} with objective "
                f"{self.objective!r} and depth_correction {self.depth_correction}"
            )
        if self.depth_correction and (self.tree is not None or self.loss != "length"):
            raise ValueError(
                f'depth_correction: expected False, or no tree and loss "length", got tree {self.tree} and loss {self.loss!r}'
            )
        if self.tree is not None:
            if not isinstance(self.tree, Tree):
                raise TypeError(f"tree: expected a hedgespec.Tree or None, got {self.tree!r}")
            if self.objective == "throughput":
                raise ValueError(f"tree: expected None with objective 'throughput', which chooses lengths, got {self.tree!r}")
            self.tree.check(self.draft_length)
            if self.tree.size is not None and self.mode == "sampled":
                raise ValueError(
                    f'mode: expected "argmax" or "coupled" with a dynamic tree, whose nodes are ranked, got {self.mode!r}'
                )
        if not isinstance(self.learner_options, Mapping) or not all(isinstance(name, str) for name in self.learner_options):
            raise TypeError(f"learner_options: expected a mapping from names to values, got {shown(self.learner_options)}")
        keep("learner_options", dict(self.learner_options))
        if self.prior is not None:
            if isinstance(self.prior, (str, bytes, Mapping)) or not isinstance(self.prior, Iterable):
                raise TypeError(f"prior: expected a sequence of numbers or None, got {shown(self.prior)}")
            keep("prior", tuple(real("prior", value) for value in self.prior))

    @property
    def most_drafted(self) -> int:
        """Most tokens that a round has the target look at beside the last verified one."""
        return self.draft_length if self.tree is None else self.tree.nodes(self.draft_length)
