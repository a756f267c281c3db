"""Forwards of fixed shapes made fast: what a model's Python works out anew for every token is worked out once, and kept.

On a GPU a whole forward is captured as a CUDA graph (`CudaGraphs`). On a CPU the decoder layers are traced and compiled by
inductor (`CompiledLayers`); layers that compute alike share one compilation, which takes seconds where the whole forward takes
a minute, and inductor keeps it on disk for the next run.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from hedgespec.paths import cache_dir

WARM_UPS = 3
"""Runs before a capture, in which libraries set themselves up and allocate what they keep."""
INDUCTOR = {"cpp.threads": 1}
"""What is left between the products is small, and waking threads would cost more than it saves."""
_TRACING = threading.Lock()
"""A tracer replaces methods of `nn.Module` while it works: another one must not find them so."""
_CAPTURING = threading.Lock()
"""CUDA allows for one capture at a time in a process."""
MOST_GRAPHS = 32
"""CUDA graphs kept; the one that has waited longest makes room."""


MOST_BUCKETS = 4
"""Buckets whose tensors are held; one more, and all graphs begin anew."""


def lend(idle: list, make: Callable[[], Any], borrower: object) -> Any:
    """One of the idle, or a new one, for as long as the borrower lives. Threads may share a list."""
    try:
        one = idle.pop()
    except IndexError:
        one = make()
    weakref.finalize(borrower, idle.append, one)
    return one


class NotCapturable(Exception):
    """Why a model cannot be captured; it then runs as it is."""


class CudaGraphs:
    """Functions of fixed shapes as CUDA graphs, one for each key, all in one pool of memory.

    Args:
        cuda: `torch.cuda`; tests put something else in its place.
    """

    def __init__(self, cuda: Any = torch.cuda):
        self._cuda, self._pool, self._stream = cuda, None, None
        self._held: dict[Hashable, list[torch.Tensor]] = {}
        self._kept: dict[Hashable, tuple[Any, list[torch.Tensor], Sequence[torch.Tensor]]] = {}

    def __reduce__(self):
        return CudaGraphs, ()  # a copy, pickled or deep, begins anew

    def held(self, bucket: Hashable, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors that the functions of a bucket read and write beside their inputs, with what `tensors` hold.

        They are moved in whole, so that nothing of an earlier use is left. The shapes are a bucket's own.
        """
        if bucket not in self._held:
            if len(self._held) >= MOST_BUCKETS:
                self._kept, self._held, self._pool = {}, {}, None
            with torch.inference_mode(False):  # or they could be written to in that mode only
                self._held[bucket] = [torch.empty_like(one) for one in tensors]
        for own, one in zip(self._held[bucket], tensors, strict=True):
            if own is not one:
                own.copy_(one)
        return self._held[bucket]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def __call__(
        self, key: Hashable, function: Callable[..., Sequence[torch.Tensor]], *inputs: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        """function(*inputs), for as long as whatever else it reads and writes stays where it is.

        Returns: tensors that the next call for the same key overwrites.
        """
        if key not in self._kept:
            while len(self._kept) >= MOST_GRAPHS:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._capture(function, inputs)
        graph, static, outputs = self._kept[key] = self._kept.pop(key)  # the last one used is the last one dropped
        for held, given in zip(static, inputs, strict=True):
            held.copy_(given)
        graph.replay()
        return outputs

    def _capture(self, function, inputs):
        cuda = self._cuda
        # Outside inference mode, or what is kept could be written to in that mode only. Streams are the current device's.
        with _CAPTURING, cuda.device(inputs[0].device), torch.inference_mode(False), torch.no_grad():
            static = [one.clone() for one in inputs]
            if self._stream is None:  # torch's own is one for all devices and threads
                self._stream = cuda.Stream()
            self._stream.wait_stream(cuda.current_stream())
            with cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    function(*static)
            cuda.current_stream().wait_stream(self._stream)
            graph = cuda.CUDAGraph()
            try:
                # Other threads may go on allocating while this one captures.
                with cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    outputs = function(*static)
            except RuntimeError as error:
                raise NotCapturable(f"it is no CUDA graph: {error}") from error
        self._pool = graph.pool()
        return graph, static, outputs


class _Program(NamedTuple):
    """A layer at fixed shapes: what runs, and how its results go back into what the layer returns."""

    run: Callable[..., Sequence[torch.Tensor]]
    result: list[Any]
    spec: pytree.TreeSpec


class CompiledLayers:
    """The decoder layers of a model, compiled for the shapes they are called with while `bucket` is set.

    Args:
        model: a view of its own (`hedgespec.linear.few_row_view`), whose layers' `forward` is replaced.
        state: by a layer's place, the tensors that it reads or writes beside its arguments and weights.
        compilations: by graph and shapes; given to several models they share them.

    Raises: NotCapturable.
    """

    def __init__(self, model: nn.Module, state: Callable[[int], Sequence[torch.Tensor]], compilations: dict):
        self.bucket: Hashable = None
        """What tells shapes apart, or None: the layers then run as they are."""
        self.compilations = compilations
        self._state = state
        for place, layer in enumerate(layers_of(model)):
            weights = [*layer.parameters(), *layer.buffers()]
            vars(layer)["forward"] = partial(self._forward, place, layer.forward, weights, {})

    def _forward(self, place: int, plain: Callable, weights: list[torch.Tensor], programs: dict, *args, **kwargs):
        if self.bucket is None:
            return plain(*args, **kwargs)
        inputs = [*_tensors(args), *_tensors(kwargs.values()), *self._state(place), *weights]
        if self.bucket not in programs:
            programs[self.bucket] = self._program(partial(plain, *args, **kwargs), inputs)
        program = programs[self.bucket]
        found = iter(program.run(*inputs))
        return pytree.tree_unflatten([next(found) if one is None else one[0] for one in program.result], program.spec)

    def _program(self, call: Callable, inputs: list[torch.Tensor]) -> _Program:
        result, spec = [], None

        def read(*_):  # the inputs are the very tensors that the layer knows, so that tracing finds them there
            nonlocal result, spec
            leaves, spec = pytree.tree_flatten(call())
            result = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
            return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

        try:
            with _TRACING:
                graph = make_fx(read)(*inputs)
                check_fixed(graph)
                key = (graph.code, *((one.shape, one.stride(), one.dtype, one.device) for one in inputs))
                if key not in self.compilations:
                    self.compilations[key] = compiled(graph)
                    self.compilations[key](*inputs)  # a compiler starts with the first call
        except NotCapturable:
            raise
        except Exception as error:  # of the model's code under a tracer, or of a compiler: the layer as it is may do better
            first = next(iter(str(error).splitlines()), "")
            raise NotCapturable(f"its layers cannot be compiled: {type(error).__name__}: {first}") from error
        return _Program(self.compilations[key], result, spec)


def compiled(graph: GraphModule) -> Callable[..., Sequence[torch.Tensor]]:
    """The graph by inductor, out of its cache on disk if an earlier run has seen it."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # seconds that only those wait who compile

    temporary = default_cache_dir()  # which torch puts into the environment, whoever asks first
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", temporary) == temporary:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir() / "inductor")
    return torch.compile(graph, dynamic=False, fullgraph=True, options=INDUCTOR)


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    """Those among the values, and within tuples and lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def check_fixed(graph: GraphModule) -> None:
    """Refuses a traced graph that holds more than its inputs' shapes say. Raises NotCapturable."""
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            raise NotCapturable("its layers read a tensor that is neither argument nor weight")
        tags = getattr(node.target, "tags", ())
        if node.target is torch.ops.aten.index.Tensor and not any(
            one is not None and one.meta["val"].dtype in (torch.bool, torch.uint8) for one in node.args[1]
        ):
            continue  # only a mask picks as many elements as its values say
        if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags:
            raise NotCapturable(f"its layers decide by values what they compute: {node.target}")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, each its own module. Raises NotCapturable."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count == len(set(module)):
            return list(module)
    raise NotCapturable(f"expected a list of {count} decoder layers in {type(model).__name__}, found none")


def check_plain(model: nn.Module) -> None:
    """Refuses a model around whose modules something happens that a capture would not repeat. Raises NotCapturable."""
    for name, module in model.named_modules():
        if _hooks(module):
            raise NotCapturable(f"{name or 'the model'} has a forward hook")
        if hasattr(module, "_hf_hook") or "forward" in vars(module):
            raise NotCapturable(f"{name or 'the model'} has its forward wrapped, by accelerate for one")
        if module.training:
            raise NotCapturable(f"{name or 'the model'} is in training mode")
    if any(isinstance(one, torch.Tensor) and one.is_meta for one in chain(model.parameters(), model.buffers())):
        raise NotCapturable("some of its weights are not in memory")


_OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that every module has: its weights, submodules and hooks, which are looked at one by one."""


def fingerprint(model: nn.Module) -> tuple:
    """What a capture depends on, by identity: equal for a model and views of it, until its modules, weights or hooks change."""
    found = []
    for module in model.modules():
        weights = [one for one in chain(module._parameters.values(), module._buffers.values()) if one is not None]
        wrapped = "forward" in vars(module) or hasattr(module, "_hf_hook")
        hooks = [id(hook) for hook in _hooks(module)]
        places = [(id(one), one.data_ptr()) for one in weights]
        settings = [] if type(module).__module__.startswith("torch.") else _settings(module)
        found.append((type(module), module.training, wrapped, *settings, *hooks, *places))
    return tuple(found)


def _settings(module: nn.Module) -> list:
    """Returns the numbers, strings and short collections of them among a module's attributes, which its forward may read:
    whether an adapter is on, and by how much it is scaled."""
    settings = []
    for name, value in vars(module).items():
        if isinstance(value, bool | int | float | str):
            settings.append((name, value))
        elif isinstance(value, list | tuple | dict | set) and 0 < len(value) <= 8 and name not in _OF_MODULES:
            settings.append((name, str(value)) if all(map(_is_plain, _flat(value))) else (name, len(value)))
    return settings


def _flat(value) -> Iterator[Any]:
    return chain(value.keys(), value.values()) if isinstance(value, dict) else iter(value)


def _is_plain(value) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _hooks(module: nn.Module) -> list[Callable]:
    """Its forward hooks but for those of transformers, which collect the hidden states of layers from outside them."""
    hooks = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
    return [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers.")]
