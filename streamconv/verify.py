"""Prove a written checkpoint: the acceptance list of checkpoint spec §7, the manifest's hashes, and the source's values."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamconv import hub, manifest
from streamconv.checkpoint.header import read_header
from streamconv.checkpoint.limits import MAX_CONFIG, check_counts
from streamconv.checkpoint.shard import Shard
from streamconv.errors import StreamconvError, VerifyError, printable
from streamconv.plan import Dest, Plan, Span
from streamconv.quants.base import Encoding, Findings
from streamconv.results import Results
from streamconv.targets.trtllm import expected
from streamconv.untrusted import parse_json, read_file

_LOWEST_SNR = 0.3
"""dB. Zeros in place of the values give 0, unrelated values less; one scale for a whole SmoothQuant matrix may come near."""
_LOWEST_PLAIN = 40
"""dB, of what is not quantized."""

_LOADABLE = {"F16", "BF16", "F32", "I8", "I32", "I64", "BOOL", "F8_E4M3"}
_REQUIRED = ("architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "mapping")
_STRICT = {
    "mapping": {"0.16": 7, "1.2": 13},
    "quantization": {"0.16": 9, "1.2": 10},
}


@dataclass(slots=True)
class TensorError:
    """Decoded values against the source's, for one matrix of one rank."""

    file: str
    name: str
    largest: float
    relative: float
    snr_db: float


@dataclass(slots=True)
class Verdict:
    """What verify found; `problems` empty means good."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    files: int = 0
    tensors: int = 0
    hashed: int = 0
    errors: list[TensorError] = field(default_factory=list)
    reader: str | None = None


def verify(
    out: str | Path,
    source: str | Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
    *,
    with_tensorrt_llm: bool = False,
) -> Verdict:
    """Check an output folder.

    Args:
        out: the folder.
        source: the checkpoint it was made from; every tensor is then decoded and compared. A model of the Hub is downloaded.
        progress: called with bytes done.
        with_tensorrt_llm: its own reader has to accept every rank too; `reader` in the verdict then says what it did.

    Raises:
        UsageError: TensorRT-LLM is not installed.
        VerifyError: the folder is not a checkpoint at all. Everything else is collected in the verdict.
    """
    import xxhash

    folder, verdict = Path(out), Verdict()
    config, config_bytes = _config(folder, verdict)
    world = _world(config, verdict)
    told = manifest.load(folder)
    if told is None:
        verdict.warnings.append(f"no {manifest.NAME}: another tool wrote this; hashes cannot be checked")
    elif xxhash.xxh3_128(config_bytes).hexdigest() != told.config:
        verdict.problems.append("config.json: the bytes are not those that were written")
    present = {name for name in os.listdir(folder) if re.fullmatch(r"rank\d+\.safetensors", name)}
    wanted = {f"rank{number}.safetensors" for number in range(world)}
    verdict.problems += [f"{name} is missing" for name in sorted(wanted - present)]
    verdict.problems += [f"{name} belongs to no rank of config.json" for name in sorted(present - wanted)]
    shapes: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    hashes: dict[tuple[str, str], str] = {}
    for name in sorted(wanted & present, key=lambda text: int(text[4:-12])):
        try:
            shapes[name] = _rank_file(folder / name, told, verdict, hashes, progress)
        except StreamconvError as error:
            verdict.problems.append(str(error))
        verdict.files += 1
    problems, warnings = expected.check(config, shapes)
    verdict.problems += problems
    verdict.warnings += warnings
    _replicas(config, shapes, hashes, verdict)
    if told is not None:
        for file, held in told.hashes.items():
            missing = [tensor for tensor in held if file in shapes and tensor not in shapes[file]]
            verdict.problems += [f"{file}: {printable(tensor)} is missing" for tensor in missing]
    if source is not None and not verdict.problems:
        if told is None:
            raise VerifyError(f"--source needs {manifest.NAME}, which says how the checkpoint was made")
        _against_source(folder, hub.local_folder(source), told, config_bytes, verdict, progress)
    if with_tensorrt_llm:
        from streamconv.tensorrt_llm_reader import read_ranks

        version, accepted, refused = read_ranks(folder)
        verdict.problems += refused
        verdict.reader = f"TensorRT-LLM {version} accepted {accepted} ranks, refused {len(refused)}"
    return verdict


def _config(folder: Path, verdict: Verdict) -> tuple[dict[str, Any], bytes]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise VerifyError(f"{printable(str(folder))} is not a folder")
    if not os.path.lexists(path):
        raise VerifyError(f"{printable(str(path))} is missing: this is no finished checkpoint")
    data = read_file(path, MAX_CONFIG, VerifyError)
    check_counts(data, printable(str(path)), VerifyError)
    config = parse_json(data, printable(str(path)), VerifyError)
    if not isinstance(config, dict):
        raise VerifyError(f"{printable(str(path))} is not a JSON object")
    verdict.problems += [f"config.json: {key} is missing" for key in _REQUIRED if config.get(key) is None]
    for key in ("quant_mode", "quant_algo", "kv_dtype"):
        if key in config:
            verdict.problems.append(f"config.json: top-level {key} makes the loader fail")
    return config, data


def _world(config: dict[str, Any], verdict: Verdict) -> int:
    mapping = config.get("mapping")
    if not isinstance(mapping, dict):
        raise VerifyError("config.json: mapping is not an object")
    try:
        tp, pp, cp = (int(mapping.get(key, 1)) for key in ("tp_size", "pp_size", "cp_size"))
        if tp * pp * cp != int(mapping.get("world_size", 1)):
            verdict.problems.append("config.json: mapping.world_size is not tp_size * pp_size * cp_size")
        if int(mapping.get("moe_tp_size", tp)) * int(mapping.get("moe_ep_size", 1)) not in (tp, 1, -1, -tp):
            verdict.problems.append("config.json: moe_tp_size * moe_ep_size is not tp_size")
    except (TypeError, ValueError, OverflowError) as error:
        raise VerifyError(f"config.json: mapping: {error}") from error
    if tp < 1 or pp < 1 or tp * pp > expected.MOST_RANKS:
        raise VerifyError(f"config.json: mapping: tp_size {tp} and pp_size {pp} cannot be")
    return tp * pp


def _rank_file(
    path: Path,
    told: manifest.Manifest | None,
    verdict: Verdict,
    hashes: dict[tuple[str, str], str],
    progress: Callable[[int], None],
) -> dict[str, tuple[str, tuple[int, ...]]]:
    import xxhash

    header = read_header(path)
    shapes = {}
    if told is not None and path.name in told.sizes and path.stat().st_size != told.sizes[path.name]:
        verdict.problems.append(f"{path.name}: {path.stat().st_size} bytes, the manifest says {told.sizes[path.name]}")
    shard = Shard(path)
    try:
        with shard.window(0, header.data_start) as window:
            if told is not None and xxhash.xxh3_128(window).hexdigest() != told.headers.get(path.name):
                verdict.problems.append(f"{path.name}: the header's bytes are not those that were written")
        for tensor in header.tensors.values():
            shapes[tensor.name] = (tensor.dtype.name, tensor.shape)
            if tensor.dtype.name not in _LOADABLE:
                verdict.problems.append(f"{path.name}: {printable(tensor.name)}: dtype {tensor.dtype} cannot be loaded")
            digest = xxhash.xxh3_128()
            for at in range(tensor.begin, tensor.end, 8 << 20):
                stop = min(at + (8 << 20), tensor.end)
                with shard.window(at, stop) as window:
                    digest.update(window)
                progress(stop - at)
            found = hashes[path.name, tensor.name] = digest.hexdigest()
            verdict.tensors += 1
            if told is None:
                continue
            wanted = told.hashes.get(path.name, {}).get(tensor.name)
            if wanted is None:
                verdict.problems.append(f"{path.name}: {printable(tensor.name)} is not in the manifest")
            elif wanted != found:
                verdict.problems.append(f"{path.name}: {printable(tensor.name)}: the bytes are not those that were written")
            else:
                verdict.hashed += 1
    finally:
        shard.close()
    return shapes


def _replicas(
    config: dict[str, Any],
    shapes: dict[str, dict[str, tuple[str, tuple[int, ...]]]],
    hashes: dict[tuple[str, str], str],
    verdict: Verdict,
) -> None:
    """Tensors that every tensor parallel rank must hold alike."""
    mapping = config["mapping"]
    tp, pp = int(mapping.get("tp_size", 1)), int(mapping.get("pp_size", 1))
    for stage in range(pp):
        names = [f"rank{stage * tp + rank}.safetensors" for rank in range(tp)]
        if not all(name in shapes for name in names):
            continue
        first = shapes[names[0]]
        for name in names[1:]:
            if set(first) != set(shapes[name]):
                odd = sorted(set(first) ^ set(shapes[name]))[0]
                verdict.problems.append(f"{names[0]} and {name} hold different tensors, for example {printable(odd)}")
        for tensor in first:
            whole = tensor.endswith(("norm.weight", "ln_f.weight", "router.weight", "scaling_factor")) and (
                "prequant" not in tensor and "weights_scaling" not in tensor
            )
            if whole and len({hashes.get((name, tensor)) for name in names}) > 1:
                verdict.problems.append(f"{printable(tensor)} differs between the ranks of stage {stage}")


@dataclass(slots=True)
class _Sums:
    """How a matrix compares with its source; elements that are not finite on either side are left out of all but `odd` and `wrong`.

    Attributes:
        within: no element is farther off than the encoding says it may be.
        odd: elements that are not finite; `wrong` of them are not what encoding the source anew gives.
    """

    largest: float = 0.0
    noise: float = 0.0
    signal: float = 0.0
    peak: float = 0.0
    within: bool = True
    odd: int = 0
    wrong: int = 0

    def add(self, encoding: Encoding, part: Any, got: Any, cols: int) -> None:
        """Source rows [rows, cols] and what the output, whose matrix has `cols` columns, holds of them in float32."""
        import torch

        want = encoding.values(part)
        fine = torch.isfinite(want) & torch.isfinite(got)
        if not fine.all():
            parts = [data.reshape(-1).view(torch.uint8) for data in encoding.encode(part, Findings())]
            made = encoding.decode(parts, len(part), cols)
            same = (made == got) | (torch.isnan(made) & torch.isnan(got))
            self.odd += int((~fine).sum())
            self.wrong += int((~fine & ~same).sum())
            want, got = torch.where(fine, want, 0.0), torch.where(fine, got, 0.0)
        gap = (got - want).double()
        if not gap.numel():
            return
        bound = torch.nan_to_num(encoding.error(part).expand(gap.shape).double(), nan=0.0, posinf=0.0)
        self.within = self.within and bool((gap.abs() <= bound).all())
        self.largest = max(self.largest, float(gap.abs().max()))
        self.noise += float((gap * gap).sum())
        self.signal += float((want.double() ** 2).sum())
        self.peak = max(self.peak, float(want.abs().max()))

    def snr(self) -> float:
        """Signal to noise in dB."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def _against_source(
    folder: Path, source: Path, told: manifest.Manifest, config: bytes, verdict: Verdict, progress: Callable[[int], None]
) -> None:
    from streamconv.api import open_and_plan

    index, plan = open_and_plan(source, told.options)
    try:
        if plan.sources != told.sources:
            verdict.problems.append(f"{printable(str(source))} is not the source the manifest names")
            return
        if plan.config != config:
            verdict.problems.append("config.json is not what this source gives")
        files = [Shard(folder / file.name) for file in plan.files]
        sums: dict[int, _Sums] = {}
        results = Results(plan.spans.reducing())
        try:
            for span in plan.spans:
                _compare(plan, span, index.shards, files, sums, results, progress)
        finally:
            for shard in files:
                shard.close()
        for number, found in sums.items():
            matrix = plan.matrices[number]
            file, name, snr = plan.files[matrix.file].name, matrix.places[0].tensor, found.snr()
            verdict.errors.append(TensorError(file, name, found.largest, found.largest / found.peak if found.peak else 0.0, snr))
            if found.wrong:
                wrong = f"{found.wrong} values that are not finite, or should not be, are not what the source gives"
                verdict.problems.append(f"{file}: {printable(name)}: {wrong}")
            elif not found.within and snr < (_LOWEST_SNR if matrix.encoding.quantizes else _LOWEST_PLAIN):
                verdict.problems.append(f"{file}: {printable(name)}: values are far from the source's (SNR {snr:.1f} dB)")
            elif found.odd:
                verdict.warnings.append(f"{file}: {printable(name)}: {found.odd} values of the source or the output are not finite")
    finally:
        index.close()


def _compare(
    plan: Plan,
    span: Span,
    shards: Any,
    files: list[Shard],
    sums: dict[int, _Sums],
    results: Results,
    progress: Callable[[int], None],
) -> None:
    import numpy as np
    import torch

    from streamconv.stages.read import read_rows, spare_bytes_per_row

    step = max(span.align, (2 << 20) // max(span.row_bytes, 1) // span.align * span.align)
    buffer, spare = (np.empty(step * size, np.uint8) for size in (span.row_bytes, spare_bytes_per_row(span)))
    for start in range(span.start, span.stop, step):
        stop = min(start + step, span.stop)
        block = read_rows(shards, span, start, stop, buffer, spare)
        rows = span.op.out_rows(stop - start)
        dtype = getattr(torch, span.source.dtype.torch)
        whole = torch.from_numpy(block).view(dtype).reshape(rows, span.source.cols)
        if span.reduce is not None:
            results.add(span.reduce.key, rows, span.reduce.tile(whole, results).numpy())
        for dest in span.dests:
            encoding = plan.matrices[dest.matrix].encoding.bind(results, span.source.name)
            got = decoded(plan, dest, span.op.out_rows(start - span.start), rows, files, encoding)
            part = torch.cat([whole[:, a:b] for a, b in dest.cols], 1)
            sums.setdefault(dest.matrix, _Sums()).add(encoding, part, got, plan.matrices[dest.matrix].cols)
        progress(block.size)


def decoded(
    plan: Plan, dest: Dest, skipped: int, rows: int, files: list[Shard], encoding: Encoding | None = None
) -> Any:
    """float32 [rows, cols] of a matrix, from the bytes of the output."""
    import numpy as np
    import torch

    matrix = plan.matrices[dest.matrix]
    parts = []
    for place in matrix.places:
        data = np.empty(rows * place.row_bytes, np.uint8)
        files[matrix.file].read_into(place.offset + (dest.row + skipped) * place.row_bytes, data.data)
        parts.append(torch.from_numpy(data))
    return (encoding or matrix.encoding).decode(parts, rows, matrix.cols)
