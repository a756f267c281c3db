"""The production decoder: `Decoder`, what it is asked (`request.py`), a request under way (`row.py`), what decides
who drafts in it (`selector.py`) and a round (`batch.py`).

With the default configuration every request emits what `hedgespec/algorithm.py` says, token for token and weight for weight.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hedgespec.config import DecodeConfig
from hedgespec.costs import Costs
from hedgespec.decoder.batch import Batch, PlainBatch, stack
from hedgespec.decoder.pool import stacks_of
from hedgespec.decoder.request import Request, Together, eos_of, generator, rows_of, states_of
from hedgespec.decoder.row import Row
from hedgespec.decoder.selector import RAREST, new_learner
from hedgespec.drafters import Drafter
from hedgespec.drafters.stack import HeadStack
from hedgespec.errors import VocabularyMismatchError
from hedgespec.learners import Learner
from hedgespec.metrics import DecodeStats
from hedgespec.plain_inputs import check_inputs, prepares_by_itself, reread_boundary
from hedgespec.positions import context_of, length_dependent, table_size
from hedgespec.sampling import Sampling
from hedgespec.self_check import may_be_ragged
from hedgespec.target import Captures, check_target, rows_may_differ
from hedgespec.wrappers import check_rows, unwrap

__all__ = [
    "RAREST",
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


_STACKING = threading.Lock()
"""One at a time makes heads lie in a stack anew; a decoder's own lock would keep it from being copied."""


@dataclass(frozen=True)
class DecodeOutput:
    """What `Decoder.generate` returns."""

    sequences: torch.Tensor
    """Prompts and continuations, int64 [B, L]; a row that ended before the longest is filled up on the right."""
    stats: list[DecodeStats]
    """Statistics of each row, [B]."""


class Decoder:
    """Speculative decoding of a target with a pool of drafters, one of which a learner picks for every round.

    A decoder is also what `model.generate(..., custom_generate=decoder)` takes; see `hedgespec/hf.py`.

    Args:
        target: a transformers decoder-only causal language model in eval mode; it is not modified.
        drafters: N >= 1 drafters (`hedgespec.drafters.Drafter`) over the target's tokens, with distinct names.
        config: a `DecodeConfig`; None is the default one.

    Raises:
        ValueError: no drafters, names that repeat, a prior of the wrong size, an unknown learner or one that does not go with
            the objective, a target that is an encoder-decoder or holds a recurrent state.
        VocabularyMismatchError: a drafter that can name tokens the target does not have, or whose logits are not its.

    With objective "throughput" `costs` is what its rounds were measured to cost, of all requests together.

    Output is the target's own distribution, whatever the drafters; at temperature 0 the target's own greedy text. A decoder
    holds no request: any number of threads may use one, and several may share a target.
    """

    def __init__(self, target, drafters: Sequence[Drafter], config: DecodeConfig | None = None):
        target = unwrap(target)
        check_target(target)
        self.target, self.drafters, self.config = target, tuple(drafters), config or DecodeConfig()
        if not self.drafters:
            raise ValueError("drafters: expected at least 1, got 0")
        names = tuple(drafter.name for drafter in self.drafters)
        if len(set(names)) < len(names):
            raise ValueError(f"drafters: expected distinct names, got {names}")
        vocabulary = target.config.get_text_config(decoder=True).vocab_size
        for drafter in self.drafters:
            if drafter.vocab_size > vocabulary or (drafter.draft_to_target is None and drafter.vocab_size < vocabulary):
                raise VocabularyMismatchError(
                    f"drafter {drafter.name}: expected the target's vocabulary of {vocabulary} tokens, or a map into it, "
                    f"got {drafter.vocab_size}"
                )
            mapping = drafter.draft_to_target
            if mapping is not None and len(mapping.unique()) < len(mapping):
                raise VocabularyMismatchError(
                    f"drafter {drafter.name}: expected draft_to_target of distinct ids, got some twice"
                )
        self.vocabulary, self._stacks = vocabulary, stacks_of(self.drafters)
        throughput = self.config.objective == "throughput"
        self.costs = Costs(len(self.drafters), self.config.draft_length) if throughput else None
        self.captures = Captures(self.config.most_drafted + 1) if self.config.compile else None
        check_inputs(target)
        self.reread_at, self.rereads_all = reread_boundary(target)
        """Number of tokens, padding included, at which the target drops its cache (None: it never does), and whether it then
        reads the whole text again."""
        self._may_be_ragged = may_be_ragged(target)
        self.table, self.follows_length = table_size(target), bool(length_dependent(target))
        """Positions in the target's table, if it has one, and whether its rotary factors follow the text's length."""
        if self.captures is not None:
            self.captures.together = self._may_be_ragged
        if self.config.tree is not None and not self.together:
            raise ValueError(
                "tree: expected a target that takes positions and a mask of its own for every row (attn_implementation sdpa or "
                f"eager, no layers that mask by slot), got {type(target).__name__} with "
                f"{target.config.get_text_config(decoder=True)._attn_implementation}"
            )
        self.new_learner()  # a wrong name, prior or option is refused here, not at the first request

    @property
    def together(self) -> bool:
        """Whether rows of different lengths are decoded in one forward, or one after another."""
        return self._may_be_ragged and rows_may_differ(self.target)

    @property
    def context(self) -> int | None:
        """Positions up to which the target may be asked about tokens that nobody has emitted yet; None: any."""
        return min((one for one in (context_of(self.target), self.table) if one is not None), default=None)

    def stacks(self) -> list[tuple[list[int], HeadStack]]:
        """The pool's equal-shaped heads, stacked: indices and weights. Made anew if a head has changed since."""
        with _STACKING:
            if not all(stack.is_current() for _, stack in self._stacks):
                self._stacks = []  # as long as a stack is alive, the heads lie in it
                self._stacks = stacks_of(self.drafters)
            return self._stacks

    def new_learner(self) -> Learner:
        """A learner as the configuration has it, at the start of a request."""
        return new_learner(self.config, len(self.drafters))

    def __call__(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, learner_state=None, **model_kwargs
    ):
        """The decoding loop of `model.generate(..., custom_generate=self)`, with what that call has prepared.

        `generate` does not pass a `streamer` to a custom loop; with one use `hedgespec.custom_generate`.
        """
        from hedgespec import hf  # which knows this module; only those who come this way need it

        return hf.decode(
            self, model, input_ids, logits_processor, stopping_criteria, generation_config, learner_state=learner_state,
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
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        learner_state: dict | Sequence[dict] | None = None,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> DecodeOutput:
        """Continues a batch of prompts. Every row is decoded as it would be alone, except by a target whose rotary factors
        follow the length of the batch's longest text ("longrope", "dynamic"): there as `generate` decodes it in this batch.

        Args:
            input_ids: the prompts, int64 [B, P] or [P], each row with at least one token.
            attention_mask: [B, P], 0 for the padding on the left of a row and 1 for its tokens; None: there is no padding.
            max_new_tokens: most tokens to emit for a row, >= 1.
            temperature, top_k, top_p, min_p: see `hedgespec.sampling.Sampling`; temperature 0 is greedy.
            seed: of the uniforms that select, draft and verify, and of the noise in mode "coupled"; None draws a fresh one.
            eos_token_id: ids that end the text; the one that did is its last token. None takes those of the target's
                generation config, an empty sequence takes none.
            pad_token_id: what fills up rows that end early; None takes that of the target's generation config, or else 0.
            learner_state: a `Learner.state_dict()` for all rows, or one for each, to go on from; None starts fresh.
            on_tokens: called with the row and its tokens, first with its first one, then after each round.

        Returns: a `DecodeOutput`.

        Raises:
            TypeError: input_ids of another dtype than int64.
            ValueError: an empty prompt, or an argument outside its range.
            ContextError: a text that goes past the target's table of positions, if it has one; a ValueError and an IndexError.
            TargetLogitsError: logits of the target from which no token can be taken; a RuntimeError.
        """
        prompts = rows_of(input_ids, attention_mask, self.target)
        eos = eos_of(self.target, eos_token_id)
        states = states_of(learner_state, len(prompts))
        requests = [
            Request(prompt, padding, max_new_tokens, generator(seed, row), eos, states[row])
            for row, (prompt, padding) in enumerate(prompts)
        ]
        context, longest = context_of(self.target), max(len(one.prompt) - one.padding for one in requests) + max_new_tokens
        if context is not None and longest > context and self.table is None:
            warnings.warn(
                f"max_new_tokens: the target was made for {context} positions, got a text of up to {longest} tokens",
                stacklevel=3,
            )
        rows = self.decode(requests, Sampling(temperature, top_k, top_p, min_p), on_tokens=on_tokens)
        if pad_token_id is None:
            pad_token_id = self.target.generation_config.pad_token_id or 0
        return DecodeOutput(stack([row.sequence for row in rows], pad_token_id), [row.stats for row in rows])

    def decode(self, requests: Sequence[Request], sampling: Sampling, *, past=None,
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
        """
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
    def _decode_together(batches: list[Batch], past, together: Together) -> list[Row]:
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
