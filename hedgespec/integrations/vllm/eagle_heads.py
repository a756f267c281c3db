"""vLLM's EAGLE proposer with several heads: loading them, and their forward passes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.utils import get_draft_load_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.eagle import EagleProposer

from hedgespec.errors import PoolError
from hedgespec.integrations.vllm.eagle_config import Head, layers_of, same_folder, speculative_with, width_of
from hedgespec.integrations.vllm.pool_config import Pool
from hedgespec.integrations.vllm.token_proposer import check_sampling


class HeadsProposer(EagleProposer):
    """vLLM's proposer, with all heads of a pool resident.

    Args:
        pool: the pool, whose drafters are heads; one of them is the model of vLLM's own configuration.

    Raises: PoolError for heads that cannot be loaded side by side.
    """

    model: Any
    _draft_attn_layer_names: set[str]

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any, pool: Pool) -> None:
        spec = vllm_config.speculative_config
        folders = [entry.options["model"] for entry in pool.drafters]
        chosen = [place for place, folder in enumerate(folders) if same_folder(folder, spec.model)]
        if not chosen:
            raise PoolError(f"{pool.source}: drafters: expected speculative_config's model {spec.model} among them, got none")
        self.pool = pool
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self.heads = [Head(entry.name, speculative_with(spec, entry.options["model"])) for entry in pool.drafters]
        self.first = self.heads[chosen[0]]
        """The head in vLLM's own configuration; it determines which layers of the target are read."""
        self._loading: Head = self.first
        self._check_heads()

    def _check_heads(self) -> None:
        for what, of in (("hidden size", width_of), ("layers of the target", layers_of)):
            expected = of(self.first.speculative.draft_model_config)
            for head in self.heads:
                if (got := of(head.speculative.draft_model_config)) != expected:
                    of_first = f"the {what} {expected} of {self.first.name}"
                    raise PoolError(f"{self.pool.source}: drafter {head.name}: expected {of_first}, got {got}")

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Loads all heads. A head without an embedding or output matrix shares the target's."""
        layers: set[str] = set()
        for head in self.heads:
            self._loading = head
            super().load_model(target_model)  # calls `_get_model`
            head.model = self.model
            layers |= self._draft_attn_layer_names
        self.model, self._draft_attn_layer_names = self.first.model, layers
        context = self.vllm_config.compilation_config.static_forward_context
        specs = {name: context[name].get_kv_cache_spec(self.vllm_config) for name in sorted(layers)}
        if len(set(specs.values())) > 1:
            raise PoolError(f"{self.pool.source}: drafters: expected heads whose keys and values have one shape, got {specs}")
        check_sampling(self.device)

    def _get_model(self) -> torch.nn.Module:
        head = self._loading
        index = self.heads.index(head)
        config = copy.copy(self._create_draft_vllm_config())
        config.speculative_config = head.speculative
        with set_model_tag(f"eagle_head_{index}"):  # vLLM keys compiled graphs, which name their layers, by it
            return get_model(
                vllm_config=config, model_config=head.speculative.draft_model_config, prefix=f"drafter{index}",
                load_config=get_draft_load_config(config),
            )  # fmt: skip

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """Runs all heads one after another, for memory profiling and the capture of CUDA graphs."""
        for head in self.heads:
            self.model = head.model
            super().dummy_run(*args, **kwargs)
        self.model = self.first.model

    def _forward(
        self, head: Head, size: int, layers: Any, mode: Any, across: Any, slots: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs a head over the proposer's input buffers. Returns its output and features, [size, H] each."""
        with set_forward_context(
            layers, self.vllm_config, num_tokens=size, num_tokens_across_dp=across, cudagraph_runtime_mode=mode,
            slot_mapping=slots,
        ):  # fmt: skip
            return head.model(
                input_ids=self.input_ids[:size], positions=self._get_positions(size), inputs_embeds=None,
                hidden_states=self.hidden_states[:size],
            )  # fmt: skip

    def _argmax_tokens(self, head: Head, output: torch.Tensor) -> torch.Tensor:
        """Returns the argmax of a head's output, in the target's ids, int64 [rows]."""
        if self.use_local_argmax_reduction:
            return head.model.get_top_tokens(output).long()
        return head.model.compute_logits(output).argmax(-1)

    def _metadata_of_rows(self, metadata: Any, rows: ArrayLike) -> CommonAttentionMetadata:
        """Returns the attention metadata of some rows of a step, each with one token."""
        host_rows, device_rows = torch.as_tensor(np.asarray(rows, dtype=np.int64)), self._on_device(rows)
        count = len(host_rows)
        bound, local = metadata.seq_lens_cpu_upper_bound, metadata.dcp_local_seq_lens
        return CommonAttentionMetadata(
            query_start_loc=self.arange[: count + 1],
            query_start_loc_cpu=torch.arange(count + 1, dtype=torch.int32),
            seq_lens=metadata.seq_lens[device_rows],
            seq_lens_cpu_upper_bound=None if bound is None else bound[host_rows],
            num_reqs=count,
            num_actual_tokens=count,
            max_query_len=1,
            max_seq_len=metadata.max_seq_len,
            block_table_tensor=metadata.block_table_tensor[device_rows],
            slot_mapping=self._slot_mapping_buffer[:count],
            causal=True,
            dcp_local_seq_lens=None if local is None else local[device_rows],
        )

    def _on_device(self, numbers: ArrayLike) -> torch.Tensor:
        return torch.as_tensor(np.asarray(numbers, dtype=np.int64)).to(self.device, non_blocking=True)
