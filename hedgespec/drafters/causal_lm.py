"""A causal language model of transformers as a drafter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hedgespec.errors import ContextError, VocabularyMismatchError
from hedgespec.ops.linear import few_row_view
from hedgespec.runtime.cache import RaggedCache
from hedgespec.runtime.compat import cache_argument
from hedgespec.runtime.positions import table_size
from hedgespec.runtime.wrappers import unwrap
from hedgespec.utils.scalars import text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPECIAL = ("bos_token_id", "eos_token_id", "unk_token_id")
"""Ids that drafter and target must agree on. Padding is never drafted."""


class CausalLMDrafter:
    """A small language model that shares the target's tokenizer.

    Args:
        model: a causal language model of transformers in eval mode, on the target's device. It is dropped from a request that
            exceeds its table of positions.
        target: the target.
        name: shown in statistics.
        tokenizer, target_tokenizer: the tokenizers of both models. If given, every id is compared; otherwise only the
            configurations: the sizes of the vocabularies, which may differ by padding (a tenth), and the ids of special tokens.

    Raises:
        ValueError: one tokenizer without the other.
        VocabularyMismatchError: an id means different tokens; the message names the first one.
    """

    aux_layers: tuple[int, ...] = ()

    def __init__(
        self,
        model: PreTrainedModel,
        target: PreTrainedModel,
        name: str = "causal_lm",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        model, target = unwrap(model, "model"), unwrap(target)
        wanted = target.config.get_text_config(decoder=True).vocab_size
        usable = usable_vocabulary(model, wanted, name, tokenizer=tokenizer, target_tokenizer=target_tokenizer)
        if tokenizer is None:
            _check_special(model.config, target.config, name)
        self.model: PreTrainedModel = few_row_view(model)
        self.name, self.vocab_size = text("name", name), usable
        self.table = table_size(model)
        """Number of positions in the model's table; None if it has no table."""
        self.draft_to_target = None if usable == wanted else torch.arange(usable, device=model.device)

    def session(self) -> CausalLMSession:
        return CausalLMSession(self)


class CausalLMSession:
    """The state of one request: its key-value cache."""

    def __init__(self, drafter: CausalLMDrafter):
        self.drafter = drafter
        self.cache = RaggedCache(1)
        self._with_cache: dict[Any, Any] = {cache_argument(drafter.model.forward): self.cache, "use_cache": True}
        self.verified = 0

    def consume(self, tokens: torch.Tensor, features: torch.Tensor | None, logits_to_keep: int) -> torch.Tensor:
        self.cache.lengths[0] = self.verified
        logits = self._forward(tokens, logits_to_keep)
        self.verified = self.cache.lengths[0]
        return logits

    def step(self, token: torch.Tensor) -> torch.Tensor:
        return self._forward(token, 1)[0]

    def _forward(self, tokens: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        table = self.drafter.table
        if table is not None and (end := self.cache.lengths[0] + len(tokens)) > table:
            raise ContextError(f"drafter {self.drafter.name}: expected a text of at most {table} tokens, got {end}")
        out = self.drafter.model(tokens[None], **self._with_cache, logits_to_keep=logits_to_keep)
        self.cache.lengths[0] += tokens.shape[0]
        return out.logits[0, :, : self.drafter.vocab_size]


def usable_vocabulary(
    model: PreTrainedModel,
    wanted: int,
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    target_tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """Returns the number of ids that a causal language model shares with a target: ids 0 to this number minus 1.

    Args:
        model: the drafter.
        wanted: size of the target's vocabulary.
        name: name of the drafter, for errors.
        tokenizer, target_tokenizer: if given, every id is compared; otherwise only the sizes, which may differ by a tenth.

    Raises:
        ValueError: one tokenizer without the other.
        VocabularyMismatchError: an id means different tokens.
    """
    if (tokenizer is None) != (target_tokenizer is None):
        raise ValueError("tokenizer: expected both tokenizers or neither, got one")
    own = model.config.get_text_config(decoder=True).vocab_size
    if tokenizer is not None:
        check_same_tokens(tokenizer, target_tokenizer, name)
    elif abs(own - wanted) > wanted // 10:
        raise VocabularyMismatchError(f"drafter {name}: expected a vocabulary of {wanted} tokens, got {own}")
    return min(own, wanted)


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises VocabularyMismatchError, with the drafter's name and the first difference, unless two tokenizers have the same
    ids.
    """
    own, wanted = ({id: token for token, id in one.get_vocab().items()} for one in (tokenizer, target_tokenizer))
    for id in sorted(own.keys() | wanted.keys()):
        if own.get(id) != wanted.get(id):
            raise VocabularyMismatchError(
                f"drafter {name}: expected the target's tokenizer, got another: id {id} is {own.get(id)!r} to the drafter "
                f"and {wanted.get(id)!r} to the target"
            )
    _check_special(tokenizer, target_tokenizer, name)


def _check_special(own: object, wanted: object, name: str) -> None:
    """Compares the special ids of two tokenizers or configurations; an id that one of them lacks is skipped."""
    for special in SPECIAL:
        ours, theirs = getattr(own, special, None), getattr(wanted, special, None)
        if ours is not None and theirs is not None and ours != theirs:
            raise VocabularyMismatchError(f"drafter {name}: expected {special} {theirs}, the target's, got {ours}")
