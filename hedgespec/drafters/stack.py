"""Equal-shaped EAGLE heads as one: weights stacked, caches in one buffer, every layer operation once for all of them.

In an evaluation all N heads read the same verified tokens. Run one after another they need N times the launches, and read N
times what they share: the embeddings of the tokens, the target's hidden states, the rows of the target's output matrix. The
head that drafts uses the same weights and the same cache, by its index.

The arithmetic is that of `EagleHead` and `EagleSession` with two more dimensions: heads, and rows of a batch, which advance
each at its own pace. `stack_weights.py` has the weights, `stack_session.py` the state of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from hedgespec.device import settle
from hedgespec.drafters.eagle import EagleHead
from hedgespec.drafters.stack_session import StackSession
from hedgespec.drafters.stack_weights import StackWeights
from hedgespec.runtime.capture import CudaGraphs, lend


class HeadStack(StackWeights):
    """N equal-shaped heads that run together.

    The heads are read and never changed. With N >= 2 the stack holds a copy of their weights, so that their memory is needed
    twice while both exist (`nbytes` is the stack's part). The weights of a single head are not copied.

    Args:
        heads: N >= 1 heads whose `kind_of` is the same.
    """

    def __init__(self, heads: Sequence[EagleHead]):
        super().__init__(heads)
        settle(self.frequency.device)  # requests on any stream may use the stack
        self._origin = self._origins()
        self._idle: list[CudaGraphs] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are the stack's own: 0 for a single head, or for a matrix that all heads share."""
        theirs = {one.untyped_storage().data_ptr() for head in self.heads for one in head.parameters()}
        return sum(one.nbytes for one in self.weights.values() if one.untyped_storage().data_ptr() not in theirs)

    def is_current(self) -> bool:
        """Returns whether the heads are as they were when stacked: not moved, not replaced, not written to.

        Writes through `.data` and to inference tensors are not noticed, because torch does not count them.
        """
        return self._origin == self._origins()

    def _origins(self) -> list[tuple[int, int]]:
        modules = *self.heads, self.heads[0].embedding
        tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)
        return [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors]

    def session(self, batch: int, window: int | None = None, *, captured: bool = False) -> StackSession:
        """Returns the state of a new batch, see `StackSession`; `captured` runs its passes as CUDA graphs, and is ignored on
        other devices."""
        session = StackSession(self, batch, window)
        if captured and self.frequency.device.type == "cuda":
            session.graphs = lend(self._idle, CudaGraphs, session)
        return session
