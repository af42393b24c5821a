"""A device that is none: streams are threads, copies and kernels take their time, memory runs out and devices die on request.

Nothing a stream was given has happened before an event says so; a ring that forgets to wait gives wrong bytes.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Full(RuntimeError):
    """Out of device memory."""


class Lost(RuntimeError):
    """The device is gone."""


class Stream:
    """A thread that does what it is given, in order."""

    def __init__(self) -> None:
        self.todo: queue.SimpleQueue[Callable[[], Callable[[], None] | None]] = queue.SimpleQueue()
        self.error: BaseException | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            work, then = self.todo.get(), None
            try:
                then = work()
            except BaseException as error:
                self.error = error
            del work  # and the memory it names
            if then is not None:
                then()
            del then


class StandIn:
    """See `streamconv.device.backend.Backend`.

    Args:
        memory: bytes of the device.
        delay: seconds of the n-th copy or kernel.
        dies: the n-th kernel (counted from 0) finds the device gone.
        full: whether the n-th kernel finds no memory.
        unfused: why there are no fused kernels.
    """

    def __init__(
        self,
        memory: int = 1 << 30,
        delay: Callable[[int], float] = lambda n: 0.0,
        dies: int | None = None,
        full: Callable[[int], bool] = lambda n: False,
        name: str = "stand-in",
        unfused: str | None = "",
    ) -> None:
        self.why_unfused = unfused
        self.name, self.memory, self.delay, self.dies, self.full = name, memory, delay, dies, full
        self.taken = self.kernels = self.copies = self.relieved = self.pinned = self.most = 0
        self.room: int | None = None
        self.rooms: list[int | None] = []
        self.seen: list[tuple[str, float, float]] = []
        self._lock = threading.Lock()

    def alloc_pinned(self, size: int) -> torch.Tensor:
        self.pinned += size
        return torch.empty(size, dtype=torch.uint8)

    def alloc_device(self, size: int) -> torch.Tensor:
        with self._lock:
            if self.taken + size > (self.memory if self.room is None else min(self.room, self.memory)):
                raise Full("out of memory")
            self.taken += size
            self.most = max(self.most, self.taken)
        made = torch.full((size,), 0x5A, dtype=torch.uint8)
        weakref.finalize(made, self._freed, size)
        return made

    def _freed(self, size: int) -> None:
        self.taken -= size

    def free_memory(self) -> int:
        return self.memory - self.taken

    def limit(self, size: int | None) -> None:
        self.room = size
        self.rooms.append(size)

    def stream(self) -> Stream:
        return Stream()

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: Stream) -> None:
        for target, source in pairs:
            self._copy(target, source, stream)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        assert target.dtype == source.dtype == torch.uint8 and target.shape == source.shape
        with self._lock:
            number, self.copies = self.copies, self.copies + 1

        def work() -> None:
            began = time.monotonic()
            time.sleep(self.delay(number))
            target.copy_(source)
            self.seen.append(("copy", began, time.monotonic()))

        stream.todo.put(work)

    def run(self, stream: Stream, work: Callable[[], Any]) -> Any:
        with self._lock:
            number, self.kernels = self.kernels, self.kernels + 1
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def kernel() -> Callable[[], None]:
            began, told = time.monotonic(), list[Any]()
            try:
                if self.dies is not None and number >= self.dies:
                    raise Lost("unspecified launch failure\nmore lines")
                if self.full(number):
                    raise Full("out of memory")
                time.sleep(self.delay(number))
                told.append((work(), None))
            except BaseException as error:
                told.append((None, error))
            self.seen.append(("kernel", began, time.monotonic()))
            return lambda: answer.put(told.pop())  # when this thread holds nothing of the kernel any more

        stream.todo.put(kernel)
        made, error = answer.get()
        if error is not None:
            try:
                raise error
            finally:
                del error  # which names this frame
        return made

    def record(self, stream: Stream) -> tuple[threading.Event, Stream]:
        event = threading.Event()
        stream.todo.put(event.set)
        return event, stream

    def follow(self, stream: Stream, event: tuple[threading.Event, Stream]) -> None:
        stream.todo.put(lambda: (event[0].wait(60), None)[1])

    def wait(self, event: tuple[threading.Event, Stream]) -> None:
        assert event[0].wait(60), "the stream never came so far"
        if event[1].error is not None:
            raise event[1].error

    def is_full(self, error: BaseException) -> bool:
        return isinstance(error, Full)

    def is_lost(self, error: BaseException) -> bool:
        return isinstance(error, Lost)

    def relieve(self) -> None:
        self.relieved += 1

    def unfused(self) -> str | None:
        return self.why_unfused
