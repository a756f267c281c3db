"""What passes between host and device without either waiting for the other, and work on the device beside its main work.

Where the device is the CPU all of it happens at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence


def to_device(values: np.ndarray | torch.Tensor | Sequence, device: torch.device) -> torch.Tensor:
    """Numbers of the host as a tensor on the device. From pageable memory a copy would wait for all work before it."""
    values = torch.as_tensor(values)
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def index_of(places: Sequence[int], everyone: Sequence, device: torch.device) -> slice | torch.Tensor:
    """Returns an index for ascending places of a sequence, on the device: a slice where it is all of them."""
    return slice(None) if len(places) == len(everyone) else to_device(places, device)


def stack(tensors: Sequence[torch.Tensor], padding: float) -> torch.Tensor:
    """Stacks tensors [T_b, ...] into one, [B, max T_b, ...], padded on the right."""
    if len(tensors) == 1:
        return tensors[0][None]
    return pad_sequence(list(tensors), batch_first=True, padding_value=padding)


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Returns the stream that work on the device goes to; None on a CPU, where nothing is queued."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def settle(device: torch.device) -> None:
    """Waits for the current stream of the device: whatever it has made may then be read on any stream, by any thread."""
    stream = current_stream(device)
    if stream is not None:
        stream.synchronize()


class Kept:
    """A tensor that is made on demand and kept, for every stream that asks later.

    Streams run beside each other, so a stream might read the tensor before the one that made it has written it, and memory that
    is freed might be written to again while another stream still reads. The constructor therefore waits, once, for the current
    stream, which made the tensor; and the allocator is told of every other stream that gets it.

    Args:
        tensor: made on the current stream of its device.
    """

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._stream = tensor, current_stream(tensor.device)
        settle(tensor.device)

    def get(self) -> torch.Tensor:
        """Returns the tensor, for work on the current stream."""
        if self._stream is not None:
            stream = current_stream(self._tensor.device)
            if stream != self._stream:
                assert stream is not None  # as there is one for the tensor's device
                self._tensor.record_stream(stream)
        return self._tensor


class SideStream:
    """A CUDA stream for work that nothing on the current stream waits for.

    Args:
        device: of the work.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def work(self, *inputs: torch.Tensor | None) -> Iterator[None]:
        """What the block launches runs once the current stream has made `inputs`, which stay allocated until then."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        for tensor in inputs:
            if tensor is not None:
                tensor.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield

    def to_host(self, tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        """Sends what the stream has made; call the answer to wait until it has arrived."""
        if self.stream is None:
            return tensor.numpy
        with torch.cuda.stream(self.stream):
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            held.copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()

        def wait() -> np.ndarray:
            arrived.synchronize()
            return held.numpy()

        return wait
