"""What the pipeline needs of an accelerator, and CUDA as one. Tests put threads in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from streamconv.device import triton_launch as fused
from streamconv.device.sizing import NoRoom
from streamconv.lazy import torch

T = TypeVar("T")


class Backend(Protocol):
    """Streams run what they are given in order and apart from each other; streams and events are opaque.

    Errors of something asynchronous may be raised by any later call.
    """

    name: str

    def alloc_pinned(self, size: int) -> torch.Tensor:
        """uint8 [size] in host memory that copies need not stage."""

    def alloc_device(self, size: int) -> torch.Tensor:
        """uint8 [size] on the device; an error for which `is_full` holds if there is no room."""

    def free_memory(self) -> int:
        """Bytes of the device that nobody uses now."""

    def limit(self, size: int | None) -> None:
        """From now on this process takes no more than `size` bytes of the device for further tensors; None: as much as before."""

    def stream(self) -> Any:
        """A new stream."""

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: Any) -> None:
        """Start copying (to, from) between host and device, 1-D uint8 tensors of the same size."""

    def run(self, stream: Any, work: Callable[[], T]) -> T:
        """Call `work`; what it computes on the device is put on `stream`."""

    def record(self, stream: Any) -> Any:
        """An event that happens when all that the stream was given until now is done."""

    def follow(self, stream: Any, event: Any) -> None:
        """What the stream is given from now on starts after the event."""

    def wait(self, event: Any) -> None:
        """Until the event has happened."""

    def is_full(self, error: BaseException) -> bool:
        """The device has no memory left."""

    def is_lost(self, error: BaseException) -> bool:
        """The device does not work any more."""

    def relieve(self) -> None:
        """Give cached device memory back to other users."""

    def unfused(self) -> str | None:
        """Why fused kernels cannot run here ("": nobody need know), None if they can."""


class Cuda:
    """A CUDA device, `name` as in "cuda:0".

    Every thread has a current device, at its start the first one, and whatever does not ask torch (Triton for one) runs there. So
    all that is made or started here is made with this device as the current one, which afterwards is again what it was.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._device = torch.device(name)
        try:
            with self._current():
                torch.zeros(1, device=self._device)  # the context exists, and is counted, from here on
        except RuntimeError as error:
            hint = "free it, name another device, or use --device cpu"
            raise NoRoom(f"{name} cannot be used: {str(error).splitlines()[0]}", hint=hint) from error
        before = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch 2.7
        self._fraction = float(before(self._device)) if before is not None else 1.0
        with self._current():
            self._unfused = fused.works(self._device)  # and what compiling takes of the host's memory is counted too

    def _current(self) -> AbstractContextManager[None]:
        return torch.cuda.device(self._device)

    def alloc_pinned(self, size: int) -> torch.Tensor:
        with self._current():
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def alloc_device(self, size: int) -> torch.Tensor:
        with self._current():
            return torch.empty(size, dtype=torch.uint8, device=self._device)

    def free_memory(self) -> int:
        with self._current():
            torch.cuda.empty_cache()  # what torch keeps for itself is free
            return int(torch.cuda.mem_get_info(self._device)[0])

    def limit(self, size: int | None) -> None:
        cuda, fraction = torch.cuda, self._fraction
        with self._current():
            if size is not None:  # on top of what others in this process hold, which torch counts too
                cuda.empty_cache()
                reserved = int(cuda.memory_reserved(self._device))
                fraction = min(fraction, (reserved + size) / int(cuda.mem_get_info(self._device)[1]))
            cuda.set_per_process_memory_fraction(fraction, self._device)

    def stream(self) -> Any:
        with self._current():
            return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: Any) -> None:
        with self._current(), torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def run(self, stream: Any, work: Callable[[], T]) -> T:
        with self._current(), torch.cuda.stream(stream):
            return work()

    def record(self, stream: Any) -> Any:
        # waiting for it sleeps and does not spin: the processor belongs to the workers that read and write
        with self._current():
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(stream)
            return event

    def follow(self, stream: Any, event: Any) -> None:
        with self._current():
            stream.wait_event(event)

    def wait(self, event: Any) -> None:
        with self._current():
            event.synchronize()

    def is_full(self, error: BaseException) -> bool:
        text = str(error).lower()
        return isinstance(error, torch.cuda.OutOfMemoryError) or (
            isinstance(error, RuntimeError) and "cuda" in text and "out of memory" in text
        )

    def is_lost(self, error: BaseException) -> bool:
        text = str(error)
        return isinstance(error, RuntimeError) and ("CUDA error" in text or "CUDA driver error" in text) and not self.is_full(error)

    def relieve(self) -> None:
        with self._current():
            torch.cuda.empty_cache()

    def unfused(self) -> str | None:
        return self._unfused
