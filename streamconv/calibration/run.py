"""All samples through one layer after the other, inside a budget, resumable after every layer."""

from __future__ import annotations

import contextlib
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
from streamconv.calibration.held import Held
from streamconv.calibration.names import Names
from streamconv.calibration.request import DTYPES, Loop, Progress, Sampled, silent
from streamconv.calibration.texts import batches_of, groups_of
from streamconv.calibration.torch_device import current, free_memory, give_back, torch_device
from streamconv.checkpoint.index import Index, source_files
from streamconv.checkpoint.quantized import source_quantization
from streamconv.errors import CheckpointError, OutputError, RefusedError, UsageError, printable
from streamconv.hub import local_folder, open_source
from streamconv.lazy import torch
from streamconv.run.fs import beside, named, translate_errors

if TYPE_CHECKING:
    from streamconv.calibration.folds import Fold
    from streamconv.calibration.layers import OneLayer
    from streamconv.calibration.scratch import Scratch
    from streamconv.calibration.work import Work

_WEIGHTS = ("F16", "BF16", "F32", "F64")


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
    beside: int = 0,
    reuse: bool = False,
    progress: Progress = silent,
    sampled: Sampled = silent,
) -> dict[str, Any]:
    """Write the activation ranges of a model; see `verbs.calibrate`.

    Args:
        beside: bytes of the memory budget that another process takes.
        reuse: leave a file that the same request made as it is.
    """
    with _opened(model, out, batch_size, dtype, loop, device, memory_budget, beside) as run:
        from streamconv.calibration.maxima import RangesWork

        return run.measure(RangesWork(run.kind), text, samples, max_length, reuse, progress, sampled)


def find_codes(
    model: str | Path,
    out: str | Path,
    text: str,
    *,
    method: str,
    group: int,
    scale: str,
    fold: Fold = "",
    samples: int = 128,
    max_length: int = 512,
    batch_size: int = 1,
    dtype: str = "auto",
    loop: Loop = "modelopt",
    device: str = "auto",
    memory_budget: int | None = None,
    beside: int = 0,
    reuse: bool = False,
    progress: Progress = silent,
    sampled: Sampled = silent,
) -> dict[str, Any]:
    """Find the INT4 codes of a model's linear layers on text, and write them to a file (`checkpoint.codes_file`).

    Args:
        method: "clip", "awq" or "gptq".
        group: input channels that share a scale.
        scale: what scales are rounded to: "float16", "bfloat16", or "source" for the weight's own type.
        fold: where AWQ's pre-scales go (`folds`).
        others: as of `calibrate`.

    Raises:
        as `calibrate`; DataError: weights or inputs that are NaN or infinite.
    """
    from streamconv.calibration.tiers import gram_room, largest_gram, losses_bytes, search_bytes

    if dtype == "auto" and torch_device(device) == "cpu":
        dtype = "float32"  # which holds all that 16 bits hold, and is several times faster there
    with _opened(model, out, batch_size, dtype, loop, device, memory_budget, beside) as run:
        from streamconv.calibration.codes import CodesWork

        held = run.held(batch_size * max_length, search_bytes(method, group, run.facts, run.device), losses_bytes)
        large = largest_gram(method, group, run.facts)
        if run.device == "cpu":
            room = gram_room(memory.available() if run.budget is None else run.budget, held.host("cpu"), large)
        else:
            room = gram_room(free_memory(run.device), held.on_device, large)
        return run.measure(CodesWork(method, group, scale, room, run.device, fold), text, samples, max_length, reuse, progress, sampled)


@contextlib.contextmanager
def _opened(
    model: str | Path, out: str | Path, batch: int, dtype: str, loop: Loop, device: str, budget: int | None, beside: int
) -> Iterator[Run]:
    """A run on a model that is not quantized; arguments and errors as of `calibrate`."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UsageError("calibration needs transformers", hint="pip install 'streamconv[calibrate]'") from None
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    out = named(out)
    with open_source(local_folder(model)) as index:
        refuse_quantized(index)
        run = Run(index, out, batch, dtype, loop, device, budget, beside)
        try:
            yield run
        finally:
            if run.device != "cpu":
                give_back()


def refuse_quantized(index: Index) -> None:
    """Ranges are those of the unquantized model.

    Raises:
        RefusedError: the source says that it is quantized, or holds weights that are no floats with a value of their own.
    """
    from streamconv.targets.trtllm.target import model_of

    if index.views:
        raise RefusedError(["activation ranges are measured on a Hugging Face model"], hint="convert the checkpoint back first: --to hf")
    quantization = source_quantization(index)
    what = f"{quantization.stated_in}: quantized already ({quantization.title})" if quantization is not None else None
    if what is None:
        model, family = model_of(index)
        names = Names(index, family, model.architecture)
        odd = next((name for name, record in index.tensors.items() if record.dtype.name not in _WEIGHTS and names.known(name)), None)
        what = f"{printable(odd)} is {index.tensors[odd].dtype}, a quantized weight" if odd is not None else None
    if what is not None:
        raise RefusedError([f"{what}; activation ranges are measured on the unquantized model"], hint="give that one to calibrate")


class Run:
    """A run over the layers of a model.

    Args:
        batch, dtype, loop, device, budget, beside: as of `calibrate`.

    Attributes:
        budget: what this process may take.
    """

    def __init__(
        self, index: Index, out: Path, batch: int, dtype: str, loop: Loop, device: str, budget: int | None, beside: int = 0
    ) -> None:
        from streamconv.targets.trtllm.target import model_of

        self.index, self.out, self.batch, self.loop, self._beside = index, out, batch, loop, beside
        self.budget = None if budget is None else max(1, budget - beside)
        self.facts, self.family = model_of(index)
        self.kind = (self.facts.dtype or "float16") if dtype == "auto" else dtype
        self.dtype: torch.dtype = getattr(torch, self.kind)
        self.device = torch_device(device)

    def held(self, tokens: int, extra: int, kept: Callable[[int, int], int]) -> Held:
        """What it takes; arguments as of `Held.of`."""
        return Held.of(self.index, self.facts, self.family, tokens, self.dtype.itemsize, extra, kept)

    def measure(
        self, work: Work, text: str, samples: int, max_length: int, reuse: bool, progress: Progress, sampled: Sampled
    ) -> dict[str, Any]:
        """The work on these samples; arguments and errors as of `calibrate`."""
        if self.batch < 1 or max_length < 1 or samples == 0 or samples < -1:
            raise UsageError("--samples, --max-length and --batch-size must be at least 1", hint="--samples -1 takes all")
        from streamconv.calibration.layers import OneLayer
        from streamconv.calibration.scratch import Scratch
        from streamconv.calibration.texts import load_texts, tokenize

        began = time.monotonic()
        self._spare(work)
        room = self.held(self.batch * max_length, work.extra(self.facts), work.kept)
        whole = None if self.budget is None else self.budget + self._beside
        room.check(whole, self.device, work.smaller, free_memory(self.device), self._beside)
        with memory.bounded(self.budget):
            ids = tokenize(self.index.root, load_texts(text, samples), max_length, self.loop)
        if not ids:
            raise UsageError(f"--text {printable(text)}: the model's tokenizer makes no tokens of it", hint="is it this model's tokenizer?")
        batches = batches_of(ids, self.batch)
        tokens = sum(map(len, ids))
        mark = self._mark(work, batches)
        report = {"out": str(self.out), "samples": len(ids), "tokens": tokens, "device": self.device, "reused": False}
        if reuse and (kept := self._kept(mark)):
            return report | {"layers": self.facts.num_hidden_layers, "tensors": kept, "seconds": 0.0, "reused": True}
        facts = {"dtype": self.kind, "loop": self.loop, "request": mark, "samples": len(ids)}
        resumable = self._mark(work, batches, [shard.evidence() for shard in self.index.shards])
        scratch = Scratch(self.out, resumable, tokens * self.facts.hidden_size * self.dtype.itemsize)
        uses = Counter((len(batch), len(batch[0])) for batch in batches) if work.captured else Counter[tuple[int, int]]()
        try:
            with current(self.device):
                layer = OneLayer(self.index, self.facts, self.family, self.dtype, self.device, uses, work.watch)
                with pretrained.on_device():
                    work.open(layer, scratch, tokens, facts)
                    self._through(work, layer, scratch, batches, progress, sampled)
            for shard in self.index.shards:
                shard.check_unchanged()
            count = self._write(work, scratch.ranges, facts)
        except BaseException as error:
            if not scratch.done or isinstance(error, CheckpointError):  # there is nothing to go on after
                scratch.remove()
            raise
        scratch.remove()
        spent = {"seconds": time.monotonic() - began, "peak_memory": memory.peak_resident(), "notes": work.notes(scratch.ranges)}
        return report | {"layers": layer.layers, "tensors": count} | spent

    def _through(
        self, work: Work, layer: OneLayer, scratch: Scratch, batches: list[list[list[int]]], progress: Progress, sampled: Sampled
    ) -> None:
        """All batches through one layer after the other, as often as the work needs; the last pass gives the next states."""
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
                    for group in groups_of([sample for batch in batches for sample in batch], width * self.dtype.itemsize):
                        for sample in layer.embed(group):
                            states.put(sample)
            for number in range(first, layer.layers):
                layer.load(number)
                with states.layer(number):
                    passes, reported = work.passes(layer), time.monotonic()
                    for at, begin in enumerate(passes):
                        begin()
                        states.rewind()
                        samples = at * count
                        for batch in batches:
                            output = layer(states.take((len(batch), len(batch[0]), width)))
                            if at + 1 == len(passes):
                                states.put(output)
                            samples += len(batch)
                            if time.monotonic() - reported >= 1:
                                reported = time.monotonic()
                                sampled(number, layer.layers, samples // len(passes), count)
                    scratch.ranges |= work.finish(layer)
                each = (time.monotonic() - began) / (number + 1 - first)
                progress(number + 1, layer.layers, each * (layer.layers - number - 1))

    def _mark(self, work: Work, batches: list[list[list[int]]], evidence: list[list[int | str]] | None = None) -> str:
        """Hash of all that decides the numbers; of the source its sizes, headers and samples, and for a resume its times."""
        files = [(file.name, file.size, file.header_hash) for file in source_files(self.index)]
        looks = evidence or [[shard.sample()] for shard in self.index.shards]
        asked = [__version__, self.index.config, files, looks, self.kind, self.device.split(":")[0], batches]
        asked += [work.asked] if work.asked is not None else []
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _spare(self, work: Work) -> None:
        """Only results of the same kind are replaced, whoever measured them."""
        real, root = Path(os.path.realpath(self.out)), Path(os.path.realpath(self.index.root))
        if os.path.isdir(root) and root in real.parents:  # later conversions would take it for weights
            raise OutputError(f"{printable(self.out)} is in the model's folder", hint="choose another folder")
        if not os.path.lexists(self.out):
            return
        name: str | None = work.name
        with contextlib.suppress(OSError, CheckpointError):
            name = work.holds(self.out)
        if name is not None:
            raise OutputError(f"{printable(self.out)} is there and holds no {name}", hint="choose another name, or remove it")

    def _kept(self, mark: str) -> int:
        """How many ranges the file holds, if it is there and answers this request; newer than the source, too."""
        from streamconv.checkpoint.header import read_header

        try:
            header = read_header(self.out)
            newest = max(max(shard.identity.mtime_ns, shard.identity.ctime_ns) for shard in self.index.shards)
            fits = json.loads(header.metadata.get("calibration", "{}")).get("request") == mark
            return len(header.tensors) if fits and self.out.stat().st_mtime_ns >= newest else 0
        except (OSError, ValueError, AttributeError, RecursionError, CheckpointError):
            return 0

    def _write(self, work: Work, results: dict[str, torch.Tensor], facts: dict[str, Any]) -> int:
        new = beside(self.out, ".", ".new")
        with translate_errors(self.out, "write"):
            new.unlink(missing_ok=True)  # of a run that was killed; of a link the name alone
            count = work.write(results, new, facts)
            with open(new, "rb") as file:
                os.fsync(file.fileno())
            os.replace(new, self.out)
        return count
