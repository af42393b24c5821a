"""Measure activation ranges layer by layer, inside a budget, resumable after every layer."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamconv import __version__, memory
from streamconv.calibration import pretrained
from streamconv.calibration.request import DTYPES, Loop
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.model_config import ModelConfig
from streamconv.checkpoint.quantized import source_quantization
from streamconv.errors import BudgetError, CheckpointError, DataError, OutputError, RefusedError, UsageError, printable
from streamconv.hub import local_folder, open_source
from streamconv.memory import MIB, show_size
from streamconv.run.fs import beside, explained, named

if TYPE_CHECKING:
    import torch

    from streamconv.calibration.layers import OneLayer
    from streamconv.calibration.scratch import Scratch

Progress = Callable[[int, int, float], None]
Sampled = Callable[[int, int, int, int], None]

_TORCH_BASE = 450 * MIB
"""Resident after torch and transformers are loaded (measured)."""

_WEIGHTS = ("F16", "BF16", "F32", "F64")

_GROUP = 32 * MIB
"""Bytes of embedded samples that are made together."""


def _silent(layer: int, layers: int, seconds: float) -> None:
    pass


def calibrate(
    model: str | Path,
    out: str | Path,
    text: str,
    *,
    samples: int = 512,
    max_length: int = 512,
    batch_size: int = 1,
    dtype: str = "float16",
    loop: Loop = "trtllm",
    device: str = "auto",
    memory_budget: int | None = None,
    reuse: bool = False,
    progress: Progress = _silent,
    sampled: Sampled = lambda layer, layers, sample, samples: None,
) -> dict[str, Any]:
    """Write the activation ranges of a model.

    For every linear module M the file holds, in float32, `M.x` [in], `M.y` [out] and `M.w` [out]: the largest absolute
    input of each channel, output of each channel, and weight of each row (quantization spec §6.3).

    Args:
        model: Hugging Face folder with tokenizer, or a model of the Hub, which is downloaded.
        out: safetensors file to write.
        text: see `texts.load_texts`.
        samples, max_length: how many samples, how many tokens of each.
        batch_size: samples of equal length that go through a layer together; 1 is what the official loop does.
        dtype: computing type; float16 is what SmoothQuant is measured in, "auto" the source's own (INT8 KV cache, FP8).
        loop: whose samples: "trtllm" (SmoothQuant, INT8 KV cache) or "modelopt" (FP8); quantization spec §16.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        memory_budget: bytes; refused before work starts if one layer and a batch do not fit.
        reuse: leave a file that the same request made as it is.
        progress: called after each layer with (done, all, seconds left).
        sampled: called within a layer, at most once a second, with (layers done, all layers, samples through this one, all samples).

    Raises:
        UsageError: no text, unknown dtype, no such device. CheckpointError: no tokenizer, no such model.
        BudgetError: too small. OutputError: no room, or not writable.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UsageError("calibration needs transformers", hint="pip install 'streamconv[calibrate]'") from None
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    if batch_size < 1 or max_length < 1 or samples == 0:
        raise UsageError("--samples, --max-length and --batch-size must be at least 1")
    out = named(out)
    with contextlib.closing(open_source(local_folder(model))) as index:
        refuse_quantized(index)
        run = _Run(index, out, batch_size, dtype, loop, device, memory_budget)
        try:
            return run.measure(text, samples, max_length, reuse, progress, sampled)
        finally:
            if run.device != "cpu":
                give_back()


def refuse_quantized(index: Index) -> None:
    """Ranges are those of the unquantized model.

    Raises:
        RefusedError: the source says that it is quantized, or holds weights that are no floats with a value of their own.
    """
    if index.views:
        raise RefusedError(["activation ranges are measured on a Hugging Face model"], hint="convert the checkpoint back first: --to hf")
    stated = source_quantization(index)
    what = f"{stated.stated_in}: quantized already ({stated.title})" if stated is not None else None
    odd = next((name for name, record in index.tensors.items() if record.dtype.name not in _WEIGHTS and name.startswith("model.")), None)
    if what is None and odd is not None:
        what = f"{printable(odd)} is {index.tensors[odd].dtype}, a quantized weight"
    if what is not None:
        raise RefusedError([f"{what}; activation ranges are measured on the unquantized model"], hint="give that one to calibrate")


def torch_device(name: str) -> str:
    """The torch device that --device means: "cpu" or "cuda:N".

    Raises:
        UsageError: there is no such device.
    """
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    kind, _, number = name.partition(":")
    if name != "auto" and (kind != "cuda" or (number and not (number.isascii() and number.isdecimal()))):
        raise UsageError(f"--device {name} is not auto, cpu, cuda or cuda:N", hint="calibration runs on one device")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise UsageError(f"--device {name}: this machine has {count or 'no'} CUDA device{'s' * (count != 1)}", hint="--device cpu")
    return f"cuda:{int(number or 0)}"


@contextlib.contextmanager
def current(device: str) -> Iterator[None]:
    """The device is this thread's current one: a library's own kernels run there, wherever their tensors lie."""
    import torch

    with torch.cuda.device(device) if device != "cpu" else contextlib.nullcontext():
        yield


def give_back() -> None:
    """What a layer held on a device is free again for others in this process; its hooks make cycles of it."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


class _Run:
    def __init__(self, index: Index, out: Path, batch: int, dtype: str, loop: Loop, device: str, budget: int | None) -> None:
        import torch

        from streamconv.targets.trtllm.target import model_of

        self.index, self.out, self.batch, self.loop, self.budget = index, out, batch, loop, budget
        self.facts = model_of(index)[0]
        self.kind = (self.facts.dtype or "float16") if dtype == "auto" else dtype
        self.dtype: torch.dtype = getattr(torch, self.kind)
        self.device = torch_device(device)

    def measure(self, text: str, samples: int, max_length: int, reuse: bool, progress: Progress, sampled: Sampled) -> dict[str, Any]:
        from streamconv.calibration.layers import OneLayer
        from streamconv.calibration.scratch import Scratch
        from streamconv.calibration.texts import load_texts, tokenize

        began = time.monotonic()
        self._spare()
        check_budget(self.index, self.facts, self.budget, self.batch * max_length, self.dtype.itemsize)
        ids = tokenize(self.index.root, load_texts(text, samples), max_length, self.loop)
        if not ids:
            raise UsageError(f"--text {printable(text)}: the model's tokenizer makes no tokens of it", hint="is it this model's tokenizer?")
        batches = _batches(ids, self.batch)
        tokens = sum(map(len, ids))
        mark = self._mark(batches)
        told = {"out": str(self.out), "samples": len(ids), "tokens": tokens, "device": self.device, "reused": False}
        if reuse and (kept := self._kept(mark)):
            return told | {"layers": self.facts.num_hidden_layers, "tensors": kept, "seconds": 0.0, "reused": True}
        resumable = self._mark(batches, [shard.evidence() for shard in self.index.shards])
        scratch = Scratch(self.out, resumable, tokens * self.facts.hidden_size * self.dtype.itemsize)
        uses = Counter((len(batch), len(batch[0])) for batch in batches)
        try:
            with current(self.device):
                layer = OneLayer(self.index, self.facts, self.dtype, self.device, uses)
                with pretrained.on_device():
                    self._through(layer, scratch, batches, progress, sampled)
            for shard in self.index.shards:
                shard.check_unchanged()
            self._write(scratch.ranges, mark, len(ids))
        except BaseException as error:
            if not scratch.done or isinstance(error, CheckpointError):  # there is nothing to go on after
                scratch.remove()
            raise
        scratch.remove()
        spent = {"seconds": time.monotonic() - began, "peak_memory": memory.peak_resident()}
        return told | {"layers": layer.layers, "tensors": len(scratch.ranges)} | spent

    def _through(self, layer: OneLayer, scratch: Scratch, batches: list[list[list[int]]], progress: Progress, sampled: Sampled) -> None:
        """All batches through one layer after the other."""
        import torch

        from streamconv.calibration.states import Files, OnDevice, fit_on_device

        width, tokens = self.facts.hidden_size, sum(len(sample) for batch in batches for sample in batch)
        states: Files | OnDevice
        if fit_on_device(self.device, tokens * width * self.dtype.itemsize):
            states = OnDevice(scratch, tokens, width, self.dtype, self.device)
        else:
            states = Files(scratch, self.dtype, self.device)
        began, first, count = time.monotonic(), scratch.done, sum(map(len, batches))
        with torch.no_grad():
            if first == 0:
                with states.filling():
                    for group in _groups([sample for batch in batches for sample in batch], width * self.dtype.itemsize):
                        for sample in layer.embed(group):
                            states.put(sample)
            for number in range(first, layer.layers):
                layer.load(number)
                with states.layer(number):
                    samples, told = 0, time.monotonic()
                    for batch in batches:
                        states.put(layer(states.take((len(batch), len(batch[0]), width))))
                        samples += len(batch)
                        if time.monotonic() - told >= 1:
                            told = time.monotonic()
                            sampled(number, layer.layers, samples, count)
                    scratch.ranges |= _finite(layer.ranges(), self.kind)
                each = (time.monotonic() - began) / (number + 1 - first)
                progress(number + 1, layer.layers, each * (layer.layers - number - 1))

    def _mark(self, batches: list[list[list[int]]], evidence: list[list[int | str]] | None = None) -> str:
        """Hash of all that decides the numbers; of the source its sizes, headers and samples, and for a resume its times."""
        from streamconv.checkpoint.source_files import source_files

        files = [(file.name, file.size, file.header_hash) for file in source_files(self.index)]
        looks = evidence or [[shard.sample()] for shard in self.index.shards]
        asked = [__version__, self.index.config, files, looks, self.kind, self.device.split(":")[0], batches]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _spare(self) -> None:
        """Only ranges are replaced, whoever measured them."""
        from streamconv.checkpoint.header import read_header

        real, root = Path(os.path.realpath(self.out)), Path(os.path.realpath(self.index.root))
        if root.is_dir() and root in real.parents:  # later conversions would take it for weights
            raise OutputError(f"{printable(str(self.out))} is in the model's folder", hint="choose another folder")
        if not os.path.lexists(self.out):
            return
        with contextlib.suppress(OSError, CheckpointError):
            if all(name.endswith((".x", ".y", ".w")) for name in read_header(self.out).tensors):
                return
        raise OutputError(f"{printable(str(self.out))} is there and holds no activation ranges", hint="choose another name, or remove it")

    def _kept(self, mark: str) -> int:
        """How many ranges the file holds, if it is there and answers this request; newer than the source, too."""
        from streamconv.checkpoint.header import read_header

        try:
            header = read_header(self.out)
            newest = max(max(shard.identity.mtime_ns, shard.identity.ctime_ns) for shard in self.index.shards)
            fits = json.loads(header.metadata.get("calibration", "{}")).get("request") == mark
            return len(header.tensors) if fits and self.out.stat().st_mtime_ns >= newest else 0
        except (OSError, ValueError, AttributeError, CheckpointError):
            return 0

    def _write(self, ranges: dict[str, torch.Tensor], mark: str, samples: int) -> None:
        from safetensors.torch import save_file

        # one entry: the stock writer leaves the order of several to chance
        facts = {"dtype": self.kind, "loop": self.loop, "request": mark, "samples": samples}
        new = beside(self.out, ".", ".new")
        with explained(self.out, "write"):
            new.unlink(missing_ok=True)  # of a run that was killed; of a link the name alone
            save_file({name: ranges[name] for name in sorted(ranges)}, new, metadata={"calibration": json.dumps(facts)})
            with open(new, "rb") as file:
                os.fsync(file.fileno())
            os.replace(new, self.out)


def check_budget(index: Index, facts: ModelConfig, budget: int | None, tokens: int, itemsize: int) -> None:
    """Refuse a budget that one layer and one batch do not fit in.

    Args:
        tokens: of the largest batch.
        itemsize: bytes of the computing type.

    Raises:
        BudgetError: says what is needed.
    """
    layer = sum(r.nbytes // r.dtype.itemsize * itemsize for n, r in index.tensors.items() if n.startswith("model.layers.0."))
    width = 4 * facts.hidden_size + 3 * facts.intermediate_size
    need = _TORCH_BASE + layer + tokens * width * max(itemsize, 4)
    free = memory.available() if budget is None else budget
    if need > free:
        raise BudgetError(
            f"calibration takes about {show_size(need)} (one layer {show_size(layer)}), and only {show_size(free)} may be used",
            hint=f"--memory-budget {-(-need // MIB)}MiB, or a smaller --batch-size or --max-length",
        )


def _finite(ranges: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The ranges, which must be numbers.

    Raises:
        DataError: some are NaN or infinite.
    """
    odd = [name for name, values in ranges.items() if not bool(values.isfinite().all())]
    if odd:
        hint = "computing in another type may help: --dtype bfloat16 or float32" if kind == "float16" else "are the weights sound?"
        raise DataError(f"{printable(odd[0])} (and {len(odd) - 1} more): the measured range is NaN or infinite", hint=hint)
    return ranges


def _batches(ids: list[list[int]], size: int) -> list[list[list[int]]]:
    """Neighbours of equal length go together: no padding, so batching changes nothing but speed."""
    batches: list[list[list[int]]] = []
    for sample in ids:
        if batches and len(batches[-1]) < size and len(batches[-1][0]) == len(sample):
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def _groups(samples: list[list[int]], token_bytes: int) -> Iterator[list[list[int]]]:
    """Samples whose embeddings are read together, so that rows that they share are read once."""
    group: list[list[int]] = []
    for sample in samples:
        if group and sum(map(len, group), len(sample)) * token_bytes > _GROUP:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group
