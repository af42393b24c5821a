"""Prove a written checkpoint: the acceptance list of checkpoint spec §7, the manifest's hashes, and the source."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamconv import against_source, manifest
from streamconv.checkpoint.header import read_header
from streamconv.checkpoint.shard import Shard
from streamconv.errors import StreamconvError, VerifyError, printable
from streamconv.options import Resources
from streamconv.progress import Meter, unwatched
from streamconv.targets.trtllm import expected
from streamconv.verdict import Verdict

_LOADABLE = {"F16", "BF16", "F32", "I8", "I32", "I64", "BOOL", "F8_E4M3"}
_REQUIRED = ("architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "mapping")
_STRICT = {
    "mapping": {"0.16": 7, "1.2": 13},
    "quantization": {"0.16": 9, "1.2": 10},
}


def verify(
    out: str | Path,
    source: str | Path | None = None,
    *,
    with_tensorrt_llm: bool = False,
    activation_ranges: str | None = None,
    resources: Resources | None = None,
    meter: Meter | None = None,
) -> Verdict:
    """Check an output folder.

    Args:
        out: the folder.
        source: the checkpoint it was made from; it is encoded again, and the bytes are compared. A model of the Hub is downloaded.
        with_tensorrt_llm: its own reader has to accept every rank too; `reader` in the verdict then says what it did.
        activation_ranges: where the ranges are now that the output was made with; None if they did not move.
        resources: memory, workers and tiles for `source`; the CPU encodes.
        meter: told about progress: the bytes of the rank files, then those read of the source.

    Raises:
        UsageError: TensorRT-LLM is not installed, or the activation ranges are not where they were.
        StreamconvError: the source cannot be read or planned, or the memory budget is too small.
        VerifyError: the folder is not a checkpoint at all. Everything else is collected in the verdict.
    """
    import xxhash

    folder, verdict, meter = Path(out), Verdict(), meter or Meter(unwatched)
    config = _config(folder, verdict)
    world = _world(config, verdict)
    told = manifest.load(folder)
    if told is None:
        verdict.warnings.append(f"no {manifest.NAME}: another tool wrote this; hashes cannot be checked")
    elif xxhash.xxh3_128((folder / "config.json").read_bytes()).hexdigest() != told.config:
        verdict.problems.append("config.json: the bytes are not those that were written")
    present = {name for name in os.listdir(folder) if re.fullmatch(r"rank\d+\.safetensors", name)}
    wanted = {f"rank{number}.safetensors" for number in range(world)}
    verdict.problems += [f"{name} is missing" for name in sorted(wanted - present)]
    verdict.problems += [f"{name} belongs to no rank of config.json" for name in sorted(present - wanted)]
    shapes: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    hashes: dict[tuple[str, str], str] = {}
    meter.begin("checking", sum((folder / name).stat().st_size for name in wanted & present))
    for name in sorted(wanted & present, key=lambda text: int(text[4:-12])):
        try:
            shapes[name] = _rank_file(folder / name, told, verdict, hashes, meter.add)
        except StreamconvError as error:
            verdict.problems.append(str(error))
        verdict.files += 1
    problems, warnings = expected.check(config, shapes)
    verdict.problems += problems
    verdict.warnings += warnings
    _replicas(config, shapes, hashes, verdict)
    if told is not None:
        for file, tensor in told.hashes:
            if file in shapes and tensor not in shapes[file]:
                verdict.problems.append(f"{file}: {printable(tensor)} is missing")
    if source is not None and not verdict.problems:
        against_source.check(folder, source, activation_ranges, resources or Resources(), verdict, meter)
    if with_tensorrt_llm:
        from streamconv.tensorrt_llm_reader import read_ranks

        version, accepted, refused = read_ranks(folder)
        verdict.problems += refused
        verdict.reader = f"TensorRT-LLM {version} accepted {accepted} ranks, refused {len(refused)}"
    meter.end()
    return verdict


def _config(folder: Path, verdict: Verdict) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise VerifyError(f"{printable(str(folder))} is not a folder")
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise VerifyError(f"{printable(str(path))} is missing: this is no finished checkpoint") from None
    except (OSError, ValueError) as error:
        raise VerifyError(f"{printable(str(path))}: {error}") from error
    if not isinstance(config, dict):
        raise VerifyError(f"{printable(str(path))} is not a JSON object")
    verdict.problems += [f"config.json: {key} is missing" for key in _REQUIRED if config.get(key) is None]
    for key in ("quant_mode", "quant_algo", "kv_dtype"):
        if key in config:
            verdict.problems.append(f"config.json: top-level {key} makes the loader fail")
    return config


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
            wanted = told.hashes.get((path.name, tensor.name))
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
