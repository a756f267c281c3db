"""Who is whose ancestor in a draft tree.

Nodes come in an order in which parents precede children; in a forward of the target they stand behind the last verified token,
which is the root. A chain of K drafts is the tree in which every node has one child.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad


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
