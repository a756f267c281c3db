"""The shape of a draft tree: how many children a node gets, which nodes are kept, and who is whose ancestor.

A chain of K drafts is the tree in which every node has one child. Nodes come in an order in which parents precede children;
in a forward of the target they stand behind the last verified token, which is the root.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

MOST_NODES = 512
"""Of a tree. A forward's mask has a row and a column for each."""
MOST_CHILDREN = 32
"""Of a node: as many candidates as the kernels of `evaluate` keep."""


@dataclass(frozen=True)
class Tree:
    """How a draft branches. Its depth is the draft length K.

    Args:
        branching: children of a node, one number for every depth, or one for each depth, the root's first.
        size: None: a static tree, in which every node above depth K has its children. A number: a dynamic one, which grows
            where the drafter is surest: at each depth the `branching` likeliest nodes get `branching` children each, and of
            all nodes the `size` likeliest are verified.

    A drafter that takes in one token after another (anything but an EAGLE head) goes on from the first child only, so its
    tree is a chain each of whose nodes has siblings without children.

    Raises: TypeError or ValueError naming the argument, what was expected and what came.

    Source: Li et al., "EAGLE", arXiv 2401.15077 (static) and "EAGLE-2", arXiv 2406.16858 (dynamic).
    """

    branching: int | tuple[int, ...]
    size: int | None = None

    def __post_init__(self) -> None:
        counts = self.branching if isinstance(self.branching, tuple) else (self.branching,)
        if not counts or not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
            raise TypeError(f"branching: expected an int or a tuple of ints, got {self.branching!r}")
        if not all(1 <= count <= MOST_CHILDREN for count in counts):
            raise ValueError(f"branching: expected 1..{MOST_CHILDREN} children of a node, got {self.branching}")
        if self.size is None:
            return
        if not isinstance(self.size, int) or isinstance(self.size, bool):
            raise TypeError(f"size: expected an int or None, got {self.size!r}")
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


def ancestry(parents: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Depths and lines of descent of trees. No value on a device is waited for.

    Args:
        parents: int64 [B, M], of each node its parent among the nodes, -1 for the root.
        depth: of the deepest node, at most.
    Returns: depths int64 [B, M+1] and, bool [B, M+1, M+1], whether node j is node i or one of its ancestors; the root is 0.
    """
    above = pad(parents + 1, (1, 0))
    lines = torch.eye(above.shape[1], dtype=torch.bool, device=above.device).repeat(len(above), 1, 1)
    towards = above[..., None].expand_as(lines)
    for _ in range(depth):
        lines |= lines.gather(1, towards)
    return lines.sum(-1) - 1, lines
