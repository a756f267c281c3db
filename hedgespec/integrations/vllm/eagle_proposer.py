"""Several EAGLE-3 heads in vLLM: all of them consume all verified tokens, and for each request the best one drafts.

    HEDGESPEC_POOL=pool.json vllm serve MODEL --worker-cls hedgespec.integrations.vllm.eagle_proposer.Worker \\
        --speculative-config '{"method": "eagle3", "model": HEAD, "num_speculative_tokens": 5,
          "disable_padded_drafter_batch": true}'

The pool's drafters are of type "eagle3", each with the `model` folder of a head; HEAD is one of them. vLLM is not patched. The
worker is a subclass of the platform's. Before weights are loaded, it gives its model runner subclasses of vLLM's proposer and
samplers. vLLM's own code loads the heads, allocates their layers in its key-value cache, and verifies the drafts.

A step waits for the device twice: one copy brings the heads' proposals to the host, where the learners choose, and one brings
the drafts. With `disable_padded_drafter_batch` vLLM has the step's tokens on the host already, and does not use async
scheduling.

Sizes: B rows of a step, A of them with new tokens, T such tokens, N heads, H their width, V the target's vocabulary, K tokens
of a draft.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hedgespec.errors import EngineError, PoolError
from hedgespec.integrations.vllm.eagle_steps import HeadResult, Reading, Step
from hedgespec.integrations.vllm.head_pool import HeadLearning
from hedgespec.integrations.vllm.pool_config import read_pool
from hedgespec.integrations.vllm.reporter import Reporter
from hedgespec.integrations.vllm.request_learner import EngineClock
from hedgespec.integrations.vllm.token_proposer import TESTED, check_version
from hedgespec.integrations.vllm.worker import PlatformWorker
from hedgespec.ops.evaluate import evaluate
from hedgespec.selection.costs import Costs

check_version((TESTED,), "hedgespec.integrations.vllm.eagle_proposer.Worker")

from vllm.config import VllmConfig  # noqa: E402  after the check of the version
from vllm.distributed.parallel_state import get_tp_group  # noqa: E402
from vllm.logger import init_logger  # noqa: E402
from vllm.v1.sample.metadata import SamplingMetadata  # noqa: E402
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p  # noqa: E402
from vllm.v1.sample.sampler import _SAMPLING_EPS  # noqa: E402
from vllm.v1.spec_decode.eagle import EagleProposer  # noqa: E402

from hedgespec.integrations.vllm.eagle_config import check_config  # noqa: E402
from hedgespec.integrations.vllm.eagle_heads import HeadsProposer  # noqa: E402
from hedgespec.integrations.vllm.samplers import RecordingRejectionSampler, RecordingSampler  # noqa: E402

MOST_WARM = 512
"""Most positions of the warm start in one step. Their logits [V] are held for the target and one head at a time."""

logger = init_logger("vllm.hedgespec")


class Worker(PlatformWorker):
    """The platform's worker; its model runner has a `HedgeSpecEagleProposer`."""

    model_runner: Any

    def init_device(self) -> None:
        check_config(self.vllm_config)
        super().init_device()
        runner = self.model_runner
        if not isinstance(getattr(runner, "drafter", None), EagleProposer):
            raise EngineError(f"speculative_config: expected one that vLLM's EagleProposer drafts for, got {runner.drafter!r}")
        runner.drafter = HedgeSpecEagleProposer(self.vllm_config, self.device, runner)
        runner.drafter.listen()

    def execute_model(self, scheduler_output: Any) -> Any:
        # Also called after the last request has ended, without tokens.
        self.model_runner.drafter.learning.forget(scheduler_output.finished_req_ids)
        return super().execute_model(scheduler_output)

    def hedgespec_report(self) -> dict:
        """Returns the sums over all requests (`Tally`), for `LLM.collective_rpc("hedgespec_report")`."""
        return self.model_runner.drafter.report()


class HedgeSpecEagleProposer(HeadsProposer):
    """vLLM's proposer for a pool of heads.

    In a step each head consumes the new verified tokens, shifted by one, with the target's hidden states. This writes its keys
    and values and gives its argmax token after each of them. The proposals for tokens that the target has emitted are scored.
    From the proposals for the next tokens the chosen heads continue to draft, each for its own rows.

    Prefix caching: the layers of all heads are in one group of the key-value cache, so a block holds the keys and values of all
    heads, and every head has consumed a prefix that is found in the cache. A head reads a token together with the next one, so
    the last token of a block depends on the next block. For this reason vLLM does not use the last cached block with EAGLE. A
    head that fails is dropped from all requests, because blocks lack its keys and values from then on.

    Steps without a draft: vLLM does not call the proposer in a step in which a row is within K tokens of the end of the
    context. The heads then miss tokens of all rows, as vLLM's own head does. The round is not counted, and the missing keys
    are undefined.

    Tensor parallelism: embeddings, output matrices and attention are divided among ranks, so all ranks must run the same heads
    on the same rows. Choices depend on the scores and on generators with the same seed. All ranks use the scores of the first
    one, because rounding may differ between ranks.

    Raises: PoolError for a pool that cannot be read, or heads that cannot be loaded together.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any) -> None:
        spec = vllm_config.speculative_config
        pool = read_pool(spec.num_speculative_tokens, ("eagle3",), seed=vllm_config.model_config.seed or 0)
        objective, ranks = pool.decode.objective, vllm_config.parallel_config.tensor_parallel_size
        if objective != "tokens" and ranks > 1:  # every rank has its own clock, so picks would differ
            raise PoolError(f"{pool.source}: objective: expected tokens with tensor_parallel_size {ranks}, got {objective}")
        super().__init__(vllm_config, device, runner, pool)
        self.learning = HeadLearning(self.pool.names, self.pool.decode, self.pool.seed, logger.warning)
        self._clock: EngineClock | None = None
        """Measures rounds. The passes of all heads over verified tokens count as verification, because they always run."""
        if objective == "throughput":
            self._clock = EngineClock(Costs(len(self.heads), spec.num_speculative_tokens))
        # Set and used by the methods that vLLM calls during a step; None between steps.
        self._step: Any = None
        self._target_hidden: Any = None
        self._sampler: Any = None
        self._rejection_sampler: Any = None
        self._reporter: Reporter | None = None
        """Only on the first rank: all ranks have the same figures."""
        if get_tp_group().rank_in_group == 0:
            self._reporter = Reporter(self.learning.tally, pool.log_every, logger)

    def listen(self) -> None:
        """Replaces the runner's samplers, and keeps the hidden states that it passes to `propose_draft_token_ids`."""
        runner = self.runner
        self._sampler = RecordingSampler(runner.sampler.logprobs_mode, runner.sampler.use_fp64_gumbel)
        self._rejection_sampler = RecordingRejectionSampler(self._sampler, self.speculative_config, self.device)
        runner.sampler, runner.rejection_sampler = self._sampler, self._rejection_sampler
        propose = runner.propose_draft_token_ids

        def with_hidden_states(
            scheduler_output: Any, sampled_token_ids: Any, sampling_metadata: Any, hidden_states: torch.Tensor, *rest: Any
        ) -> Any:
            self._target_hidden = hidden_states
            try:
                return propose(scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, *rest)
            finally:
                self._target_hidden = self._step = None

        runner.propose_draft_token_ids = with_hidden_states

    # vLLM calls these in a step: `prepare_next_token_ids_cpu`, `prepare_inputs` if anything was drafted, `propose`.

    def prepare_next_token_ids_cpu(
        self, sampled_token_ids: Any, requests: Any, gpu_input_batch: Any, num_scheduled_tokens: Any
    ) -> Any:
        names = list(gpu_input_batch.req_ids[: len(sampled_token_ids)])
        lengths = [requests[name].num_tokens for name in names]
        self._step = Step(names, sampled_token_ids, lengths, [0] * len(names))
        return super().prepare_next_token_ids_cpu(sampled_token_ids, requests, gpu_input_batch, num_scheduled_tokens)

    def prepare_inputs(self, common_attn_metadata: Any, sampled_token_ids: Any, num_draft_tokens: Any) -> Any:
        metadata, rows = super().prepare_inputs(common_attn_metadata, sampled_token_ids, num_draft_tokens)
        self._step.drafted, self._step.rows = list(num_draft_tokens), rows
        return metadata, rows

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: Any,
        common_attn_metadata: Any,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: Any = None,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Called by vLLM. Returns the draft of each row, 0..K tokens."""
        self.num_speculative_tokens = num_speculative_tokens
        step, metadata = self._step, common_attn_metadata
        ends = metadata.query_start_loc_cpu.tolist()
        active = [row for row, new in enumerate(step.emitted) if new]
        reading = self._read(
            target_token_ids, target_positions, target_hidden_states, next_token_ids, metadata, step, ends, active
        )
        self._learn(step, active, reading, sampling_metadata)
        drafts = self._draft(step, active, reading, metadata)
        if self._reporter is not None:
            self._reporter.update()
        return drafts

    def _read(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        metadata: Any,
        step: Step,
        ends: list[int],
        active: Sequence[int],
    ) -> Reading:
        """Runs all heads over the step's verified tokens."""
        counts = [len(step.emitted[row]) for row in active]
        wanted = [place for row, count in zip(active, counts) for place in range(ends[row + 1] - count, ends[row + 1])]
        reading = Reading(np.cumsum([0, *counts]), self._warm_rows(step, ends, active))
        here = self._on_device(wanted)
        last = self._on_device([ends[row + 1] - 1 for row in active])
        warm = self._on_device([place for places in reading.warm.values() for place in places])
        target = self._target_logits(step, warm + 1) if reading.warm else None
        num_tokens, _, metadata = self.set_inputs_first_pass(
            token_ids, next_token_ids, positions, self.first.model.combine_hidden_states(hidden_states), None, metadata, None
        )
        reading.positions = self._get_positions(num_tokens)[last]  # a copy, because drafting writes there
        _, layers = self.build_per_group_and_layer_attn_metadata(metadata)  # the same for all heads: their layers are one group
        mode, size, across = self._determine_batch_execution_and_padding(num_tokens)
        slots = self._get_slot_mapping(size, metadata.slot_mapping)
        for index, head in enumerate(self.heads):
            result = HeadResult.empty(len(wanted), len(warm), self.device)
            if index not in self.learning.lost:
                try:
                    self.hidden_states[:num_tokens] = head.model.combine_hidden_states(hidden_states)
                    output, features = self._forward(head, size, layers, mode, across, slots)
                    # Everything is copied, because the CUDA graph of the next head may overwrite the output.
                    if wanted:
                        result.proposals = self._argmax_tokens(head, new := output[here])
                        result.finite, result.features = new.isfinite().all(-1), features[last]
                    if target is not None:
                        logits = head.model.compute_logits(output[warm])
                        result.prompt = evaluate(target[None], logits[None, None], warm[None] * 0).acceptance_prob[0, 0]
                except Exception as error:
                    self._drop_head(index, error)
            reading.results.append(result)
        return reading

    def _learn(self, step: Step, active: Sequence[int], reading: Reading, sampling: SamplingMetadata) -> None:
        """Scores the proposals and updates the learners."""
        if not active:
            return
        learning, offsets = self.learning, reading.offsets
        rounds: list[tuple[int, int]] = []  # place in `active`, column in `before` of its first token
        before: list[NDArray[np.int64]] = []
        for place, row in enumerate(active):
            name = step.names[row]
            if learning.is_new(name):
                continue
            earlier = learning.proposals(name, step.lengths[row] - len(step.emitted[row]))
            if earlier is not None:
                rounds.append((place, len(before)))
                before.append(earlier)
        own_proposals = torch.stack([one.proposals for one in reading.results])
        own_finite = torch.stack([one.finite for one in reading.results])
        own_prompt = torch.stack([one.prompt for one in reading.results])
        own_probs = own_prompt[:, :0]
        if not sampling.all_greedy and rounds:
            # The first emitted token of a round was proposed in an earlier step (`before`), the others in this one.
            known = torch.cat([self._on_device(np.stack(before, axis=1)), own_proposals], dim=1)
            columns = [
                column
                for place, first in rounds
                for column in (first, *range(len(before) + offsets[place], len(before) + offsets[place + 1] - 1))
            ]
            rows = [active[place] for place, _ in rounds]
            own_probs = self._proposal_probs(step, rows, known[:, self._on_device(columns)], sampling)
        parts = [part.double() for part in (own_proposals, own_finite, own_prompt, own_probs)]
        joined = torch.cat(parts, dim=1)
        if (group := get_tp_group()).world_size > 1:
            joined = group.broadcast(joined, src=0)
        host = joined.cpu().numpy()  # the step's first wait for the device
        seconds = None
        if self._clock is not None:
            self._clock.enter(len(active))
            seconds = self._clock.costs.of(len(active))
        proposals, finite, prompt, probs = np.split(host, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
        proposals, finite = proposals.astype(np.int64), finite.astype(bool)
        done = 0
        for place, column in rounds:
            row, tokens = active[place], slice(offsets[place], offsets[place + 1] - 1)
            emitted = step.emitted[row]
            ratio = (np.column_stack([before[column], proposals[:, tokens]]) == np.array(emitted)).astype(np.float64)
            prob = probs[:, done : done + len(emitted)] if probs.size else ratio
            done += len(emitted)
            learning.learn(step.names[row], prob, ratio, step.drafted[row], seconds)
        done = 0
        for place, row in enumerate(active):
            name, tokens = step.names[row], slice(offsets[place], offsets[place + 1])
            if learning.is_new(name):
                count = len(reading.warm.get(row, ()))
                learning.begin(name, prompt[:, done : done + count], seconds)
                done += count
            all_finite = np.logical_and.reduce(finite[:, tokens], axis=1)
            learning.propose(name, step.lengths[row], proposals[:, tokens][:, -1], all_finite)

    def _draft(self, step: Step, active: Sequence[int], reading: Reading, metadata: Any) -> list[list[int]]:
        """Runs the chosen heads from their proposals on."""
        drafts: list[list[int]] = [[] for _ in step.names]
        most, costs = self.num_speculative_tokens, None if self._clock is None else self._clock.costs
        measure = costs.to_measure(len(active), most) if costs is not None and active else None
        choices = [self.learning.choose(step.names[row], most + 1, measure) for row in active]
        done: list[tuple[list[int], torch.Tensor]] = []
        for index in sorted({choice.drafter for choice in choices if choice.draft_length}):
            own = [place for place, choice in enumerate(choices) if choice.drafter == index and choice.draft_length]
            length, began = max(choices[place].draft_length for place in own), time.perf_counter()
            try:
                tokens = self._draft_with_head(index, own, [active[place] for place in own], length, reading, metadata)
                if costs is not None:
                    tokens = tokens.cpu()  # waits for the device, so that the time is measured
                    costs.drafted(len(active), index, (time.perf_counter() - began) / length)
                done.append((own, torch.nn.functional.pad(tokens, (0, most - length))))
            except Exception as error:
                self._drop_head(index, error)
        if done:
            drafted = torch.cat([tokens for _, tokens in done]).tolist()  # the second wait
            for place, draft in zip((place for own, _ in done for place in own), drafted):
                drafts[active[place]] = draft[: choices[place].draft_length]
        if self._clock is not None and len(active) == len(step.names):
            self._clock.leave(len(active), max(map(len, drafts), default=0))
        return drafts

    def _draft_with_head(
        self, index: int, own: Sequence[int], rows: Sequence[int], length: int, reading: Reading, metadata: Any
    ) -> torch.Tensor:
        """Returns one head's drafts for some rows, int64 [rows, length].

        It writes keys and values of its own layers only, behind the verified tokens of these rows; the next verified tokens
        overwrite them.
        """
        head, result, count = self.heads[index], reading.results[index], len(own)
        here = self._on_device(own)
        mode, size, across = self._determine_batch_execution_and_padding(count)
        metadata = self._metadata_of_rows(metadata, rows)
        ends = self._on_device(reading.offsets[1:] - 1)
        assert result.features is not None and reading.positions is not None  # otherwise the head was dropped
        tokens, features, positions = [result.proposals[ends[here]]], result.features[here], reading.positions[here]
        for depth in range(1, length):
            positions = self._update_positions_dependent_metadata(positions, metadata, count, size, self.block_size)
            _, layers = self.build_per_group_and_layer_attn_metadata(metadata, draft_index=depth)
            self.input_ids[:count] = tokens[-1]
            self.hidden_states[:count] = features
            output, features = self._forward(head, size, layers, mode, across, self._get_slot_mapping(size))
            features = features[:count]
            tokens.append(self._argmax_tokens(head, output[:count]))
        return torch.stack(tokens, dim=1)

    def _warm_rows(self, step: Step, ends: Sequence[int], active: Sequence[int]) -> dict[int, range]:
        """Returns row -> positions of the warm start, for requests whose prompt was read in this step: the last positions of
        the prompt, without the very last one. Positions in a cached prefix are not used."""
        fresh = [row for row in active if self.learning.is_new(step.names[row]) and not step.drafted[row]]
        most = min(self.learning.warm, MOST_WARM // max(len(fresh), 1))
        places = {row: range(max(ends[row], ends[row + 1] - 1 - most), ends[row + 1] - 1) for row in fresh}
        return {row: some for row, some in places.items() if some}

    def _target_logits(self, step: Step, places: torch.Tensor) -> torch.Tensor:
        """Returns the target's logits at positions among the verified tokens, [positions, V]."""
        rows = places if step.rows is None else step.rows[places]
        return self.runner.model.compute_logits(self._target_hidden[rows])

    def _proposal_probs(
        self, step: Step, rows: Sequence[int], proposals: torch.Tensor, sampling: SamplingMetadata
    ) -> torch.Tensor:
        """Returns the target's probability of the proposals for all tokens that these rows emitted, [N, tokens], after the
        sampling options of the request. At temperature 0 it is whether the proposal was emitted."""
        final, before = self._sampler.kept_logits, np.cumsum([0, *step.drafted])
        drafted, last, of = [], [], []
        for row in rows:
            for place in range(len(step.emitted[row])):
                of.append(row)
                is_drafted = place < step.drafted[row]
                drafted.append(int(before[row]) + place if is_drafted else -1)
                last.append(row)
        logits = final[self._on_device(last)]
        places = self._on_device(drafted)
        if any(place >= 0 for place in drafted):
            draft_logits = self._rejection_sampler.kept_logits
            logits = torch.where((places >= 0)[:, None], draft_logits[places.clamp(min=0)], logits)
        of_row = self._on_device(of)
        temperature = sampling.temperature[of_row]
        greedy = temperature < _SAMPLING_EPS
        logits = logits / torch.where(greedy, 1.0, temperature)[:, None]
        top_k, top_p = (None if bound is None else bound[of_row] for bound in (sampling.top_k, sampling.top_p))
        log_probs = apply_top_k_top_p(logits, top_k, top_p).log_softmax(-1)
        found = log_probs.gather(1, proposals.clamp(min=0).T).exp().T
        emitted = self._on_device([token for row in rows for token in step.emitted[row]])
        return torch.where(greedy, (proposals == emitted).to(found.dtype), found).where(proposals >= 0, 0)

    def _drop_head(self, index: int, error: Exception) -> None:
        """Drops a head that failed. With tensor parallelism the error is raised, because the other ranks wait for this one."""
        if get_tp_group().world_size > 1:
            raise error
        self.learning.drop(index, f"{type(error).__name__}: {error}")

    def report(self) -> dict:
        """Returns the sums over all requests, and the number of current ones."""
        return self.learning.tally.to_dict() | {"kept_requests": len(self.learning.requests)}
