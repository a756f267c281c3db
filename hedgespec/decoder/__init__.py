"""The production decoder: `Decoder`, a request (`request.py`), a request while it is decoded (`row.py`), the choice of its
drafter (`selector.py`), and a round (`batch.py`).

With `DecodeConfig(evaluate_every=1, warm_start=0)` every request emits the tokens of `hedgespec/algorithm.py`, which states the
method in plain torch, and its learner has the same weights after every round. The defaults, `evaluate_every="adaptive"` and
`warm_start=32`, score the drafters less often and let the learner begin on the prompt; then drafters may be chosen otherwise,
while the emitted tokens keep the target's distribution.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hedgespec.config import DecodeConfig
from hedgespec.decoder.batch import Batch
from hedgespec.decoder.groups import stacks_of
from hedgespec.decoder.plain import PlainBatch
from hedgespec.decoder.request import (
    Request,
    eos_of,
    generator,
    padding_of,
    rows_of,
    states_of,
    vocabulary_of,
)
from hedgespec.decoder.row import Row
from hedgespec.decoder.together import Together
from hedgespec.device import stack
from hedgespec.drafters import Drafter
from hedgespec.drafters.stack import HeadStack
from hedgespec.errors import VocabularyMismatchError
from hedgespec.learners import Learner
from hedgespec.ops.sampling import Sampling
from hedgespec.runtime.native_forward import NativeForwards
from hedgespec.runtime.plain_inputs import check_inputs, prepares_by_itself, reread_boundary
from hedgespec.runtime.positions import context_of, length_dependent, table_size
from hedgespec.runtime.self_check import may_be_ragged
from hedgespec.runtime.target import Captures, check_target, device_of, rows_may_differ
from hedgespec.runtime.wrappers import check_rows, unwrap
from hedgespec.selection.costs import Costs
from hedgespec.selection.selector import new_learner
from hedgespec.stats import DecodeStats
from hedgespec.utils.scalars import integer, shown, text

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

__all__ = [
    "DecodeOutput",
    "Decoder",
    "Request",
    "Row",
    "Together",
    "eos_of",
    "generator",
    "rows_of",
    "stack",
    "states_of",
]


@dataclass(frozen=True)
class DecodeOutput:
    """What `Decoder.generate` returns."""

    sequences: torch.Tensor
    """Prompts and continuations, int64 [B, L]; a row that ended before the longest is filled up on the right."""
    stats: list[DecodeStats]
    """Statistics of each row, [B]."""


class Decoder:
    """Speculative decoding of a target with a pool of drafters, one of which a learner picks for every round.

    A decoder is also what `model.generate(..., custom_generate=decoder)` takes; see `hedgespec/integrations/transformers/`.

    Args:
        target: a transformers decoder-only causal language model in eval mode; it is not modified.
        drafters: N >= 1 drafters (`hedgespec.drafters.Drafter`) over the target's tokens, with distinct names. They are not
            modified. EAGLE heads of equal shape are run together on a copy of their weights, so that two such heads or more
            take their memory twice; each decoder has a copy of its own. A head that is written to, moved or given other
            weights is copied again before the next request, unless it is written to by way of `.data`, which torch does not
            report: make a new decoder then.
        config: a `DecodeConfig`; None is the default one.

    Raises:
        TypeError: config is no `DecodeConfig`, or an attribute of a drafter has another type than `Drafter` says.
        ValueError: no drafters, names that repeat, a drafter that reads layers which the target does not have, a prior of the
            wrong size, an unknown learner or one that does not go with the objective, a target that is an encoder-decoder or
            holds a recurrent state.
        VocabularyMismatchError: a drafter that can name tokens the target does not have, or whose logits are not its.

    With objective "throughput" `costs` is what its rounds were measured to cost, of all requests together.

    Output is the target's own distribution, whatever the drafters; at temperature 0 the target's own greedy text. A decoder
    holds no request: any number of threads may use one, and several may share a target.
    """

    def __init__(self, target: nn.Module, drafters: Sequence[Drafter], config: DecodeConfig | None = None):
        model: PreTrainedModel = unwrap(target)
        check_target(model)
        if config is not None and not isinstance(config, DecodeConfig):
            raise TypeError(f"config: expected a DecodeConfig or None, got {shown(config)}")
        if isinstance(drafters, (str, bytes)) or not isinstance(drafters, Iterable):
            raise TypeError(f"drafters: expected a sequence of drafters, got {shown(drafters)}")
        self.target, self.drafters, self.config = model, tuple(drafters), config or DecodeConfig()
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.vocabulary = vocabulary_of(model)
        for place, drafter in enumerate(self.drafters):
            check_drafter(drafter, place, self.vocabulary, layers)
        names = tuple(drafter.name for drafter in self.drafters)
        if len(set(names)) < len(names):
            raise ValueError(f"drafters: expected distinct names, got {names}")
        self._lock = threading.Lock()
        """Threads take turns with `_stacks`."""
        self._stacks: list[tuple[list[int], HeadStack]] | None = stacks_of(self.drafters)
        throughput = self.config.objective == "throughput"
        self.costs = Costs(len(self.drafters), self.config.draft_length) if throughput and self.drafters else None
        self.captures = Captures(self.config.max_drafted + 1) if self.config.compile else None
        self.native = NativeForwards(model)
        check_inputs(model)
        self.reread_at, self.rereads_all = reread_boundary(model)
        """Number of tokens, padding included, at which the target drops its cache (None: it never does), and whether it then
        reads the whole text again."""
        self._may_be_ragged = may_be_ragged(model)
        self.table, self.follows_length = table_size(model), bool(length_dependent(model))
        """Positions in the target's table, if it has one, and whether its rotary factors follow the text's length."""
        if self.captures is not None:
            self.captures.together = self._may_be_ragged
        if self.config.tree is not None and not self.together:
            raise ValueError(
                "tree: expected a target that takes positions and a mask of its own for every row (attn_implementation sdpa or "
                f"eager, no layers that mask by slot), got {type(model).__name__} with "
                f"{model.config.get_text_config(decoder=True)._attn_implementation}"
            )
        self.overlaps = device_of(model).type != "cpu"
        """Whether the drafters are scored beside the next round. The learner then receives the losses one round later, which
        its delay queue allows. A CPU gains nothing by it."""
        self.new_learner()  # an unknown learner is refused here, not at the first request

    def __getstate__(self) -> dict[str, Any]:
        """What a copy, deep or pickled, is made of: it stacks its own heads, and has a lock of its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_stacks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock, self._stacks = threading.Lock(), None

    @property
    def together(self) -> bool:
        """Whether rows of different lengths are decoded in one forward, or one after another."""
        return self._may_be_ragged and rows_may_differ(self.target)

    @property
    def context(self) -> int | None:
        """Positions up to which the target may be asked about tokens that nobody has emitted yet; None: any."""
        return min((one for one in (context_of(self.target), self.table) if one is not None), default=None)

    def stacks(self) -> list[tuple[list[int], HeadStack]]:
        """Returns the pool's heads by kind: their indices and their weights, copied anew if a head has changed."""
        with self._lock:
            if self._stacks is None or not all(stack.is_current() for _, stack in self._stacks):
                self._stacks = None  # frees the old copy before the new one is made
                self._stacks = stacks_of(self.drafters)
            return self._stacks

    def new_learner(self) -> Learner:
        """Returns a fresh learner for one request."""
        return new_learner(self.config, len(self.drafters))

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        learner_state: dict | Sequence[dict] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop of `model.generate(..., custom_generate=self)`, with what that call has prepared.

        `generate` does not pass a `streamer` to a custom loop; with one use `hedgespec.custom_generate`.
        """
        import hedgespec  # its public function knows this class, and is loaded by those who come this way alone

        return hedgespec.custom_generate(self)(
            model, input_ids, logits_processor, stopping_criteria, generation_config, learner_state=learner_state,
            **model_kwargs,
        )  # fmt: skip

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | torch.Tensor | None = None,
        pad_token_id: int | None = None,
        learner_state: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> DecodeOutput:
        """Continues a batch of prompts. Every row is decoded as it would be alone, except by a target whose rotary factors
        follow the length of the batch's longest text ("longrope", "dynamic"): there as `generate` decodes it in this batch.

        Args:
            input_ids: the prompts, int64 (or int32) [B, P] or [P], each row with at least one token.
            attention_mask: [B, P], 0 for the padding on the left of a row and 1 for its tokens; None: there is no padding.
            max_new_tokens: most tokens to emit for a row, >= 1.
            temperature, top_k, top_p, min_p: see `hedgespec.ops.sampling.Sampling`; temperature 0 is greedy.
            seed: of the uniforms that select, draft and verify, and of the noise in mode "coupled"; None draws a fresh one.
            eos_token_id: ids that end the text, one, a sequence or a tensor [n]; the one that did is its last token. None
                takes those of the target's generation config, an empty sequence takes none.
            pad_token_id: what fills up rows that end early; None takes that of the target's generation config, or else 0.
            learner_state: a `Learner.state_dict()` for all rows, or one for each, to go on from; None starts fresh.
            on_tokens: called with the row and its tokens, first with its first one, then after each round.

        Numbers may be Python's, NumPy's, or tensors with one element.

        Returns: a `DecodeOutput`.

        Raises:
            TypeError: an argument of another type, input_ids of another dtype.
            ValueError: an empty prompt, or an argument outside its range.
            ContextError: a text that goes past the target's table of positions, if it has one; a ValueError and an IndexError.
            TargetLogitsError: logits of the target from which no token can be taken; a RuntimeError.
            VocabularyMismatchError: the target's vocabulary was resized after the decoder was made.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p)
        if on_tokens is not None and not callable(on_tokens):
            raise TypeError(f"on_tokens: expected a function or None, got {shown(on_tokens)}")
        padding_id = padding_of(self.target, pad_token_id)
        prompts = rows_of(input_ids, attention_mask, self.target)
        eos = eos_of(self.target, eos_token_id)
        states = states_of(learner_state, len(prompts))
        requests = [
            Request(prompt, padding, max_new_tokens, generator(seed, row), eos, states[row])
            for row, (prompt, padding) in enumerate(prompts)
        ]
        context, longest = (
            context_of(self.target),
            max(len(one.prompt) - one.padding for one in requests) + requests[0].max_new_tokens,
        )
        if context is not None and longest > context and self.table is None:
            warnings.warn(
                f"max_new_tokens: the target was made for {context} positions, got a text of up to {longest} tokens",
                stacklevel=3,
            )
        rows = self.decode(requests, sampling, on_tokens=on_tokens)
        return DecodeOutput(stack([row.sequence for row in rows], padding_id), [row.stats for row in rows])

    def decode(self, requests: Sequence[Request], sampling: Sampling, *, past: DynamicCache | None = None,
               on_tokens: Callable[[int, list[int]], None] | None = None,
               together: Together | None = None) -> list[Row]:  # fmt: skip
        """Decodes requests and returns their rows, finished, in order; the caller disables gradients.

        They are decoded together, or one after another where the target cannot take rows of different lengths.

        Args:
            requests: B >= 1, checked.
            sampling: of all rows.
            past: a transformers `DynamicCache` of the requests' padded prompts, or of their beginnings.
            on_tokens: as in `generate`; None beside `together`, which may take tokens back.
            together: callbacks that see all rows at once. With `processes` the target must take rows of different lengths.

        Raises: VocabularyMismatchError if the target's vocabulary was resized after the decoder was made.
        """
        if (vocabulary := vocabulary_of(self.target)) != self.vocabulary:
            raise VocabularyMismatchError(
                f"target: expected the vocabulary of {self.vocabulary} tokens that it had when the decoder was made, got "
                f"{vocabulary}: after resize_token_embeddings, make the drafters and the decoder anew"
            )
        takes_positions = "position_ids" in inspect.signature(self.target.forward).parameters
        if self.table is not None and not takes_positions and any(request.padding for request in requests):
            raise ValueError(
                f"attention_mask: expected no padding for {type(self.target).__name__}, which takes no positions and counts "
                "padding as tokens"
            )
        check_rows(self.target, len(requests))
        for request in requests:
            request.check_context(self.table, together is not None)
        size = len(requests) if len(requests) > 1 and self.together else 1
        warned: set[str] = set()
        plain = PlainBatch.of(requests, prepares_by_itself(self.target))
        batches = (
            Batch(self, requests[first : first + size], first, sampling, on_tokens, warned, plain, together)
            for first in range(0, len(requests), size)
        )
        if together is not None:
            return self._decode_together(list(batches), past, together)
        rows: list[Row] = []
        for batch in batches:
            rows += batch.all_rows
            batch.begin(past)
            while batch.rows:
                batch.round()
        return rows

    @staticmethod
    def _decode_together(batches: list[Batch], past: DynamicCache | None, together: Together) -> list[Row]:
        """Decodes rows that end together: where they are in batches of their own, the shortest one takes the next round."""
        rows = [row for batch in batches for row in batch.all_rows]
        for batch in batches:
            batch.begin(past)
        while True:
            together.stop(rows)
            for batch in batches:
                batch.dismiss()
            under_way = [batch for batch in batches if batch.rows]
            if not under_way:
                return rows
            min(under_way, key=lambda batch: min(row.emitted for row in batch.rows)).round()


def check_drafter(drafter: Drafter, place: int, vocabulary: int, layers: int) -> None:
    """Checks what a drafter says of itself against a target; errors begin with its name.

    Args:
        drafter: to check.
        place: its index in the pool, for one without a name.
        vocabulary: V, the target's.
        layers: the target's number of layers.

    Raises:
        TypeError: a name, vocab_size, draft_to_target or aux_layers that is missing or of another type.
        ValueError: aux_layers outside 0..layers.
        VocabularyMismatchError: ids that are not the target's, ids twice, or logits that are not the target's without a map.
    """
    for name in ("name", "vocab_size", "draft_to_target", "aux_layers", "session"):
        if not hasattr(drafter, name):
            raise TypeError(f"drafters: expected drafters with the attribute {name}, got {type(drafter).__name__} at {place}")
    title = f"drafter {text(f'drafters[{place}].name', drafter.name)}"
    size, mapping = integer(f"{title}: vocab_size", drafter.vocab_size, 1), drafter.draft_to_target
    resized = "; after the target's resize_token_embeddings, make the drafter anew for it"
    if mapping is not None:
        if not isinstance(mapping, torch.Tensor) or mapping.dtype != torch.int64 or mapping.ndim != 1:
            raise TypeError(f"{title}: draft_to_target: expected an int64 tensor [Vd] or None, got {shown(mapping)}")
        if not len(mapping):
            raise VocabularyMismatchError(f"{title}: draft_to_target: expected at least one id, got none")
    if size > vocabulary or (mapping is None and size < vocabulary):
        raise VocabularyMismatchError(
            f"{title}: expected the target's vocabulary of {vocabulary} tokens, or a map into it, got {size}{resized}"
        )
    if mapping is not None:
        low, high = (int(bound) for bound in mapping.aminmax())
        if low < 0 or high >= vocabulary:
            raise VocabularyMismatchError(
                f"{title}: draft_to_target: expected ids in 0..{vocabulary - 1}, got {low if low < 0 else high}{resized}"
            )
        if len(mapping.unique()) < len(mapping):
            raise VocabularyMismatchError(f"{title}: expected draft_to_target of distinct ids, got some twice")
    if not isinstance(drafter.aux_layers, Sequence) or isinstance(drafter.aux_layers, str):
        raise TypeError(f"{title}: aux_layers: expected a tuple of layers, got {shown(drafter.aux_layers)}")
    for layer in drafter.aux_layers:
        integer(f"{title}: aux_layers", layer, 0, layers)
