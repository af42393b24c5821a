"""Measure activation ranges layer by layer, inside a budget, resumable after every layer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamconv import __version__, memory
from streamconv.calibrate.texts import load_texts, tokenize
from streamconv.checkpoint.index import Index, open_index
from streamconv.checkpoint.model_config import from_hf
from streamconv.errors import BudgetError, OutputError, UsageError, printable
from streamconv.memory import MIB, show_size

_TORCH_BASE = 450 * MIB
"""Resident after torch and transformers are loaded (measured)."""


def calibrate(
    model: str | Path,
    out: str | Path,
    text: str,
    *,
    samples: int = 512,
    max_length: int = 512,
    batch_size: int = 1,
    dtype: str = "float16",
    device: str = "cpu",
    memory_budget: int | None = None,
    progress: Callable[[int, int, float], None] = lambda layer, layers, seconds: None,
) -> dict[str, Any]:
    """Write the activation ranges of a model.

    For every linear module M the file holds, in float32, `M.x` [in], `M.y` [out] and `M.w` [out]: the largest absolute
    input of each channel, output of each channel, and weight of each row (quantization spec §6.3).

    Args:
        model: Hugging Face folder with tokenizer.
        out: safetensors file to write.
        text: see `texts.load_texts`.
        samples, max_length: how many samples, how many tokens of each.
        batch_size: samples of equal length that go through a layer together; 1 is what the official loop does.
        dtype: computing type; float16 is what SmoothQuant is measured in, "auto" the source's own (INT8 KV cache).
        memory_budget: bytes; refused before work starts if one layer and a batch do not fit.
        progress: called after each layer with (done, all, seconds left).

    Raises:
        UsageError: no text, unknown dtype. CheckpointError: no tokenizer, no such model. BudgetError: too small.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UsageError("calibration needs transformers", hint="pip install 'streamconv[calibrate]'") from None
    out = Path(out)
    index = open_index(Path(model))
    try:
        return _run(index, out, text, samples, max_length, batch_size, dtype, device, memory_budget, progress)
    finally:
        index.close()


def _run(
    index: Index,
    out: Path,
    text: str,
    samples: int,
    max_length: int,
    batch_size: int,
    dtype: str,
    device: str,
    budget: int | None,
    progress: Callable[[int, int, float], None],
) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file, save_file

    from streamconv.calibrate.layers import OneLayer

    facts = from_hf(index.config)
    kind = (facts.dtype or "float16") if dtype == "auto" else dtype
    if kind not in ("float16", "bfloat16", "float32"):
        raise UsageError(f"--dtype {dtype} is not float16, bfloat16, float32 or auto")
    torch_dtype = getattr(torch, kind)
    _check_budget(index, facts, budget, batch_size * max_length, torch_dtype.itemsize)
    texts = load_texts(text, samples)
    ids = tokenize(index.root, texts, max_length)
    batches = _batches(ids, batch_size)
    mark = hashlib.sha256(json.dumps([__version__, str(index.root.resolve()), kind, batches]).encode()).hexdigest()
    work = out.parent / f".{out.name}.streamconv-calibrate"
    done = _resume(work, mark)
    layer = OneLayer(index.root, index, torch_dtype, device)
    ranges: dict[str, torch.Tensor] = load_file(work / f"ranges-{done}.safetensors") if done else {}
    began = time.monotonic()
    with torch.no_grad():
        if done == 0:
            with open(work / "states-0", "wb") as file:
                for batch in batches:
                    for sample in batch:
                        file.write(_bytes(layer.embed(torch.tensor(sample))))
        first = done
        for number in range(done, layer.layers):
            layer.load(number)
            hooks = [_watch(name, module, ranges) for name, module in layer.linears(number)]
            with open(work / f"states-{number}", "rb") as before, open(work / f"states-{number + 1}", "wb") as after:
                for batch in batches:
                    shape = (len(batch), len(batch[0]), facts.hidden_size)
                    data = bytearray(before.read(shape[0] * shape[1] * shape[2] * torch_dtype.itemsize))
                    states = torch.frombuffer(data, dtype=torch_dtype).reshape(shape).to(device)
                    after.write(_bytes(layer(states)))
                after.flush()
                os.fsync(after.fileno())
            for hook in hooks:
                hook.remove()
            save_file(ranges, work / f"ranges-{number + 1}.safetensors")
            (work / "state.json.new").write_text(json.dumps({"mark": mark, "layers": number + 1}))
            os.replace(work / "state.json.new", work / "state.json")
            (work / f"states-{number}").unlink(missing_ok=True)
            (work / f"ranges-{number}.safetensors").unlink(missing_ok=True)
            spent = time.monotonic() - began
            progress(number + 1, layer.layers, spent / (number + 1 - first) * (layer.layers - number - 1))
    # one entry: the stock writer leaves the order of several to chance
    facts_text = {"calibration": json.dumps({"dtype": kind, "samples": len(ids)})}
    new = out.with_name(f".{out.name}.new")
    try:
        save_file({name: ranges[name] for name in sorted(ranges)}, new, metadata=facts_text)
        os.replace(new, out)
    except OSError as error:
        raise OutputError(f"cannot write {printable(str(out))}: {error.strerror}") from error
    shutil.rmtree(work)
    return {
        "out": str(out),
        "layers": layer.layers,
        "samples": len(ids),
        "tokens": sum(map(len, ids)),
        "tensors": len(ranges),
        "seconds": time.monotonic() - began,
        "peak_memory": memory.peak_resident(),
    }


def _check_budget(index: Index, facts: Any, budget: int | None, tokens: int, itemsize: int) -> None:
    layer = sum(r.nbytes // r.dtype.itemsize * itemsize for n, r in index.tensors.items() if n.startswith("model.layers.0."))
    largest = max((r.nbytes // r.dtype.itemsize * (itemsize + r.dtype.itemsize) for n, r in index.tensors.items() if ".0." in n), default=0)
    width = 4 * facts.hidden_size + 3 * facts.intermediate_size
    need = _TORCH_BASE + layer + largest + tokens * width * max(itemsize, 4)
    free = memory.available() if budget is None else budget
    if need > free:
        raise BudgetError(
            f"calibration takes about {show_size(need)} (one layer {show_size(layer)}), and only {show_size(free)} may be used",
            hint=f"--memory-budget {-(-need // MIB)}MiB, or a smaller --batch-size or --max-length",
        )


def _batches(ids: list[list[int]], size: int) -> list[list[list[int]]]:
    """Neighbours of equal length go together: no padding, so batching changes nothing but speed."""
    batches: list[list[list[int]]] = []
    for sample in ids:
        if batches and len(batches[-1]) < size and len(batches[-1][0]) == len(sample):
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def _resume(work: Path, mark: str) -> int:
    """Layers already done by an interrupted run of the same request."""
    try:
        state = json.loads((work / "state.json").read_text())
        if state["mark"] == mark:
            return int(state["layers"])
    except (OSError, ValueError, KeyError):
        pass
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot write {printable(str(work.parent))}: {error.strerror}") from error
    return 0


def _bytes(tensor: Any) -> bytes:
    import torch

    data: bytes = tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return data


def _watch(name: str, module: Any, ranges: dict[str, Any]) -> Any:
    """Keep the running maxima of a linear module's inputs and outputs, taken in the activation type, kept in float32."""
    import torch

    def largest(values: torch.Tensor) -> torch.Tensor:
        flat = values.detach().reshape(-1, values.shape[-1]).abs()
        return flat.max(dim=0)[0].float().cpu()

    def keep(key: str, values: torch.Tensor) -> None:
        ranges[key] = torch.maximum(ranges[key], values) if key in ranges else values

    def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        keep(f"{name}.x", largest(inputs[0]))
        keep(f"{name}.y", largest(output))

    rows = module.weight.detach().abs().max(dim=1)[0].float().cpu()
    ranges[f"{name}.w"] = rows.clip(min=1e-8)
    return module.register_forward_hook(hook)
