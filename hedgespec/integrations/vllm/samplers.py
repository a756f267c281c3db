"""vLLM's samplers, which also keep the logits after vLLM's processors."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler


class RecordingSampler(Sampler):
    """Keeps the processed logits of the last position of every row, [B, V], in `kept_logits`; None if all are greedy."""

    kept_logits: torch.Tensor | None = None

    def apply_logits_processors(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, predict_bonus_token: bool
    ) -> torch.Tensor:
        logits = super().apply_logits_processors(logits, sampling_metadata, predict_bonus_token)
        self.kept_logits = None if sampling_metadata.all_greedy else logits.clone()  # vLLM changes them in place
        return logits


class RecordingRejectionSampler(RejectionSampler):
    """Keeps the processed logits of all drafted positions, [positions, V], in `kept_logits`; None if all are greedy."""

    kept_logits: torch.Tensor | None = None

    def apply_logits_processors(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, metadata: Any) -> torch.Tensor:
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        self.kept_logits = None if sampling_metadata.all_greedy else logits.clone()
        return logits
