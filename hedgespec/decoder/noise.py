"""The Gumbel noise of the rows of a batch, for proposal "coupled"."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hedgespec.decoder.row import Row
from hedgespec.device import stack
from hedgespec.ops.gumbel import gumbel, key_of, perturb
from hedgespec.ops.sampling import Sampling


class CoupledNoise:
    """Computes the noise of each position of each row once, and adds it to logits.

    Args:
        sampling: temperature and filters of the target.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def begin(self, rows: Sequence[Row]) -> None:
        """Draws the keys of the rows. Called before any other uniform is drawn: their number depends on the rounds."""
        for row in rows:
            row.noise_key = key_of(row.uniforms(1)[0])

    def next(self, rows: Sequence[Row], count: int) -> torch.Tensor:
        """Returns the noise of the next `count` tokens of each row, float32 [B, count, V]."""
        missing = [max(count - len(row.noise), 0) for row in rows]
        if any(missing):
            keys = [row.noise_key for row, lack in zip(rows, missing) for _ in range(lack)]
            first = [row.length + len(row.noise) for row in rows]
            positions = [start + number for start, lack in zip(first, missing) for number in range(lack)]
            made = gumbel(keys, positions, rows[0].vocabulary, rows[0].tokens.device).split(missing)
            for row, new in zip(rows, made):
                row.noise = torch.cat([row.noise, new])
        return stack([row.noise[:count] for row in rows], 0)

    def spend(self, row: Row, emitted: int) -> torch.Tensor:
        """Removes the noise of the tokens that were emitted, and returns it, [emitted, V]."""
        spent, row.noise = row.noise[:emitted], row.noise[emitted:]
        return spent

    def perturb(self, logits: torch.Tensor, noise: torch.Tensor, maps: torch.Tensor | None = None) -> torch.Tensor:
        """Adds noise to logits; see `hedgespec.ops.gumbel.perturb`."""
        threshold = self.sampling.threshold(logits)
        return perturb(logits, noise, temperature=self.sampling.temperature, threshold=threshold, draft_to_target=maps)
