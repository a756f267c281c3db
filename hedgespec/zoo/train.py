"""How the zoo's heads are trained: distillation on the target's own continuations, unrolled as they will draft.

First the generalist, on every domain and on chat; each expert then starts from it and sees its own domain only. At
depth s of the unrolled loss the head reads its own output of depth s - 1 instead of the target's feature, with the
attention pattern of real drafting: true keys up to t - s, its own keys since (EAGLE-3's training-time test).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.errors import ZooError
from hedgespec.utils.paths import cache_dir
from hedgespec.zoo import GENERALIST, NAMES, continuations, storage
from hedgespec.zoo.corpora import DOMAINS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what training does, besides the data."""

    draft_vocab_size: int = 4096
    intermediate_size: int = 1024
    generalist_steps: int = 1000
    expert_steps: int = 340
    batch_size: int = 6
    generalist_learning_rate: float = 2e-3
    expert_learning_rate: float = 1e-3
    warmup_steps: int = 20
    generalist_depths: tuple[int, ...] = (1, 2, 4)
    """Unrolled drafting steps in the loss, each for an equal share of the training, in this order."""
    expert_depths: tuple[int, ...] = (2, 4)
    depth_decay: float = 0.8
    hard_label: float = 0.5
    """Share of the label that is the target's argmax; the rest is its distribution, within the draft vocabulary."""
    prompt_weight: float = 0.3
    """Weight of positions inside the prompt, which the target did not write."""
    checkpoint_every: int = 100
    """Steps from one checkpoint to the next."""
    seed: int = 0


def draft_vocabulary(shards: list[Batch], size: int, vocab_size: int) -> torch.Tensor:
    """The `size` ids most frequent in the rows, prompts included, and among the target's argmaxes; ascending int64 [size]."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for shard in shards:
        for name in ("tokens", "best"):
            ids = shard[name].flatten().long()
            counts.index_add_(0, ids, torch.ones(len(ids), dtype=torch.float64))
    return counts.topk(size).indices.sort().values


def head_config(target: PreTrainedModel, recipe: Recipe) -> EagleConfig:
    config = target.config
    return EagleConfig(
        hidden_size=config.hidden_size, target_hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim, intermediate_size=recipe.intermediate_size, vocab_size=config.vocab_size,
        draft_vocab_size=recipe.draft_vocab_size, aux_layers=continuations.aux_layers(config.num_hidden_layers),
        rope_theta=config.rope_parameters["rope_theta"], rms_norm_eps=config.rms_norm_eps,
    )  # fmt: skip


def initial_head(target: PreTrainedModel, recipe: Recipe, vocabulary: torch.Tensor) -> EagleHead:
    """A head that starts as the target's last layer, reading its highest aux layer; the output projections start small."""
    head = EagleHead(head_config(target, recipe), target.get_input_embeddings(), vocabulary).to(target.device)
    hidden, layer = target.config.hidden_size, target.model.layers[-1]
    attention, mlp = layer.self_attn, layer.mlp
    with torch.no_grad():
        torch.nn.init.normal_(head.fc.weight, std=0.01)
        head.fc.weight[:, -hidden:] += 0.5 * torch.eye(hidden, device=target.device)
        own = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        torch.nn.init.normal_(head.qkv_proj.weight, std=0.02)
        head.qkv_proj.weight[:, hidden:] += own
        head.o_proj.weight.copy_(0.3 * attention.o_proj.weight)
        strongest = mlp.down_proj.weight.norm(dim=0).topk(recipe.intermediate_size).indices
        head.gate_up_proj.weight.copy_(torch.cat([mlp.gate_proj.weight[strongest], mlp.up_proj.weight[strongest]]))
        head.down_proj.weight.copy_(0.3 * mlp.down_proj.weight[:, strongest])
        head.hidden_norm.weight.copy_(layer.input_layernorm.weight)
        head.post_attention_layernorm.weight.copy_(layer.post_attention_layernorm.weight)
        head.norm.weight.copy_(target.model.norm.weight)
    return with_vocabulary(head, target, vocabulary)


def with_vocabulary(head: EagleHead, target: PreTrainedModel, vocabulary: torch.Tensor) -> EagleHead:
    """Gives the head a draft vocabulary: the target's own output rows, frozen."""
    head.draft_to_target = vocabulary = vocabulary.to(target.device)
    head.lm_head.weight = torch.nn.Parameter(target.lm_head.weight[vocabulary].detach().clone(), requires_grad=False)
    return head


def unrolled(head: EagleHead, tokens: torch.Tensor, feature: torch.Tensor, depth: int) -> Iterator[torch.Tensor]:
    """Yields the draft logits [B, T, Vd] of depth 0, 1, ...; position t of depth s is right for t >= s.

    Args:
        tokens: int64 [B, T], x_{t+1}.
        feature: [B, T, H], the fused features f_t.
    """
    embedded, length, heads = head.embed(tokens), tokens.shape[1], head.config.num_attention_heads
    positions = torch.arange(length, device=tokens.device)
    own: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(depth):
        queries, keys, values, residual = head.project(embedded, feature, positions)
        keys, values = (side.repeat_interleave(heads // side.shape[1], 1) for side in (keys, values))
        own.append((keys, values))
        queries = queries / math.sqrt(head.config.head_dim)
        true_keys, true_values = own[0]
        scores = queries @ true_keys.transpose(-1, -2)
        scores = scores.masked_fill(positions[None] > positions[:, None] - step, float("-inf"))
        later = [tuple(_shifted(side, step - s) for side in own[s]) for s in range(1, step + 1)]
        scores = torch.cat([scores, *((queries * keys).sum(-1, keepdim=True) for keys, _ in later)], -1)
        if step:  # rows t < step have no true key: their own keys keep the softmax finite, the loss leaves them out
            share = scores.softmax(-1)
            attended = share[..., :length] @ true_values
            for index, (_, values) in enumerate(later):
                attended = attended + share[..., length + index, None] * values
        else:
            attended = scores.softmax(-1) @ true_values
        feature, logits = head.answer(head.finish(residual, attended))
        yield logits
        feature = _shifted(feature, 1)


def _shifted(states: torch.Tensor, by: int) -> torch.Tensor:
    """Moves `states` [..., T, D] `by` positions later, zeros in front."""
    return F.pad(states, (0, 0, by, 0))[..., : states.shape[-2], :] if by else states


def batch_loss(
    head: EagleHead, batch: Batch, scale: torch.Tensor, recipe: Recipe, depth: int
) -> tuple[torch.Tensor, list[float]]:
    """The distillation loss, and per depth the share of greedy agreement with the target on what it wrote itself."""
    tokens, length = batch["tokens"].long(), batch["length"]
    seen = tokens.shape[1] - 2
    positions = torch.arange(seen, device=tokens.device)
    assert head.draft_to_target is not None  # `with_vocabulary` gave it one
    with torch.no_grad():
        logits = batch["last"][:, 1:].float()[:, :seen] @ head.lm_head.weight.T
        label = (1 - recipe.hard_label) * (logits - batch["log_normalizer"][:, 1 : seen + 1, None]).exp()
        best = batch["best"][:, 1 : seen + 1].long()
        index = torch.searchsorted(head.draft_to_target, best).clamp(max=len(head.draft_to_target) - 1)
        known = head.draft_to_target[index] == best
        label.scatter_add_(-1, index[..., None], recipe.hard_label * known[..., None].float())
        inside = positions + 2 < length[:, None]
        written = inside & (positions + 2 >= batch["prompt_length"][:, None])
        weight = recipe.prompt_weight * inside + (1 - recipe.prompt_weight) * written
    feature = F.linear(batch["aux"][:, :seen].float() * scale, head.fc.weight)
    total, agreement = feature.new_zeros(()), []
    for step, draft in enumerate(unrolled(head, tokens[:, 1:-1], feature, depth)):
        valid = weight * (positions >= step)
        loss = -(label * F.log_softmax(draft, -1)).sum(-1)
        total = total + recipe.depth_decay**step * (loss * valid).sum() / valid.sum()
        counted = written & (positions >= step)
        agreement.append(((draft.argmax(-1) == index) & known & counted).sum().item() / max(counted.sum().item(), 1))
    return total / sum(recipe.depth_decay**step for step in range(depth)), agreement


def training_rows(names: tuple[str, ...], new_tokens: int = 128) -> list[Batch]:
    """One dictionary a sequence, of all shards of the named domains."""
    rows = []
    for name in names:
        for shard in continuations.load(name):
            prompt_length = shard["tokens"].shape[1] - new_tokens
            for row in range(shard["tokens"].shape[0]):
                rows.append({key: value[row] for key, value in shard.items()} | {"prompt_length": torch.tensor(prompt_length)})
    return rows


def collate(rows: list[Batch]) -> Batch:
    """Stacks sequences of unequal length, padded on the right."""
    longest = max(len(row["tokens"]) for row in rows)

    def padded(value: torch.Tensor, length: int) -> torch.Tensor:
        return F.pad(value, (0, 0) * (value.ndim - 1) + (0, length - len(value))) if value.ndim else value

    return {
        key: torch.stack([padded(row[key], longest - (key != "tokens")) for row in rows]) for key in rows[0]
    }  # fmt: skip


def feature_scale(rows: list[Batch]) -> torch.Tensor:
    """One over the root mean square of every feature dimension: training sees well-conditioned inputs of `fc`."""
    sample = torch.cat([row["aux"][4::7].float() for row in rows[:: max(1, len(rows) // 200)]])
    return sample.square().mean(0).clamp_min(1e-6).rsqrt()


def train_head(head: EagleHead, rows: list[Batch], steps: int, learning_rate: float, depths: tuple[int, ...], recipe: Recipe,
               checkpoint: Path, report: Callable[[str], None] = print) -> EagleHead:  # fmt: skip
    """Trains in place and returns the head, going on from `checkpoint` if there is one.

    `fc` sees scaled features while it trains; the scale is folded back into it at the end.
    """
    device = head.fc.weight.device
    scale = feature_scale(rows).to(device)
    with torch.no_grad():
        head.fc.weight.div_(scale)
    weights = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        head.load_state_dict(saved["head"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    began, smooth = time.time(), [0.0] * (1 + max(depths))
    for step in range(first, steps):
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / recipe.warmup_steps) * decay
        per_epoch = len(rows) // recipe.batch_size
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed + epoch))
        chosen = order[place * recipe.batch_size : (place + 1) * recipe.batch_size]
        depth = depths[step * len(depths) // steps]
        batch = {key: value.to(device) for key, value in collate([rows[index] for index in chosen]).items()}
        loss, agreement = batch_loss(head, batch, scale, recipe, depth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        for index, value in enumerate((loss.item(), *agreement)):
            smooth[index] += (value - smooth[index]) * (0.05 if smooth[index] else 1.0)
        if step % 20 == 19 or step == steps - 1:
            shown = " ".join(f"{value:.3f}" for value in smooth[: depth + 1])
            report(f"step {step + 1}/{steps} loss, agreement by depth {shown} ({time.time() - began:.0f} s)")
        if (step + 1) % recipe.checkpoint_every == 0:
            state = {"head": head.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, scratch := checkpoint.with_suffix(".part"))
            scratch.rename(checkpoint)
    with torch.no_grad():
        head.fc.weight.mul_(scale)
    return head


def _report_as(name: str, report: Callable[[str], None], line: str) -> None:
    report(f"{name}: {line}")


def train(target: PreTrainedModel, names: tuple[str, ...] = NAMES, recipe: Recipe = Recipe(), *,
          folder: Path | None = None, report: Callable[[str], None] = print) -> Path:  # fmt: skip
    """Trains the named heads that are not there yet, the generalist first, and returns the folder they are in."""
    folder = folder or cache_dir() / "heads"
    folder.mkdir(parents=True, exist_ok=True)
    target.requires_grad_(False)
    for name in sorted(names, key=lambda name: name != GENERALIST):
        path = folder / f"{name}.safetensors"
        if path.exists():
            continue
        own = tuple(DOMAINS) if name == GENERALIST else (name,)
        rows = training_rows(own)
        if not rows:
            raise ZooError(f"no continuations of {', '.join(own)} are there to train on")
        vocabulary = draft_vocabulary(rows, recipe.draft_vocab_size, target.config.vocab_size)
        torch.manual_seed(recipe.seed)
        if name == GENERALIST:
            head = initial_head(target, recipe, vocabulary)
            plan = recipe.generalist_steps, recipe.generalist_learning_rate, recipe.generalist_depths
        else:
            trunk = storage.load_head(folder / f"{GENERALIST}.safetensors", target).requires_grad_(True)
            head = with_vocabulary(trunk, target, vocabulary)
            plan = recipe.expert_steps, recipe.expert_learning_rate, recipe.expert_depths
        checkpoint = folder / f"{name}.checkpoint"
        train_head(head, rows, *plan, recipe, checkpoint, partial(_report_as, name, report))
        torch.save(head.state_dict(), folder / f"{name}.float.pt")  # for measuring what the compact file loses
        storage.save_head(head, path, name=name, recipe=json.dumps(asdict(recipe)), licence="Apache-2.0")
        checkpoint.unlink(missing_ok=True)
    return folder
