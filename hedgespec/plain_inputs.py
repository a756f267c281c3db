"""What a model's own `prepare_inputs_for_generation` makes of the tokens, compared with what the decoder gives to its forward.

`generate` asks the model for the inputs of every forward. The decoder calls the forward itself, so a model that prepares other
inputs than its tokens (embeddings that it scales, prompts of its own) would have another text. Methods of transformers' own
models are compared once; any other override is asked, as plain decoding would ask it, about every emitted token.
"""

from __future__ import annotations

import inspect

import torch
from transformers import DynamicCache

from hedgespec.compat import CACHE_NAME, CACHE_NAMES
from hedgespec.positions import boundaries, length_dependent

PREPARES, UPDATES = "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"
PLACES = "_prepare_position_ids_for_generation"
LOOPS = ("_prefill", "_sample")
"""Methods of `generate` that run the model's forward; the decoder stands in for them."""
HARMLESS = {"use_cache", "logits_to_keep", "cache_position", "return_dict", "next_sequence_length", "output_attentions",
            "output_hidden_states", "is_first_iteration"}  # fmt: skip
"""Inputs of a forward that do not change its logits."""


class _DifferentInputs(ValueError):
    """What `PlainInputs.check` finds."""


class _Cache(DynamicCache):
    """A cache that says how many tokens it holds, and holds none."""

    def __init__(self):
        super().__init__()
        self.held = 0

    def __bool__(self) -> bool:
        return True

    def get_seq_length(self, *args, **kwargs) -> int:
        return self.held


def prepares_by_itself(model, name: str = "target") -> bool:
    """Returns whether code from outside transformers prepares the inputs of the model's forward, see `PlainInputs`.

    Raises: ValueError for a model with a decoding loop of its own.
    """
    for method in LOOPS:
        if not _origin(model, method).startswith("transformers."):
            raise ValueError(
                f"{name}: expected generate's own {method}, got another in {type(model).__name__}, which the decoder would not "
                "call"
            )
    return not all(_origin(model, method).startswith("transformers.") for method in (PREPARES, UPDATES, PLACES))


def check_inputs(model, name: str = "target") -> None:
    """Refuses a model that prepares other inputs for its forward than tokens, positions and masks: tried with a short text.

    Raises: ValueError that names the method.
    """
    own = prepares_by_itself(model, name)
    if all(_origin(model, method).startswith("transformers.generation") for method in (PREPARES, UPDATES, PLACES)):
        return
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(1, 7, device=model.device)[None] % vocabulary
    try:
        asked = PlainInputs(model, ids[:, :4], torch.ones_like(ids[:, :4]), name)
        for end in (4, 5, 6):
            asked.check(ids[:, :end])
    except _DifferentInputs:
        raise
    except Exception as error:
        if own:
            raise ValueError(f"{name}: expected {PREPARES} to take what generate gives it, got {error!r}") from error


def _origin(model, method: str) -> str:
    """Returns the module that defines a model's method; empty if that is not known."""
    found = getattr(model, method, None)
    if found is None:
        return "transformers.generation"
    found = getattr(found, "__func__", found)
    return getattr(found, "__module__", None) or ""


class PlainInputs:
    """The inputs that plain decoding of one row would give to the model's forward, compared with the decoder's.

    Args:
        model: the target.
        prompt: int64 [1, padding + P].
        mask: int64 [1, padding + P], 0 for padding.
        name: what errors call the model.
        reread_at: number of tokens, padding included, at which the model is known to read the whole text again.
    """

    def __init__(self, model, prompt: torch.Tensor, mask: torch.Tensor, name: str = "target", reread_at: int | None = None):
        self.model, self.name, self.reread_at = model, name, reread_at
        self.cache, self.mask, self.first = _Cache(), mask, True
        self.width = prompt.shape[1]
        """Tokens, padding included, of the text to ask about next."""
        self.arguments = {CACHE_NAME: self.cache, "attention_mask": mask, "use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self.arguments["logits_to_keep"] = 1
        if "position_ids" in inspect.signature(model.forward).parameters:
            places = getattr(model, PLACES, None)
            given = {"attention_mask": mask, "use_cache": True}
            self.arguments["position_ids"] = _positions(mask) if places is None else places(prompt, given)

    def check(self, tokens: torch.Tensor) -> None:
        """Asks the model for the inputs of the forward that gives the logits after `tokens`, int64 [1, L].

        Calls must go on by one token at a time.

        Raises: ValueError if they are not what the decoder's forward has read.
        """
        width = tokens.shape[1]
        if self.first:
            inputs = self.model.prepare_inputs_for_generation(
                tokens, next_sequence_length=None, is_first_iteration=True, **self.arguments
            )
        else:
            outputs = _Outputs({CACHE_NAME: self.cache, "logits": None})
            self.arguments = self.model._update_model_kwargs_for_generation(outputs, self.arguments, is_encoder_decoder=False)
            inputs = self.model.prepare_inputs_for_generation(tokens, next_sequence_length=1, **self.arguments)
        fresh = tokens if self.first or width == self.reread_at else tokens[:, -1:]
        difference = self._difference(inputs, fresh, width)
        if difference:
            methods = (
                one for one in (PREPARES, UPDATES, PLACES) if not _origin(self.model, one).startswith("transformers.gen")
            )
            method = next(methods, PREPARES)
            raise _DifferentInputs(
                f"{self.name}: expected a model whose {method} gives its forward the tokens, their positions and a mask, got "
                f"{difference} from {type(self.model).__name__} for the forward over token {width}"
            )
        self.first, self.cache.held, self.width = False, width, width + 1

    def _difference(self, inputs, fresh: torch.Tensor, width: int) -> str | None:
        """Returns what is different, in words; None if nothing is."""
        if inputs.get("inputs_embeds") is not None:
            return "inputs_embeds"
        ids = inputs.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.shape != fresh.shape or not bool((ids == fresh).all()):
            return "other input_ids"
        own = [inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None]
        # Where the whole text is read again, or for the first time behind that point, the cache may be dropped.
        rereads = self.reread_at is not None and (width == self.reread_at or (self.first and width > self.reread_at))
        if own != [self.cache] and (own or not rereads):
            return "another cache"
        expected = torch.cat([self.mask, self.mask.new_ones(1, width - self.mask.shape[1])], 1)
        given = inputs.get("attention_mask")
        if given is not None and not (isinstance(given, torch.Tensor) and torch.equal(given.long(), expected)):
            return "another attention_mask"
        if (given := inputs.get("position_ids")) is not None:
            positions = _positions(expected)[:, -fresh.shape[1] :]
            seen = expected[:, -fresh.shape[1] :].bool()
            # A constant shift is none to rotary positions, and a model of transformers' own knows whether it has others.
            shift = given[..., -1:] - positions[:, -1:]
            known = all(_origin(self.model, one).startswith("transformers.") for one in (PREPARES, PLACES))
            if given.shape[-1] != fresh.shape[1] or bool(((given - positions - (shift if known else 0)) * seen).any()):
                return "other position_ids"
        for name, value in inputs.items():
            if name in HARMLESS or name in ("input_ids", "attention_mask", "position_ids", *CACHE_NAMES):
                continue
            if value is not None and not (isinstance(value, dict | list | tuple) and not value):
                return name
        return None


class _Outputs(dict):
    """Outputs of a forward as `generate` reads them: by key and by attribute."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Returns the position of every token of a left-padded row, int64 as `generate` makes it from the mask."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def reread_boundary(model) -> tuple[int | None, bool]:
    """Returns the number of tokens, padding included, at which the model drops its cache, and whether it then reads the whole
    text again. The number is None if the model keeps its cache.

    Models of the Phi-3 family drop it where their rotary factors change. Before transformers 5.20 they read the last token
    alone.
    """
    rotaries = length_dependent(model)
    if not rotaries or _origin(model, PREPARES).startswith("transformers.generation"):
        return None, True
    for boundary in {boundary for boundary, steps in boundaries(rotaries.values()) if not steps}:
        ids = torch.ones(1, boundary + 1, dtype=torch.int64, device=model.device)
        asked = PlainInputs(model, ids, torch.ones_like(ids))
        asked.cache.held = boundary
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **asked.arguments)
        if not any(inputs.get(name) is not None for name in CACHE_NAMES):
            return boundary + 1, inputs["input_ids"].shape == ids.shape
    return None, True
