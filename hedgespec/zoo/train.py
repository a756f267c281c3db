"""How the zoo's heads are trained: distillation on the target's own answers, unrolled as they will draft.

`chat` learns from general chat alone, as a published head does. Each expert starts from `chat` and learns from its domain with
some chat mixed in. `joint` learns from everything that the others saw, for as many steps.

At depth s of the unrolled loss the head reads its own output of depth s - 1 instead of the target's feature, with the
attention pattern of real drafting: true keys up to t - s, its own keys since (EAGLE-3's training-time test). Only positions
that predict the target's answers are unrolled; of a prompt, keys and values are computed and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from hedgespec.drafters.eagle import EagleConfig, EagleHead
from hedgespec.errors import ZooError
from hedgespec.zoo import storage
from hedgespec.zoo.features import Features, aux_layers
from hedgespec.zoo.shards import Row
from hedgespec.zoo.sources import DOMAINS, by_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHAT, JOINT = "chat", "joint"
HEADS = (CHAT, *DOMAINS[1:], JOINT)
"""Heads in the order in which they are trained."""
END = 2
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what training does, besides the data.

    Attributes:
        draft_vocab_size: ids a head can draft.
        intermediate_size: width of its MLP.
        passes, expert_passes: times that the training tokens of `chat` and of an expert are seen.
        batch_tokens: answer positions of a step, padding included.
        learning_rate, expert_learning_rate: after warm-up; they decay to a twentieth along a cosine.
        warmup: share of the steps.
        depths, expert_depths: unrolled drafting steps, each for an equal share of the training, in this order.
        depth_decay: factor of the loss from one depth to the next.
        hard_label: share of the label that is the target's argmax; the rest is its distribution, within the draft vocabulary.
        chat_share: share of chat tokens in an expert's training.
        average: decay of the averaged weights, which are the ones that are kept; smaller in the first steps.
        curve_points: times that tokens a round are measured on held-out prompts, at 1/16, 1/8, ... of the steps.
        checkpoint_seconds: time from one checkpoint to the next.
        seed: of initial weights and order.
    """

    draft_vocab_size: int = 8192
    intermediate_size: int = 1024
    passes: float = 4.0
    expert_passes: float = 4.0
    batch_tokens: int = 2048
    learning_rate: float = 2e-3
    expert_learning_rate: float = 1e-3
    warmup: float = 0.03
    depths: tuple[int, ...] = (1, 3, 5)
    expert_depths: tuple[int, ...] = (3, 5)
    depth_decay: float = 0.9
    hard_label: float = 0.3
    chat_share: float = 0.1
    average: float = 0.998
    curve_points: int = 5
    checkpoint_seconds: float = 45.0
    seed: int = 0


def domain_of(row: Row) -> str:
    return by_name()[row.source].domain


def draft_vocabulary(rows: Sequence[Row], size: int, vocab_size: int) -> torch.Tensor:
    """The `size` ids most frequent in the answers, ascending int64 [size]. Ids that never occur fill up in their own order."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for row in rows:
        for start, stop in row.answers(END):
            ids = torch.tensor(row.tokens[start:stop])
            counts.index_add_(0, ids, torch.ones(len(ids), dtype=torch.float64))
    counts -= torch.arange(vocab_size) / (2 * vocab_size)
    return counts.topk(size).indices.sort().values


def head_config(target: PreTrainedModel, recipe: Recipe) -> EagleConfig:
    config = target.config
    return EagleConfig(
        hidden_size=config.hidden_size, target_hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim, intermediate_size=recipe.intermediate_size, vocab_size=config.vocab_size,
        draft_vocab_size=recipe.draft_vocab_size, aux_layers=aux_layers(config.num_hidden_layers),
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
    rows = target.get_output_embeddings().weight[vocabulary].detach().clone()
    head.lm_head.weight = torch.nn.Parameter(rows, requires_grad=False)
    head.config = replace(head.config, draft_vocab_size=len(vocabulary))
    return head


# --- the unrolled pass ----------------------------------------------------------------------------------------------


def unrolled_states(
    head: EagleHead, tokens: torch.Tensor, feature: torch.Tensor, depth: int, window: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """Yields the head's own hidden states of depth 0, 1, ..., each [B, W, H].

    Args:
        tokens: int64 [B, T], x_{t+1}.
        feature: [B, T, H], the fused features f_t.
        depth: number of depths.
        window: int64 [B, W], ascending consecutive positions to unroll; None is all of them. Index w of depth s is right for
            w >= s.
    """
    embedded, length, heads = head.embed(tokens), tokens.shape[1], head.config.num_attention_heads
    places = torch.arange(length, device=tokens.device)
    group = heads // head.config.num_key_value_heads

    def rotated(
        embedded: torch.Tensor, feature: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        residual, mixed = head.mix(embedded, feature)
        states = head.qkv(mixed).unflatten(-1, (-1, head.config.head_dim)).transpose(1, 2)
        kv = head.config.num_key_value_heads
        angle = positions[..., None].float() * head.rope_frequency.to(positions.device)
        cos, sin = (side.unsqueeze(-3).to(states.dtype) for side in (angle.cos(), angle.sin()))
        low, high = states[:, :-kv].chunk(2, -1)
        both = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
        keys, values = both[:, -kv:], states[:, -kv:]
        return both[:, :-kv] / math.sqrt(head.config.head_dim), keys, values, residual

    queries, true_keys, true_values, residual = rotated(embedded, feature, places)
    if window is None:
        window = places.expand(len(tokens), -1)
        pick = None
    else:
        pick = window[..., None]
        queries = queries.gather(2, window[:, None, :, None].expand(-1, heads, -1, queries.shape[-1]))
        residual = residual.gather(1, pick.expand(-1, -1, residual.shape[-1]))
        embedded = embedded.gather(1, pick.expand(-1, -1, embedded.shape[-1]))
    true_keys, true_values = (side.repeat_interleave(group, 1) for side in (true_keys, true_values))
    own: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(depth):
        if step:
            queries, keys, values, residual = rotated(embedded, feature, window)
            own.append((keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)))
        scores = queries @ true_keys.transpose(-1, -2)
        hidden_keys = places > window[..., None] - step
        scores = scores.masked_fill(hidden_keys[:, None], float("-inf"))
        later = [tuple(_shifted(side, step - 1 - s) for side in own[s]) for s in range(step)]
        scores = torch.cat([scores, *((queries * keys).sum(-1, keepdim=True) for keys, _ in later)], -1)
        share = scores.float().softmax(-1).to(true_values.dtype)
        attended = share[..., :length] @ true_values  # positions < step have no true key: their own keys keep it finite
        for index, (_, values) in enumerate(later):
            attended = attended + share[..., length + index, None] * values
        hidden = head.leave(residual, attended.transpose(1, 2).flatten(2))
        yield hidden
        feature = _shifted(head.rms("norm", hidden) if head.config.feeds_back_norm else hidden, 1)


def unrolled(head: EagleHead, tokens: torch.Tensor, feature: torch.Tensor, depth: int) -> Iterator[torch.Tensor]:
    """Yields the draft logits [B, T, Vd] of depth 0, 1, ...; position t of depth s is right for t >= s.

    Args:
        tokens: int64 [B, T], x_{t+1}.
        feature: [B, T, H], the fused features f_t.
    """
    for hidden in unrolled_states(head, tokens, feature, depth):
        yield head.logits(hidden)


def _shifted(states: torch.Tensor, by: int) -> torch.Tensor:
    """Moves `states` [..., T, D] `by` positions later, zeros in front."""
    return F.pad(states, (0, 0, by, 0))[..., : states.shape[-2], :] if by else states


class SoftCrossEntropy(torch.autograd.Function):
    """sum_i weight_i * -(label_i . log_softmax(hidden_i @ output.T)), without keeping logits or their gradients.

    Args:
        hidden: [M, H], float32 or bfloat16.
        output: [Vd, H] of the same dtype, frozen.
        label: [M, Vd], not negative; it need not sum to 1.
        weight: float32 [M].
    Returns: (loss, float32 scalar; the argmax of the logits, int64 [M]).
    """

    CHUNK = 256
    """Rows whose logits are there at the same time on a CPU, so that they stay in its cache."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, output: torch.Tensor, label: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = torch.empty_like(hidden)
        best = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        total = torch.zeros((), device=hidden.device)
        chunk = SoftCrossEntropy.CHUNK if hidden.device.type == "cpu" else 32 * SoftCrossEntropy.CHUNK
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ output.T).float()
            best[part] = logits.argmax(-1)
            target = label[part].float()
            mass = target.sum(-1, keepdim=True)
            normalizer = logits.logsumexp(-1, keepdim=True)
            total += (weight[part] * (normalizer * mass - (target * logits).sum(-1, keepdim=True))[:, 0]).sum()
            slope = logits.sub_(normalizer).exp_().mul_(mass).sub_(target).mul_(weight[part, None])
            gradient[part] = slope.to(output.dtype) @ output
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(best)
        return total, best

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.saved_tensors[0] * slope, None, None, None


def batch_loss(head: EagleHead, batch: Batch, scale: torch.Tensor, recipe: Recipe, depth: int,
               dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The distillation loss, and per depth the share of greedy agreement with the target, float32 [depth].

    Args:
        head: whose `fc` reads features times `scale`.
        batch: as `collate` returns it.
        dtype: of matrix products; weights, residual stream and loss stay in float32.
    """
    device = batch["tokens"].device
    window, written = batch["window"], batch["written"]
    output = head.lm_head.weight.to(dtype)
    with torch.no_grad():
        rows = written.nonzero(as_tuple=True)
        at = rows[0], window[rows] + 1  # the target's own logits there are those of the token that is predicted
        width = head.config.hidden_size
        label = (batch["states"][at][:, -width:].to(dtype) @ output.T).float()
        label = label.sub_(batch["log_normalizer"][at][:, None]).exp_().mul_(1 - recipe.hard_label)
        best = batch["best"][at]
        mapping = head.draft_to_target
        assert mapping is not None  # heads in training have a draft vocabulary
        index = torch.searchsorted(mapping, best).clamp(max=len(mapping) - 1)
        known = mapping[index] == best
        label.scatter_add_(-1, index[:, None], recipe.hard_label * known[:, None].float())
        label = label.to(dtype)
    total, agreement = torch.zeros((), device=device), []
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        aux = batch["states"][:, :-1, :-width].to(dtype) * scale.to(dtype)
        feature = head.linear("fc", aux).float()
        for step, hidden in enumerate(unrolled_states(head, batch["tokens"][:, 1:], feature, depth, window)):
            normed = head.rms("norm", hidden.float())[rows].to(dtype)
            valid = (rows[1] >= step).float()
            weight = recipe.depth_decay**step * valid / valid.sum().clamp_min(1)
            loss, chosen = SoftCrossEntropy.apply(normed, output, label, weight)
            total = total + loss
            agreement.append((((chosen == index) & known) * valid).sum() / valid.sum().clamp_min(1))
    return total / sum(recipe.depth_decay**step for step in range(depth)), torch.stack(agreement)


# --- batches --------------------------------------------------------------------------------------------------------


def span(row: Row) -> tuple[int, int]:
    """The head's positions [first, stop) that a row is unrolled at: from the one that predicts its second answer token."""
    return max(0, row.prompt_length - 1), len(row.tokens) - 2


def usable(row: Row) -> bool:
    return span(row)[1] - span(row)[0] >= 2


def collate(rows: Sequence[Row], states: Sequence[Batch]) -> Batch:
    """Stacks rows, padded on the right: tokens int64 [B, L], the target's `states`, `log_normalizer`, `best`, and

    window int64 [B, W], the positions to unroll; written bool [B, W], those of them that predict a token of an answer.
    """
    longest, widest = max(len(row.tokens) for row in rows), max(stop - first for first, stop in map(span, rows))

    def padded(value: torch.Tensor) -> torch.Tensor:
        return F.pad(value, (0, 0) * (value.ndim - 1) + (0, longest - len(value)))

    batch = {"tokens": torch.stack([padded(torch.tensor(row.tokens)) for row in rows])}
    for key in ("states", "log_normalizer", "best"):
        batch[key] = torch.stack([padded(state[key].cpu()) for state in states])
    window = torch.zeros(len(rows), widest, dtype=torch.long)
    written = torch.zeros(len(rows), widest, dtype=torch.bool)
    for place, row in enumerate(rows):
        first, stop = span(row)
        window[place] = (torch.arange(widest) + first).clamp(max=longest - 2)
        for start, end in row.answers(END):
            low, high = max(start + 1, first + 2), min(end, stop + 2)
            written[place, low - 2 - first : high - 2 - first] = True
    return batch | {"window": window, "written": written}


def batches(rows: Sequence[Row], places: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """One pass over the rows of indices `places`: batches of rows of similar windows, about `size` positions each."""
    rng = random.Random(seed)
    order = list(places)
    rng.shuffle(order)
    made: list[list[int]] = []
    for start in range(0, len(order), 1024):
        part = sorted(order[start : start + 1024], key=lambda place: (span(rows[place])[1] - span(rows[place])[0], place))
        group: list[int] = []
        for place in part:
            first, stop = span(rows[place])
            if group and (len(group) + 1) * (stop - first) > size:
                made.append(group)
                group = []
            group.append(place)
        if group:
            made.append(group)
    rng.shuffle(made)
    return made


def feature_scale(features: Features, places: Sequence[int]) -> torch.Tensor:
    """One over the root mean square of every feature dimension: training sees well-conditioned inputs of `fc`."""
    chosen = places[:: max(1, len(places) // 100)]
    sample = torch.cat([state["states"][4::7].float() for place in chosen for state in features.get([place])])
    return sample[:, : 3 * features.width // 4].square().mean(0).clamp_min(1e-6).rsqrt()


# --- the loop -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How one head is trained: indices into the rows, passes over them, and the recipe's figures for it."""

    places: list[int]
    passes: float
    learning_rate: float
    depths: tuple[int, ...]


def steps_of(rows: Sequence[Row], plan: Plan, recipe: Recipe) -> list[list[int]]:
    """The batches of all steps, in order."""
    made: list[list[int]] = []
    for number in range(math.ceil(plan.passes)):
        one = batches(rows, plan.places, recipe.batch_tokens, 1000 * recipe.seed + number)
        made += one[: math.ceil(len(one) * min(1.0, plan.passes - number))]
    return made


def curve_steps(steps: int, points: int) -> list[int]:
    """After which steps the scaling curve is measured: all of them, half of them, a quarter, ..."""
    return sorted({max(1, round(steps / 2**power)) for power in range(points)})


def train_head(head: EagleHead, features: Features, plan: Plan, recipe: Recipe, checkpoint: Path, *,
               measure: Callable[[EagleHead], dict] | None = None, dtype: torch.dtype = torch.float32,
               progress: Callable[[int, int, str], None] = lambda step, steps, line: None,
               ) -> tuple[EagleHead, list[dict]]:  # fmt: skip
    """Trains and returns the head with averaged weights, and the scaling curve. Goes on from `checkpoint` if there is one.

    `fc` sees scaled features while it trains; the scale is folded back into it at the end.

    Args:
        head: trained in place.
        features: states of the rows.
        plan: rows, passes, learning rate, depths.
        recipe: the rest.
        checkpoint: file of the state, written about every `recipe.checkpoint_seconds`.
        measure: returns held-out figures of a head; called `recipe.curve_points` times.
        dtype: of matrix products.
        progress: receives steps done, steps in all, and a line.
    """
    device, rows = head.fc.weight.device, features.rows
    schedule = steps_of(rows, plan, recipe)
    scale = feature_scale(features, plan.places).to(device)
    with torch.no_grad():
        head.fc.weight.div_(scale)
    weights = [parameter for parameter in head.parameters() if parameter.requires_grad]
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    first, curve, seen, spent = 0, [], 0, 0.0
    identity = hashlib.sha256(repr((recipe, plan.passes, [rows[place].id for place in plan.places])).encode()).hexdigest()
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        if saved["identity"] != identity:
            raise ZooError(
                f"{checkpoint}: expected a checkpoint of the same data and recipe, got another's; delete it to begin anew"
            )
        with torch.no_grad():
            for weight, value, mean, kept in zip(weights, saved["weights"], average, saved["average"], strict=True):
                weight.copy_(value)
                mean.copy_(kept)
        optimizer.load_state_dict(saved["optimizer"])
        first, curve, seen, spent = saved["step"], saved["curve"], saved["seen"], saved["seconds"]

    def with_average() -> list[torch.Tensor]:
        """Puts the averaged weights, `fc` unscaled, into the head and returns the trained ones."""
        trained = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, mean in zip(weights, average, strict=True):
                weight.copy_(mean)
            head.fc.weight.mul_(scale)
        return trained

    def save(step: int) -> None:
        state = {"weights": [weight.detach() for weight in weights], "average": average, "optimizer": optimizer.state_dict(),
                 "step": step, "identity": identity, "curve": curve, "seen": seen, "seconds": spent}  # fmt: skip
        try:
            torch.save(state, scratch := checkpoint.with_suffix(".part"))
            scratch.rename(checkpoint)
        except (OSError, RuntimeError) as error:
            raise ZooError(f"{checkpoint} could not be written ({error}); the one before is whole") from error

    points = curve_steps(len(schedule), recipe.curve_points)
    saved_at, smooth = time.monotonic(), None
    for step in range(first, len(schedule)):
        began = time.monotonic()
        warm = min(1.0, (step + 1) / max(1.0, recipe.warmup * len(schedule)))
        rate = plan.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / len(schedule))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        depth = plan.depths[step * len(plan.depths) // len(schedule)]
        chosen = schedule[step]
        batch = collate([rows[place] for place in chosen], features.get(chosen))
        count = int(batch["written"].sum())
        batch = {key: value.to(device) for key, value in batch.items()}
        loss, agreement = batch_loss(head, batch, scale, recipe, depth, dtype)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        decay = min(recipe.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - decay)
        seen += count
        spent += time.monotonic() - began
        figures = torch.cat([loss.detach()[None], agreement])
        smooth = figures if smooth is None or len(smooth) != len(figures) else smooth.lerp(figures, 0.05)
        if step + 1 in points and measure is not None:
            trained = with_average()
            curve.append({"tokens": seen, "step": step + 1, **measure(head)})
            with torch.no_grad():
                for weight, value in zip(weights, trained, strict=True):
                    weight.copy_(value)
        if step % 5 == 4 or step + 1 == len(schedule):
            shown = " ".join(f"{value:.3f}" for value in smooth.tolist())
            progress(step + 1, len(schedule), f"loss, agreement by depth {shown}; {seen / spent:.0f} tokens/s")
        if time.monotonic() - saved_at > recipe.checkpoint_seconds:
            save(step + 1)
            saved_at = time.monotonic()
    with_average()
    return head, curve


def plan_of(name: str, rows: Sequence[Row], recipe: Recipe) -> Plan:
    """Rows and passes of one head. Raises: ZooError if its domain has no rows to train on."""
    train = [place for place, row in enumerate(rows) if not row.held_out and usable(row)]
    chat = [place for place in train if domain_of(rows[place]) == CHAT]
    own = [place for place in train if domain_of(rows[place]) == name]
    if name == JOINT:
        plans = [plan_of(each, rows, recipe) for each in HEADS if each != JOINT and _has(each, rows)]
        if not plans:
            raise ZooError("joint: expected training rows, got none")
        counts: dict[int, float] = {}
        for plan in plans:
            for place in plan.places:
                counts[place] = counts.get(place, 0) + plan.passes
        total = sum(counts.values()) / len(counts)
        return Plan(sorted(counts), total, recipe.learning_rate, recipe.depths)
    if not own:
        raise ZooError(f"domain {name}: no training rows among the {len(rows)} collected; run `hedgespec zoo collect`")
    if name == CHAT:
        return Plan(own, recipe.passes, recipe.learning_rate, recipe.depths)
    budget = recipe.chat_share / (1 - recipe.chat_share) * sum(len(rows[place].tokens) for place in own)
    random.Random(name).shuffle(chat)
    mixed = []
    for place in chat:
        if budget <= 0:
            break
        mixed.append(place)
        budget -= len(rows[place].tokens)
    return Plan(own + mixed, recipe.expert_passes, recipe.expert_learning_rate, recipe.expert_depths)


def _has(name: str, rows: Sequence[Row]) -> bool:
    return any(not row.held_out and usable(row) and domain_of(row) == name for row in rows)


def train(target: PreTrainedModel, features: Features, names: Sequence[str], recipe: Recipe, folder: Path, *,
          licence: dict | None = None, measure: Callable[[str, EagleHead], dict] | None = None,
          dtype: torch.dtype = torch.float32,
          progress: Callable[[str, int, int, str], None] = lambda name, step, steps, line: None) -> None:  # fmt: skip
    """Trains the named heads that are not in `folder` yet, in the order of `HEADS`.

    Beside `NAME.safetensors` (int8) go `NAME.float.pt` (what int8 is compared with) and `NAME.json` (data, steps, curve).

    Raises: ZooError where a domain has no rows, or an expert's start, `chat`, is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = features.rows
    for name in (each for each in HEADS if each in names):
        path, checkpoint = folder / f"{name}.safetensors", folder / f"{name}.checkpoint"
        if path.exists():
            continue
        plan = plan_of(name, rows, recipe)
        chosen = [rows[place] for place in plan.places]
        vocabulary = draft_vocabulary(chosen, recipe.draft_vocab_size, target.config.vocab_size)
        torch.manual_seed(recipe.seed)
        if name in (CHAT, JOINT):
            head = initial_head(target, recipe, vocabulary)
        else:
            start = folder / f"{CHAT}.safetensors"
            if not start.exists():
                raise ZooError(f"{name}: an expert starts from the head {CHAT}, which is not in {folder}; train it first")
            head = with_vocabulary(storage.load_head(start, target).requires_grad_(True), target, vocabulary)
            head.lm_head.weight.requires_grad_(False)
        head, curve = train_head(
            head, features, plan, recipe, checkpoint, dtype=dtype,
            measure=None if measure is None else functools.partial(measure, name),
            progress=functools.partial(progress, name),
        )  # fmt: skip
        tokens = sum(row.written(END) for row in chosen)
        about = {"head": name, "recipe": asdict(recipe), "rows": len(chosen), "answer_tokens": tokens, "passes": plan.passes,
                 "steps": len(steps_of(rows, plan, recipe)), "curve": curve, **(licence or {})}  # fmt: skip
        torch.save(head.state_dict(), folder / f"{name}.float.pt")
        storage.save_head(head, path, name=name, recipe=json.dumps(asdict(recipe)), licence="Apache-2.0")
        (folder / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
        checkpoint.unlink(missing_ok=True)


def held_out_rows(rows: Sequence[Row]) -> Iterator[tuple[int, Row]]:
    """Indices and rows of the held-out side that are long enough to be drafted."""
    return ((place, row) for place, row in enumerate(rows) if row.held_out and usable(row))
