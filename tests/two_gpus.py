"""Two CUDA devices that are none, under torch: every thread has a current device, as in CUDA, and an allocation, a kernel, an event,
a stream or a copy for a device that is not the current one is an error.

torch itself switches for its own operations; Triton and others do not, so nothing may rely on it. Streams do what they are given at once.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

GIB = 1 << 30
_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.tensor, torch.arange)
_VIEWS = (
    "view", "reshape", "__getitem__", "size", "numel", "stride", "dim", "data_ptr", "untyped_storage", "element_size", "nelement",
    "is_contiguous", "is_pinned", "record_stream", "detach", "t", "narrow", "__get__", "__len__", "expand", "unbind", "split", "transpose",
    "view_as", "storage_offset", "unsqueeze", "squeeze", "flatten", "permute",
)  # fmt: skip


class WrongDevice(AssertionError):
    """Something was made or started for a device while another was current."""


class There(torch.Tensor):
    """A tensor that says it lies on a device."""

    where: int


class Machine(TorchFunctionMode):
    """The torch of a machine with `count` devices; active in every thread that enters it.

    Attributes:
        launched: kernels of each device.
        fractions: what each device's allocator may take, 1.0: everything.
        held: bytes of each device that others in this process hold.
    """

    def __init__(self, count: int = 2, memory: int = 8 * GIB) -> None:
        super().__init__()
        self.count, self.memory, self.held = count, memory, [0] * count
        self.launched: Counter[int] = Counter()
        self.fractions = [1.0] * count
        self.waits = 0  # what torch.cuda.get_sync_debug_mode says
        self.broken = False
        self._mine = threading.local()

    @property
    def current(self) -> int:
        """As cudaGetDevice: of this thread, 0 at its start."""
        return int(getattr(self._mine, "device", 0))

    @current.setter
    def current(self, number: int) -> None:
        self._mine.device = number

    def check(self, number: int, what: str) -> None:
        if number != self.current:
            raise WrongDevice(f"{what} of cuda:{number} while cuda:{self.current} is current")

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if func is torch.Tensor.device.__get__ and isinstance(args[0], There):
            return torch.device("cuda", args[0].where)
        if func is torch.Tensor.is_cuda.__get__:
            return isinstance(args[0], There)
        device = _number(kwargs.get("device"))
        if func in _FACTORIES:
            kwargs.pop("pin_memory", None)
            if device is not None:
                self.check(device, f"torch.{name}")
                kwargs.pop("device")
            return self._there(func(*args, **kwargs), device)
        if name in ("to", "cpu"):
            return self._moved(func, name, args, kwargs, device)
        mine = {value.where for value in _tensors((args, kwargs)) if isinstance(value, There)}
        if not mine:
            return func(*args, **kwargs)
        if name not in _VIEWS:
            for number in sorted(mine):
                self.check(number, name)
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **kwargs)
        if name == "copy_":
            return made
        return self._there(made, min(mine))

    def _moved(self, func: Any, name: str, args: Any, kwargs: Any, device: int | None) -> Any:
        for place, value in enumerate(args[1:], 1):
            if isinstance(value, (str, torch.device)):
                device = _number(value)
                args = (*args[:place], "cpu", *args[place + 1 :])
        kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        own = args[0].where if isinstance(args[0], There) else None
        for number in {own, device} - {None}:
            self.check(int(number), name)  # type: ignore[arg-type]
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **kwargs).as_subclass(torch.Tensor)
        to_cpu = name == "cpu" or any(isinstance(value, str) for value in args[1:])
        return self._there(made, device if device is not None else None if to_cpu else own)

    def _there(self, made: Any, number: int | None) -> Any:
        if number is None or not isinstance(made, torch.Tensor):
            return made
        made = made.as_subclass(There)
        made.where = number
        return made


def _number(device: Any) -> int | None:
    device = torch.device(device) if isinstance(device, str) else device
    return (device.index or 0) if isinstance(device, torch.device) and device.type == "cuda" else None


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def install(patch: Callable[..., None], machine: Machine) -> None:
    """Put the machine in place of torch.cuda's functions and of the fused kernels (monkeypatch.setattr is `patch`)."""
    from streamconv.device import triton_launch as registry

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.number = machine.current if device is None else _number(device)
            self.device = torch.device("cuda", self.number)
            machine.check(self.number, "a stream")  # type: ignore[arg-type]

        def wait_event(self, event: Any) -> None:
            machine.check(self.number, "waiting for an event on a stream")  # type: ignore[arg-type]

    class Event:
        number: int | None = None

        def __init__(self, blocking: bool = False) -> None:
            pass

        def record(self, stream: Stream) -> None:
            machine.check(stream.number, "an event")  # type: ignore[arg-type]
            self.number = stream.number

        def synchronize(self) -> None:
            machine.check(self.number, "waiting for an event")  # type: ignore[arg-type]

    @contextlib.contextmanager
    def on(device: Any) -> Iterator[None]:
        before = machine.current
        number = _number(device) if not isinstance(device, int) else device
        assert number is not None and number < machine.count
        machine.current = number
        try:
            yield
        finally:
            machine.current = before

    @contextlib.contextmanager
    def stream_context(stream: Stream) -> Iterator[None]:
        machine.check(stream.number, "a stream's context")  # type: ignore[arg-type]
        yield

    def limited(fraction: float, device: Any = None) -> None:
        number = machine.current if device is None else _number(device)
        machine.current = number  # type: ignore[assignment]  # torch does, and leaves it so
        assert 0 < fraction <= 1
        machine.fractions[number] = fraction  # type: ignore[index]

    class Graph:
        def __init__(self) -> None:
            self.replayed = 0

        def capture_begin(self, pool: Any = None) -> None:
            machine.broken = False

        def capture_end(self) -> None:
            assert not machine.broken, "torch's allocator never learns that this capture has ended"

        def replay(self) -> None:
            self.replayed += 1

    class Capture:
        default_capture_stream: Stream | None = None

        def __init__(self, graph: Graph, pool: Any = None, stream: Stream | None = None) -> None:
            if stream is None:
                Capture.default_capture_stream = Capture.default_capture_stream or Stream()
            self.graph, self.stream = graph, stream or Capture.default_capture_stream

        def __enter__(self) -> None:
            machine.check(self.stream.number, "a capture")  # type: ignore[union-attr,arg-type]
            self.graph.capture_begin()

        def __exit__(self, *_: object) -> None:
            self.graph.capture_end()

    def waited() -> None:
        if machine.waits == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        machine.broken = True

    def number_of(device: Any) -> int:
        return machine.current if device is None else _number(device) or 0

    for name, value in {
        "is_available": lambda: True, "device_count": lambda: machine.count, "is_initialized": lambda: True,
        "current_device": lambda: machine.current, "device": on, "stream": stream_context, "Stream": Stream, "Event": Event,
        "current_stream": lambda device=None: Stream(device), "synchronize": lambda device=None: None, "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (machine.memory - machine.held[number_of(device)], machine.memory),
        "memory_reserved": lambda device=None: machine.held[number_of(device)],
        "set_per_process_memory_fraction": limited, "get_per_process_memory_fraction": lambda d=None: machine.fractions[number_of(d)],
        "CUDAGraph": Graph, "graph": Capture, "graph_pool_handle": lambda: (0, 1), "waited": waited,
        "get_sync_debug_mode": lambda: machine.waits,
        "set_sync_debug_mode": lambda mode: setattr(machine, "waits", {"default": 0, "warn": 1, "error": 2}.get(mode, mode)),
    }.items():  # fmt: skip
        patch(torch.cuda, name, value, raising=False)
    patch(torch.Tensor, "record_stream", lambda self, stream: None)
    start = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with machine:
            start(thread)

    patch(threading.Thread, "run", run)
    fake = types.ModuleType("streamconv.device.triton_kernels")
    fake.cast = _Kernel(machine)  # type: ignore[attr-defined]
    patch(sys.modules["streamconv.device"], "triton_kernels", fake, raising=False)
    for kind in list(registry._KERNELS):
        patch(registry, "_KERNELS", registry._KERNELS | {kind: _definition})


class _Kernel:
    """What Triton makes of a function: it runs where the thread is, and cannot see the memory of other devices."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self

    def __call__(self, *args: Any, encoding: Any = None, dtype: Any = None, **constants: Any) -> None:
        for place, value in enumerate(args):
            if isinstance(value, There) and value.where != self.machine.current:
                raise ValueError(f"Pointer argument (at {place}) cannot be accessed from Triton (cpu tensor?)")
        self.machine.launched[self.machine.current] += 1
        if encoding is None:  # what `works` tries
            args[1].copy_(args[0].view(torch.bfloat16).reshape(-1).to(args[1].dtype))
            return
        from streamconv.quants.base import EncodeStats

        block, counts, *outs = args
        found = EncodeStats()
        for out, made in zip(outs, encoding.encode(block.view(dtype), found), strict=True):
            out.copy_(made)
        counts += torch.tensor([found.nonfinite, found.overflow], dtype=torch.int32)


def _definition(encoding: Any) -> Any:
    """A fused kernel of which the torch definition is the code."""
    from streamconv.device import triton_launch as registry

    def launch(block: torch.Tensor, outs: Any, counts: torch.Tensor) -> None:
        registry._run("cast", 1, block, counts, *outs, encoding=encoding, dtype=block.dtype)

    return launch
