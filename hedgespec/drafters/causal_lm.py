"""Any transformers causal language model over the target's tokens as a drafter."""

from __future__ import annotations

import torch

from hedgespec.cache import RaggedCache
from hedgespec.errors import VocabularyMismatchError
from hedgespec.linear import few_row_view


class CausalLMDrafter:
    """A small language model that shares the target's tokenizer.

    Args:
        model: a transformers causal LM in eval mode, on the target's device.
        target: the target. Only sizes are compared, and padding may differ; whether ids mean the same cannot be seen.
        name: shown in statistics.

    Raises: VocabularyMismatchError if the vocabularies differ by more than padding (a tenth) allows.
    """

    aux_layers = ()

    def __init__(self, model, target, name: str = "causal_lm"):
        own, wanted = model.config.vocab_size, target.config.vocab_size
        if abs(own - wanted) > wanted // 10:
            raise VocabularyMismatchError(f"drafter {name}: expected a vocabulary of {wanted} tokens, got {own}")
        self.model, self.name, self.vocab_size = few_row_view(model), name, min(own, wanted)
        same = own >= wanted
        self.draft_to_target = None if same else torch.arange(own, device=model.device)

    def session(self) -> CausalLMSession:
        return CausalLMSession(self)


class CausalLMSession:
    """One request's KV cache."""

    def __init__(self, drafter: CausalLMDrafter):
        self.drafter = drafter
        self.cache = RaggedCache(1)
        self.verified = 0

    def prefill(self, tokens: torch.Tensor, features: None, logits_to_keep: int) -> torch.Tensor:
        self.cache.lengths[0] = self.verified
        logits = self._forward(tokens, logits_to_keep)
        self.verified = self.cache.lengths[0]
        return logits

    def step(self, token: torch.Tensor) -> torch.Tensor:
        return self._forward(token, 1)[0]

    def _forward(self, tokens: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        out = self.drafter.model(tokens[None], past_key_values=self.cache, use_cache=True, logits_to_keep=logits_to_keep)
        self.cache.lengths[0] += tokens.shape[0]
        return out.logits[0, :, : self.drafter.vocab_size]
