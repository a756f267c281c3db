"""Batched text generation with the zoo's target on a CPU: a Llama forward without transformers' overhead.

A fixed number of slots decode together, each at its own length. A slot whose text has ended is given the next job at once.
Weights of the query, key and value projections are stacked, and so are those of the gated MLP. Matrix products run in
`dtype`; the residual stream, norms and softmax run in float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOP_K = 512
"""Tokens considered by top-p sampling: beyond them the target has almost no mass."""
GROWTH = 32
"""Tokens by which the cache is lengthened."""
RESCORED = 4
"""Highest logits that are recomputed in float32 before the argmax: products in bfloat16 tie often."""


@dataclass
class Job:
    """One text to go on with.

    Attributes:
        tokens: the ids so far; must not be empty.
        max_new_tokens: the text is cut here if no end token comes.
        temperature: 0 is greedy.
        top_p: nucleus, 1 keeps every token.
        label: whatever the caller wants back.
    """

    tokens: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    label: Any = None
    new: list[int] = field(default_factory=list)
    """The ids generated, an end token included if there was one."""


def faster_dtype(rows: int = 64, *, trials: int = 3) -> torch.dtype:
    """Returns bfloat16 if products of the target's MLP shape are faster in it on this processor, else float32.

    It is measured, because processors that know the format may still emulate it.
    """
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(rows, 576, dtype=dtype), torch.ones(3072, 576, dtype=dtype)
        F.linear(x, weight)
        seconds = []
        for _ in range(trials):
            began = time.perf_counter()
            for _ in range(10):
                F.linear(x, weight)
            seconds.append(time.perf_counter() - began)
        best[dtype] = min(seconds)
    return min(best, key=lambda dtype: best[dtype])


class _Linear:
    """`x @ weight.T`, with oneDNN's packed weights where this build of torch has them (bfloat16 on a CPU)."""

    def __init__(self, weight: torch.Tensor, rows: int):
        self.weight, self.packed = weight, None
        if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
            try:
                self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
                torch.ops.mkldnn._linear_pointwise(weight[:1], self.packed, None, "none", [], "")
            except (RuntimeError, AttributeError):
                self.packed = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return F.linear(x, self.weight)


class Llama:
    """The forward of a transformers Llama model over slots of a preallocated key-value cache.

    Args:
        model: a `LlamaForCausalLM` without biases and without scaled positions.
        dtype: of matrix products and the cache; None measures which is faster (CPU), or takes bfloat16 (GPU).
        rows: rows of a typical product, to which packed weights are tuned.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None, rows: int = 64):
        config = model.config
        if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
            raise ValueError(f"model: expected a Llama model without biases, got one of type {config.model_type}")
        rope = config.rope_parameters
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"model: expected positions that are not scaled, got {rope}")
        self.device = model.device
        if dtype is None:
            dtype = faster_dtype(rows) if self.device.type == "cpu" else torch.bfloat16
        self.config, self.dtype, self.eps = config, dtype, config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.embedding = model.get_input_embeddings().weight.detach().to(dtype)

        def linear(*weights: torch.Tensor) -> _Linear:
            return _Linear(torch.cat([weight.detach() for weight in weights]).to(dtype), rows)

        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.layers.append(
                (
                    layer.input_layernorm.weight.detach().float(),
                    linear(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
                    linear(attention.o_proj.weight),
                    layer.post_attention_layernorm.weight.detach().float(),
                    linear(mlp.gate_proj.weight, mlp.up_proj.weight),
                    linear(mlp.down_proj.weight),
                )
            )
        self.norm = model.model.norm.weight.detach().float()
        self.head = linear(model.lm_head.weight)
        self.output = model.lm_head.weight.detach().float()
        half = self.head_dim // 2
        self.frequency = rope["rope_theta"] ** (-torch.arange(half, dtype=torch.float32, device=self.device) / half)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, float32 [..., head_dim / 2], at int64 positions [...]."""
        angle = positions[..., None] * self.frequency
        return angle.cos(), angle.sin()

    def rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps).to(self.dtype)

    def rotate(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        low, high = states.float().chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(self.dtype)

    def cache(self, slots: int, length: int) -> torch.Tensor:
        """An empty cache, [layers, 2, slots, kv_heads, length, head_dim]."""
        shape = (len(self.layers), 2, slots, self.kv_heads, length, self.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def read(self, tokens: torch.Tensor, lengths: torch.Tensor, cache: torch.Tensor | None = None,
             slots: torch.Tensor | None = None, *, states_of: tuple[int, ...] = ()) -> Any:  # fmt: skip
        """Reads whole texts, padded on the right, and writes their keys and values into `slots` of the cache.

        Args:
            tokens: int64 [B, T].
            lengths: int64 [B], tokens of each row that count; the logits are those of each row's last one.
            cache, slots: where keys and values go, int64 [B]; None keeps none.
            states_of: layers whose inputs are returned (the number of layers is the state after the final norm).
        Returns: the normed final state of the last tokens [B, H] or, with `states_of`, of all tokens and the states,
            `([B, T, H], {layer: [B, T, H]})`, all in `dtype`.
        """
        rows, length = tokens.shape
        cos, sin = self.angles(torch.arange(length, device=self.device))
        x = self.embedding[tokens.flatten()].float()
        kept: dict[int, torch.Tensor] = {}
        group = self.heads // self.kv_heads
        for number, (norm, qkv, out, second, gate_up, down) in enumerate(self.layers):
            if number in states_of:
                kept[number] = x.to(self.dtype).view(rows, length, -1)
            states = qkv(self.rms(x, norm)).view(rows, length, -1, self.head_dim).transpose(1, 2)
            both = self.rotate(states[:, : -self.kv_heads], cos, sin)
            queries, keys, values = both[:, : self.heads], both[:, self.heads :], states[:, -self.kv_heads :]
            if cache is not None:
                cache[number, 0, slots, :, :length] = keys
                cache[number, 1, slots, :, :length] = values
            attended = F.scaled_dot_product_attention(
                queries, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1).contiguous(), is_causal=True
            )
            x = x + out(attended.transpose(1, 2).reshape(rows * length, -1))
            gate, up = gate_up(self.rms(x, second)).chunk(2, -1)
            x = x + down(F.silu(gate) * up)
        if states_of:
            final = self.rms(x, self.norm).view(rows, length, -1)
            if len(self.layers) in states_of:
                kept[len(self.layers)] = final
            return final, kept
        last = x.view(rows, length, -1)[torch.arange(rows, device=self.device), lengths - 1]
        return self.rms(last, self.norm)

    def step(self, tokens: torch.Tensor, lengths: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """Reads one more token of every slot, the first `len(tokens)` of the cache.

        Args:
            tokens: int64 [B].
            lengths: int64 [B], tokens that each slot holds already.
            cache: as `cache` returns it; receives the tokens' keys and values. All of its length is attended over, masked, so
                keep it short. A slice of a longer cache would be copied by every product.
        Returns: the normed final state [B, H] in `dtype`.
        """
        rows, longest = len(tokens), cache.shape[4]
        cos, sin = (side[:, None] for side in self.angles(lengths))
        place = torch.arange(rows, device=self.device)
        mask = torch.zeros(rows, 1, 1, longest, device=self.device)
        mask.masked_fill_(torch.arange(longest, device=self.device) > lengths[:, None, None, None], float("-inf"))
        x = self.embedding[tokens].float()
        scale = 1 / math.sqrt(self.head_dim)
        for number, (norm, qkv, out, second, gate_up, down) in enumerate(self.layers):
            states = qkv(self.rms(x, norm)).view(rows, -1, self.head_dim)
            both = self.rotate(states[:, : -self.kv_heads], cos, sin)
            keys, values = cache[number, 0, :rows], cache[number, 1, :rows]
            keys[place, :, lengths] = both[:, self.heads :]
            values[place, :, lengths] = states[:, -self.kv_heads :]
            queries = both[:, : self.heads].reshape(rows, self.kv_heads, -1, self.head_dim)
            scores = (queries @ keys.transpose(-1, -2)).float().mul_(scale).add_(mask).softmax(-1)
            attended = scores.to(self.dtype) @ values
            x = x + out(attended.reshape(rows, -1))
            gate, up = gate_up(self.rms(x, second)).chunk(2, -1)
            x = x + down(F.silu(gate) * up)
        return self.rms(x, self.norm)

    def choose(self, hidden: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor,
               generator: torch.Generator) -> torch.Tensor:  # fmt: skip
        """The next token of each row, int64 [B], from its normed final state [B, H]: greedy where temperature [B] is 0."""
        logits = self.head(hidden)
        candidates = logits.topk(RESCORED, -1).indices
        exact = (hidden.float()[:, None] @ self.output[candidates].transpose(1, 2))[:, 0]
        chosen = candidates.gather(1, exact.argmax(-1, keepdim=True))[:, 0]
        uniform = torch.rand(len(hidden), 1, generator=generator, device=self.device)
        for rows in ((temperature > 0) & (top_p >= 1), (temperature > 0) & (top_p < 1)):
            index = rows.nonzero()[:, 0]
            if not len(index):
                continue
            prob = (logits[index].float() / temperature[index, None]).softmax(-1)
            names = None
            if top_p[index[0]] < 1:
                prob, names = prob.topk(min(TOP_K, prob.shape[-1]), -1)
                prob = prob * (prob.cumsum(-1) - prob < top_p[index, None])
            mass = prob.cumsum(-1)
            picked = torch.searchsorted(mass, uniform[index] * mass[:, -1:], right=True)
            picked = picked.clamp(max=mass.shape[-1] - 1)
            chosen[index] = (picked if names is None else names.gather(1, picked))[:, 0]
        return chosen


@torch.inference_mode()
def generate(llama: Llama, jobs: Iterable[Job], *, slots: int, ends: tuple[int, ...], seed: int,
             tick: Callable[[int], None] = lambda tokens: None,
             watch: Callable[[list[Job]], None] = lambda active: None) -> Iterator[Job]:  # fmt: skip
    """Yields jobs as they end. Give jobs of similar length one after another: all slots attend over the longest's length.

    Args:
        jobs: taken as slots become free.
        slots: texts that are decoded together.
        ends: token ids that end a text.
        seed: of the random draws.
        tick: called after every forward with the number of new tokens.
        watch: called after every step with the jobs that have not ended.
    """
    generator = torch.Generator(llama.device).manual_seed(seed)
    waiting = iter(jobs)
    active: list[Job] = []
    cache = llama.cache(slots, 64)
    lengths = torch.zeros(slots, dtype=torch.long, device=llama.device)
    fresh = torch.zeros(slots, dtype=torch.long, device=llama.device)
    temperature, top_p = torch.zeros(slots, device=llama.device), torch.ones(slots, device=llama.device)
    exhausted = False

    def finish() -> Iterator[Job]:
        """Takes ended jobs out and moves the last slots into the gaps."""
        for slot in reversed(range(len(active))):
            job = active[slot]
            if job.new[-1] in ends or len(job.new) >= job.max_new_tokens:
                last = len(active) - 1
                if slot != last:
                    cache[:, :, slot] = cache[:, :, last]
                    for state in (lengths, fresh, temperature, top_p):
                        state[slot] = state[last].clone()
                    active[slot] = active[last]
                active.pop()
                yield job

    def fit(needed: int, rows: int) -> None:
        """Makes the cache hold `needed` tokens a slot, and little more."""
        nonlocal cache
        if needed > cache.shape[4] or needed < cache.shape[4] - 2 * GROWTH:
            resized = llama.cache(slots, -(-needed // GROWTH) * GROWTH)
            length = min(cache.shape[4], resized.shape[4])
            resized[:, :, :rows, :, :length] = cache[:, :, :rows, :, :length]
            cache = resized

    while True:
        while not exhausted and (len(active) <= slots - max(1, slots // 8)):
            batch: list[Job] = []
            while len(batch) < slots - len(active) and (not batch or len(batch) * len(batch[0].tokens) < 2048):
                job = next(waiting, None)
                if job is None:
                    exhausted = True
                    break
                batch.append(job)
            if not batch:
                break
            first, last = len(active), len(active) + len(batch)
            sizes = torch.tensor([len(job.tokens) for job in batch], device=llama.device)
            fit(max(int(sizes.max()), int(lengths[:first].max()) if first else 0), first)
            padded = torch.zeros(len(batch), int(sizes.max()), dtype=torch.long, device=llama.device)
            for row, job in enumerate(batch):
                padded[row, : len(job.tokens)] = torch.tensor(job.tokens)
            same = len(batch) > 1 and all(job.tokens == batch[0].tokens for job in batch)
            taken = torch.arange(first, last, device=llama.device)
            if same:
                hidden = llama.read(padded[:1], sizes[:1], cache, taken[:1]).expand(len(batch), -1)
                length = padded.shape[1]
                cache[:, :, first + 1 : last, :, :length] = cache[:, :, first : first + 1, :, :length]
            else:
                hidden = llama.read(padded, sizes, cache, taken)
            lengths[first:last] = sizes
            temperature[first:last] = torch.tensor([float(job.temperature) for job in batch])
            top_p[first:last] = torch.tensor([float(job.top_p) for job in batch])
            fresh[first:last] = llama.choose(hidden, temperature[first:last], top_p[first:last], generator)
            for job, token in zip(batch, fresh[first:last].tolist(), strict=True):
                job.new = [token]
            active += batch
            tick(len(batch))
            yield from finish()
        if not active:
            return
        rows = len(active)
        fit(int(lengths[:rows].max()) + 1, rows)
        hidden = llama.step(fresh[:rows], lengths[:rows], cache)
        lengths[:rows] += 1
        fresh[:rows] = llama.choose(hidden, temperature[:rows], top_p[:rows], generator)
        for job, token in zip(active, fresh[:rows].tolist(), strict=True):
            job.new.append(token)
        tick(rows)
        yield from finish()
        watch(active)
