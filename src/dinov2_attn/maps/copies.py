"""Results of a pass on another device, copied there while the pass goes on."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dinov2_attn._compat import is_compiling
from dinov2_attn.errors import InvalidInputError, shown_name
from dinov2_attn.maps.result import changed

# More copies would keep more results of layers in the memory of the GPU.
_RUNNING_AT_MOST = 2


class Copies:
    """Copies tensors to a device.

    From CUDA to the CPU a copy goes to pinned memory on another stream than the pass. So the next
    layers run meanwhile. A result lives on the GPU until its copy is whole.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._to_cpu = device is not None and device.type == "cpu"
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._running: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def begin(self, value: Any, *, may_change: bool = False) -> Any:
        """Return ``value`` with its tensors on the device. They are whole after ``end``.

        Args:
            value: A tensor, or containers of tensors.
            may_change: Whether code may write into the tensors later in the pass. Then the pass
                waits for their copies.

        """
        if self._device is None:
            return value
        return changed(value, partial(self._begin_one, may_change=may_change))

    def end(self) -> None:
        """Wait for the copies that run."""
        while self._running:
            self._wait_for_oldest()

    def whole(self, value: Any) -> Any:
        """Return ``value`` with its tensors on the device, whole at once."""
        device = self._device
        return value if device is None else changed(value, lambda tensor: tensor.to(device))

    def _begin_one(self, tensor: Tensor, *, may_change: bool) -> Tensor:
        if tensor.device.type != "cuda" or not self._to_cpu or is_compiling():
            return tensor.to(self._device)
        current = torch.cuda.current_stream(tensor.device)
        stream = current if may_change else self._stream_of(tensor.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            copy = tensor.to(self._device, non_blocking=True)  # PyTorch pins it
            self._running.append((stream.record_event(), tensor))
        if len(self._running) > _RUNNING_AT_MOST:
            self._wait_for_oldest()
        return copy

    def _stream_of(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            stream: Any = torch.cuda.Stream  # without types
            self._streams[device] = stream(device)
        return self._streams[device]

    def _wait_for_oldest(self) -> None:
        event, _ = self._running.popleft()
        event.synchronize()


def checked_device(device: Any) -> torch.device | None:
    """Return ``device`` as PyTorch's own, None for None.

    Raises:
        InvalidInputError: If it is none that PyTorch can use here.

    """
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InvalidInputError(
            "device as one that PyTorch can use here",
            shown_name(repr(device)),
            'Leave it out for that of the kernel, or pass device="cpu".',
        ) from error
