"""GB/s of source on a GPU: whole conversions from the page cache and from the disk, on the GPU and on the CPU; the ring alone, without
files; against the pinned copy rate and against plain torch (load, quantize on the GPU, .cpu(), save), all in one run. And the
calibration of a 2.2 GB model against the pure forward time.

    python benchmarks/gpu.py [--gb 4] [--folder benchmarks/work] [--out benchmarks/results/gpu.json] [--only ring]
        [--no-gpu]

--no-gpu runs everything that needs none, with a stand-in in the place of the ring's device: for trying the benchmark, its figures
mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, from anywhere

from benchmarks.make_model import Shape, write_model

ROOT = Path(__file__).parent.parent
MIB, GIB = 1 << 20, 1 << 30
JOBS: dict[str, list[str]] = {
    "int8": ["--quant", "int8", "--target-sm", "90"],
    "int4": ["--quant", "int4", "--target-sm", "90"],
    "fp8_rowwise": ["--quant", "fp8_rowwise"],
    "smoothquant": ["--quant", "smoothquant", "--dtype", "float16", "--per-channel", "--per-token"],
    "bf16 to fp16": ["--dtype", "float16"],
}


def make_source(folder: Path, gb: float, hidden: int, inter: int) -> int:
    """A bf16 Llama of about `gb` GB with activation ranges beside it; bytes of its tensors."""
    heads = hidden // 64
    layer = 2 * (2 * hidden * hidden + 2 * hidden * hidden // 4 + 3 * hidden * inter)
    layers = max(2, round(gb * 1e9 / layer))
    size = write_model(folder, Shape(hidden, layers, inter, heads, max(1, heads // 4), 32 * heads, 64, "bf16"))
    import torch
    from safetensors.torch import save_file

    kv = max(1, heads // 4) * 64
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv)}
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inter), "mlp.up_proj": (hidden, inter)}
    shapes |= {"mlp.down_proj": (inter, hidden)}
    ranges = {}
    for number in range(layers):
        for name, (inputs, outputs) in shapes.items():
            for end, length in (("x", inputs), ("y", outputs), ("w", outputs)):
                ranges[f"model.layers.{number}.{name}.{end}"] = torch.rand(length) * 4 + 0.1
    save_file(ranges, folder / "ranges.st")
    return size


def forget(folder: Path) -> None:
    """Take the source out of the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def best_of_two(job: str, device: str, source: Path, cold: bool) -> dict[str, Any]:
    """The quicker of two conversions: the first of a machine compiles kernels, which are kept."""
    return min((convert(job, device, source, cold) for _ in range(2)), key=lambda told: told.get("seconds", float("inf")))


def convert(job: str, device: str, source: Path, cold: bool) -> dict[str, Any]:
    """One conversion in a process of its own; rates are source bytes over the tile phase and over the whole run."""
    out = source.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    if cold:
        forget(source)
    command = [sys.executable, "-m", "streamconv", "convert", str(source), str(out), "--json", "--device", device, *JOBS[job]]
    command += ["--memory-budget", "2GiB", "--device-memory-budget", "2GiB"]
    if job == "smoothquant":
        command += ["--activation-ranges", str(source / "ranges.st")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        return {"error": (done.stderr.strip() or done.stdout.strip())[-500:]}
    told = json.loads(done.stdout)
    return {
        "device": told["device"],
        "tile GB/s": told["bytes_read"] / told["profile"]["tiles"] / 1e9,
        "whole GB/s": told["bytes_read"] / told["seconds"] / 1e9,
        "seconds": told["seconds"],
        "profile": told["profile"],
        "workers": told["workers"],
        "peak host bytes": told["peak_memory"],
    }


def copy_rates() -> dict[str, float]:
    """GB/s of pinned copies to the device, and to and from it at once."""
    import torch

    host, back = (torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    there, other = (torch.empty(256 * MIB, dtype=torch.uint8, device="cuda") for _ in range(2))
    one, two = torch.cuda.Stream(), torch.cuda.Stream()

    def rate(both: bool) -> float:
        best = 0.0
        for _ in range(5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(4):
                with torch.cuda.stream(one):
                    there.copy_(host, non_blocking=True)
                if both:
                    with torch.cuda.stream(two):
                        back.copy_(other, non_blocking=True)
            torch.cuda.synchronize()
            best = max(best, 4 * host.numel() / (time.perf_counter() - began) / 1e9)
        return best

    return {"to the device GB/s": rate(False), "to the device while copying back GB/s": rate(True)}


def encodings(job: str, cols: int) -> Any:
    """The encoding of a job's weights, bound to a smoother where it needs one."""
    import numpy as np

    from streamconv.checkpoint.dtypes import F16
    from streamconv.quants.fp8_rowwise import Fp8Rowwise
    from streamconv.quants.plain import Plain
    from streamconv.quants.smoothing import Bound
    from streamconv.quants.smoothquant import SmoothWeight
    from streamconv.quants.weight_only import WeightOnly

    if job == "smoothquant":
        bound = Bound(np.random.default_rng(1).random(cols) + 0.5, 3.0)
        return SmoothWeight(None, F16, None, bound=bound)  # type: ignore[arg-type]
    weights = {bits: WeightOnly(int(bits[3:]), "sm90-0.16", F16) for bits in ("int8", "int4")}
    return {**weights, "fp8_rowwise": Fp8Rowwise()}.get(job, Plain(F16))


def ring_rate(job: str, backend: Any, seconds: float, cols: int = 4096, arena: int = 0, most: int = 0) -> dict[str, Any]:
    """GB/s of source through the ring alone: the same tile over and over in every slot, nothing read or written.

    Args:
        arena: pinned bytes of a slot, 0: what a conversion takes.
        most: slots, 0: as many as a conversion takes.
    """
    from streamconv import device
    from streamconv.checkpoint.dtypes import BF16
    from streamconv.checkpoint.rows import SourceTensor
    from streamconv.planning import memory_plan
    from streamconv.planning.plan import PLAIN_ROWS, Destination, Matrix, RowRange
    from streamconv.planning.tasks import EncodeTask

    encoding, arena = encodings(job, cols), arena or device.BEST_ARENA
    parts = encoding.parts(64, cols)
    rows = (arena - 65536) // (2 * cols + sum(part.record_bytes for part in parts)) // 64 * 64
    columns = ((0, cols),)
    span = RowRange(SourceTensor("w", BF16, (rows, cols), ()), 0, rows, PLAIN_ROWS, (Destination(0, 0, columns),), 64)
    need = device.demand([span], (Matrix(0, "w", rows, cols, rows, encoding, ()),), backend.unfused() is None)
    sizes = device.fit(backend.free_memory(), 2 * GIB, most or device.slots(memory_plan.processors(), 1), need)
    ring, size = device.DevicePipeline(backend, sizes), rows * span.row_bytes
    if backend.name.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
    moved, errors, stop = [0] * sizes.slots, list[BaseException](), threading.Event()

    def work(number: int) -> None:
        try:
            slot = ring.slot(arena)
            slot.arena[:size] = 0x3C  # bf16 0.0115
            while not stop.is_set():
                slot.encode([device.Job(EncodeTask(columns, encoding))], span, rows, slot.arena[:size], slot.arena[size:])
                moved[number] += size
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(sizes.slots)]
    for thread in threads:
        thread.start()
    while min(moved) < 3 * size and not stop.wait(0.01):  # memory is pinned, kernels are compiled
        pass
    before, began = sum(moved), time.perf_counter()
    stop.wait(seconds)
    after, ended = sum(moved), time.perf_counter()
    stop.set()
    for thread in threads:
        thread.join()
    ring.close()
    if errors:
        return {"error": repr(errors[0])}
    rate = (after - before) / (ended - began) / 1e9
    told = {"GB/s": rate, "slots": sizes.slots, "chunk": sizes.chunk, "pinned bytes": sizes.slots * arena, "halvings": ring.halvings}
    told["fused"] = ring.unfused or ring.unfused is None
    if backend.name.startswith("cuda"):
        told["device bytes"] = torch.cuda.max_memory_reserved()
    return told


def plain(job: str, source: Path, device: str) -> dict[str, float]:
    """Load a file, quantize each tensor on the device, .cpu(), save: what one would write without us."""
    import torch
    from safetensors.torch import load_file, save_file

    from streamconv.quants.base import EncodeStats

    out = source.parent / "plain.safetensors"
    torch.zeros(1, device=device)
    began, size = time.perf_counter(), 0
    for path in sorted(source.glob("*.safetensors")):
        made = {}
        for name, weight in load_file(path).items():
            size += weight.numel() * weight.element_size()
            if weight.dim() < 2 or "layers" not in name:
                made[name] = weight.to(torch.float16)
                continue
            parts = encodings(job, weight.shape[1]).encode(weight.to(device), EncodeStats())
            made |= {f"{name}.{number}": part.cpu() for number, part in enumerate(parts)}
        save_file(made, out)
    seconds = time.perf_counter() - began
    out.unlink()
    return {"GB/s": size / seconds / 1e9, "seconds": seconds}


def backends(no_gpu: bool) -> Iterator[Any]:
    while True:
        if no_gpu:
            from tests.stand_in import StandIn

            yield StandIn()
        else:
            from streamconv.device.backend import Cuda

            yield Cuda("cuda:0")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11264)
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "work", help="on the disk")
    parser.add_argument("--memory-folder", type=Path, default=Path("/dev/shm"), help="in the page cache")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each ring measurement")
    parser.add_argument("--limit", type=float, default=450, help="seconds after which what is left is skipped")
    parser.add_argument("--no-gpu", action="store_true")
    parser.add_argument("--only", choices=["ring", "cache", "disk", "calibration"], action="append", help="measure these (all)")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--arena", type=int, default=0, help="MiB pinned for each slot of the ring measurements (what a conversion takes)")
    parser.add_argument("--slots", type=int, default=0, help="slots of the ring measurements (as many as a conversion takes)")
    args = parser.parse_args()
    import torch

    began = time.monotonic()
    if not args.no_gpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --no-gpu tries the benchmark without one")
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "processors": len(os.sched_getaffinity(0))}
    found["gpu"] = "none: figures of a stand-in" if args.no_gpu else torch.cuda.get_device_name()

    def measure(name: str, how: Callable[[], Any]) -> None:
        if time.monotonic() - began > args.limit:
            found[name] = {"skipped": f"{args.limit:.0f} s were over"}
        else:
            found[name] = how()
        print(f"{name}: {json.dumps(found[name])}", flush=True)

    device, make = ("cpu" if args.no_gpu else "cuda:0"), backends(args.no_gpu)
    if not args.no_gpu:
        measure("pinned copies", copy_rates)
    only = args.only or ["ring", "calibration", "cache", "disk"]
    for job in args.jobs if "ring" in only else []:
        measure(f"ring, {job}", lambda job=job: ring_rate(job, next(make), args.seconds, 4096, args.arena * MIB, args.slots))
    if "calibration" in only:
        from benchmarks.calibration import against_forward

        work, (samples, length) = args.memory_folder / f"streamconv-calibration-{os.getpid()}", (8, 16) if args.no_gpu else (512, 512)
        try:
            measure("calibration", lambda: against_forward(work, device, samples, length))
        finally:
            shutil.rmtree(work, ignore_errors=True)
    places = [("page cache", args.memory_folder, False), ("disk", args.folder, True)]
    for place, folder, cold in [place for place in places if place[0].split()[-1] in only]:
        folder.mkdir(parents=True, exist_ok=True)
        work = folder / f"streamconv-gpu-{os.getpid()}"
        try:
            found[f"source bytes, {place}"] = make_source(work / "model", args.gb, args.hidden, args.intermediate)
            for job in args.jobs:
                for where in dict.fromkeys((device, "cpu")):
                    measure(f"{place}, {job}, {where}", lambda j=job, w=where, s=work / "model", c=cold: best_of_two(j, w, s, c))
                if not cold:
                    measure(f"plain torch, {place}, {job}", lambda j=job, s=work / "model": plain(j, s, device))
        finally:
            shutil.rmtree(work, ignore_errors=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    if not args.no_gpu and "ring" in only:
        ceiling = found["pinned copies"]["to the device GB/s"]
        print(f"ring over pinned copies ({ceiling:.1f} GB/s):", end=" ")
        print(", ".join(f"{job} {found[f'ring, {job}'].get('GB/s', 0) / ceiling:.2f}" for job in args.jobs))
    return any("error" in value for value in found.values() if isinstance(value, dict))


if __name__ == "__main__":
    sys.exit(main())
