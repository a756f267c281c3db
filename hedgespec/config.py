"""How a decoder decodes: frozen records, validated when they are made."""

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
"""Of a tree. A forward's mask has a row and a column for each."""
MOST_CHILDREN = 32
"""Of a node: as many candidates as the kernels of `evaluate` keep."""


@dataclass(frozen=True)
class Tree:
    """How a draft branches. Its depth is the draft length K.

    Args:
        branching: children of a node, one number for every depth, or one for each depth, the root's first, kept as a tuple.
        size: None: a static tree, in which every node above depth K has its children. A number: a dynamic one, which grows
            where the drafter is surest: at each depth the `branching` likeliest nodes get `branching` children each, and of
            all nodes the `size` likeliest are verified.

    A drafter that takes in one token after another (anything but an EAGLE head) goes on from the first child only, so its
    tree is a chain each of whose nodes has siblings without children.

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
    """What does not change from request to request.

    Args:
        draft_length: K, most tokens drafted a round, >= 1.
        mode: how the drafter proposes: "sampled" from its distribution, its "argmax", or "coupled" to the target by noise that
            both share. Coupled, a seed's text is the same whatever the drafters, the learner and the other options here, while
            somewhat fewer drafted tokens are accepted than sampled. Children in a tree are independent samples, the likeliest
            tokens, or the likeliest with the noise on top; at temperature 0 the likeliest in every mode.
        tree: a `hedgespec.Tree` of drafts, `draft_length` deep; None drafts a chain. A dynamic one takes mode "argmax" or
            "coupled". The target needs an attention that takes a mask of its own ("sdpa" or "eager").
        learner: a name from `hedgespec.learners.NAMES`.
        learner_options: keyword options of that learner.
        prior: belief in each drafter before the first loss, [N]; None is uniform.
        objective: "tokens" a round, in which every drafter drafts K, or "throughput": tokens a second, by what drafting and
            verifying are measured to cost while decoding. Then the learner chooses a drafter and a length 1..K together, or
            plain decoding where none pays (`hedgespec.decoder.arms.DraftersAndLengths` has the mathematics); the first rounds
            of a decoder measure every length, 0..K. A clock has a say in who drafts how much, so a seed repeats a sampled text
            in mode "coupled" only. For chains, the loss "length", and learners that hear of all drafters. On a GPU a round
            waits for the device after drafting and after verifying.
        estimator: of the expected emitted length, "exact" or "product".
        loss: "length" (1 - expected length / (K+1)) or "acceptance_rate" (1 - acceptance_prob).
        evaluate_every: m, rounds from one evaluation of all drafters to the next, >= 1; 1 is the paper's. The drafters'
            weights are read once an evaluation, however many tokens it covers, so its cost falls as 1/m, and the learner
            sees the same losses later, which its delay queue allows. A learner that hears of all drafters switches only
            after one. "adaptive" begins with 1, doubles it up to 8 while the same drafter is drawn again (up to 64 while plain
            decoding is), and goes back to 1 when another one is; it stays 1 with a bandit that reads the scores, "meta_sd".
        back_off: a drafter whose weight was negligible after so many evaluations in a row, >= 1, is left out of the next one.
            Then it catches up on all it missed in one pass, and if its weight still is negligible it is left out of the next 2,
            4, 8 and at most 16; awake again, it is scored like any other. Negligible is a weight of exactly 0 where the learner
            has such weights (normal_hedge, ada_normal_hedge), and up to 0.001 with hedge. A sleeper's losses are never guessed:
            they come late, for it alone, and where its weight was 0 all the while the learner ends where it would have without,
            but for the last K-1 losses, which may be complete a little earlier where no sleeper's is waited for.
            For sleepers a row keeps the target's logits of what they missed, at most 128 tokens and one evaluation's more, and
            the heads' caches hold as much beyond `drafter_window`. At the end of a request all catch up. Without an effect with
            a learner that does not hear of all drafters. Not with objective "throughput", nor with `depth_correction`. None,
            the default: every evaluation scores all.
        warm_start: M, most of a prompt's last positions on which the learner hears of all drafters before the first round,
            >= 0; 0 is the paper's. Target and drafters read the prompt anyway. Its tokens were not drawn from the target, so
            what becomes of them says nothing: the loss of a position is 1 - acceptance_prob of sampled proposals at temperature
            1, whatever the request's own, where a position tells most; each is an update like any other. Left out where a
            `learner_state` is given, which holds a belief already, where a caller processes the target's logits, since a
            processor's state must not see the prompt, with a learner that does not hear of all drafters, and with objective
            "throughput" until costs are measured; after that a position stands for lengths by the powers of its
            acceptance_prob. A loss of its own kind: regret and `DecodeStats.losses` are of the text alone. The text's
            distribution does not depend on it.
        drafter_window: most verified tokens of a request that each EAGLE head keeps in its cache, >= 16, which bounds its
            memory; the head then drafts as if the text began later. None keeps all.
        depth_correction: an EAGLE head drafts on features of its own from the second token on, and is scored as if it had the
            target's. True multiplies what it scored by factors by depth, learned from the rounds it drafted in the request,
            see `hedgespec.depth`. Not with a tree, where it is not known which depth had a child to accept, nor with loss
            "acceptance_rate", which has no depth.
        overlap: lets the next round begin while the drafters are being scored; the learner hears of it one round later,
            which its delay queue allows. None does so on a GPU, where there is something to gain.
        selection: "sample" a drafter from the weights, or take their "argmax".
        track_regret: score every drafter after each round even where the learner does not ask for it.
        backend: of `evaluate` and `verify`; "auto" or a name from `hedgespec.backends.BACKENDS`.
        compile: forwards of fixed shapes are worked out once for each shape and kept by the decoder. On a GPU the target's over
            a round's tokens and the stacked heads' passes become CUDA graphs. On a CPU the target's layers are compiled, which
            gains little and for which a request waits some 10 s, up to half a minute the first time, and again at a new length
            of the text (256, 512, 1024 ... tokens) or size of the batch. A target that cannot be captured runs as it is, with
            a warning.

    Raises: TypeError or ValueError naming the argument, what was expected and what came. Learner, its options and the
    prior are checked by `Decoder`, which knows the number of drafters; the backend when it is first used.
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
