"""Any transformers causal language model over the target's tokens as a drafter."""

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
"""Ids that both must agree on; padding is never drafted from."""


class CausalLMDrafter:
    """A small language model that shares the target's tokenizer.

    Args:
        model: a transformers causal LM in eval mode, on the target's device. Where its table of positions ends it leaves the
            request.
        target: the target.
        name: shown in statistics.
        tokenizer, target_tokenizer: the two models' transformers tokenizers. With both, every id is compared; without
            them only what the models' configurations tell: the sizes of the vocabularies, which may differ by padding (a
            tenth), and the ids of special tokens.

    Raises:
        ValueError: one tokenizer without the other.
        VocabularyMismatchError: ids that do not mean the same; the first difference is named.
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
        """Positions in the model's table; None: it has none."""
        self.draft_to_target = None if usable == wanted else torch.arange(usable, device=model.device)

    def session(self) -> CausalLMSession:
        return CausalLMSession(self)


class CausalLMSession:
    """One request's KV cache."""

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
    """How many ids a transformers causal LM and a target share, which are the first ones.

    Args:
        model: the drafter.
        wanted: size of the target's vocabulary.
        name: the drafter's, for errors.
        tokenizer, target_tokenizer: with both, every id is compared, else only the sizes, which may differ by a tenth.

    Raises:
        ValueError: one tokenizer without the other.
        VocabularyMismatchError: ids that do not mean the same.
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
    """Whether two transformers tokenizers give the same ids the same meaning.

    Raises: VocabularyMismatchError that names the drafter `name` and the first difference.
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
    """Special ids of two tokenizers or two configurations; one that either does not tell is passed over."""
    for special in SPECIAL:
        ours, theirs = getattr(own, special, None), getattr(wanted, special, None)
        if ours is not None and theirs is not None and ours != theirs:
            raise VocabularyMismatchError(f"drafter {name}: expected {special} {theirs}, the target's, got {ours}")
