"""Prove a written checkpoint: what the engine's loader asks, the manifest's hashes, and the source."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from streamconv.checkpoint.header import read_header
from streamconv.checkpoint.limits import MAX_CONFIG, check_counts
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.untrusted import parse_json, read_file
from streamconv.errors import StreamconvError, VerifyError, printable
from streamconv.options import Resources
from streamconv.progress import Meter, unwatched
from streamconv.run import manifest
from streamconv.targets import checks_of, target_of
from streamconv.targets.checks import Contents
from streamconv.verification import against_source
from streamconv.verification.verdict import Verdict


def verify(
    out: str | Path,
    source: str | Path | None = None,
    *,
    with_tensorrt_llm: bool = False,
    activation_ranges: str | None = None,
    resources: Resources | None = None,
    meter: Meter | None = None,
    part: tuple[int, int] | None = None,
) -> Verdict:
    """Check an output folder; see `verbs.verify`.

    Args:
        meter: told about progress: the bytes of the weight files, then those read of the source.
        part: (K, N): of N machines that share the work this is number K, from 0; structure is checked by each.
    """
    folder, verdict, meter = Path(out), Verdict(), meter or Meter(unwatched)
    config, config_bytes = _config(folder)
    record = manifest.load(folder)
    kind = checks_of(record.target if record is not None else target_of(config).key)
    if record is None:
        verdict.warnings.append(f"no {manifest.NAME}: another tool wrote this; hashes cannot be checked")
    elif xxhash.xxh3_128(config_bytes).hexdigest() != record.config:
        verdict.problems.append("config.json: hash mismatch")
    names = kind.tensor_files(folder, config, verdict.problems)
    shapes: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    hashes: dict[tuple[str, str], str] = {}
    total, before = sum((folder / name).stat().st_size for name in names), 0
    meter.begin("checking", total)
    for name in names:
        try:
            mine = partial(_is_in, part, before, total)
            shapes[name] = _tensor_file(folder / name, record, verdict, hashes, meter.add, kind.LOADABLE, mine)
            before += (folder / name).stat().st_size
        except StreamconvError as error:
            verdict.problems.append(str(error))
        verdict.files += 1
    # of an output of ours hashes tell already whether a file is in its place
    problems, warnings = kind.check(Contents(folder, config, shapes, hashes if part is None else {}, copies=record is None))
    verdict.problems += problems
    verdict.warnings += warnings
    if record is not None:
        for file, recorded in record.hashes.items():
            missing = [tensor for tensor in recorded if file in shapes and tensor not in shapes[file]]
            verdict.problems += [f"{file}: {printable(tensor)} is missing" for tensor in missing]
            if file not in shapes and not os.path.exists(folder / file):
                verdict.problems.append(f"{file} is missing")
        for side, (size, digest) in record.side.items():
            verdict.problems += _side_file(folder / side, side, size, digest)
    if source is not None and not verdict.problems:
        against_source.check(folder, config_bytes, record, activation_ranges, source, resources or Resources(), verdict, meter, part)
    if with_tensorrt_llm:
        verdict.reader, refused = kind.engine_reads(folder)
        verdict.problems += refused
    meter.end()
    return verdict


def _is_in(part: tuple[int, int] | None, before: int, total: int, at: int) -> bool:
    """Whether a tensor belongs to a share of the work, by the bytes that come before it."""
    return part is None or (before + at) * part[1] // total == part[0]


def _config(folder: Path) -> tuple[dict[str, Any], bytes]:
    path = folder / "config.json"
    if not os.path.isdir(folder):
        raise VerifyError(f"{printable(folder)} is not a folder")
    if not os.path.lexists(path):
        raise VerifyError(f"{printable(path)} is missing: this is no finished checkpoint")
    data = read_file(path, MAX_CONFIG, VerifyError)
    check_counts(data, printable(path), VerifyError)
    config = parse_json(data, printable(path), VerifyError)
    if not isinstance(config, dict):
        raise VerifyError(f"{printable(path)} is not a JSON object")
    return config, data


def _tensor_file(
    path: Path,
    record: manifest.Manifest | None,
    verdict: Verdict,
    hashes: dict[tuple[str, str], str],
    progress: Callable[[int], None],
    loadable: Collection[str],
    mine: Callable[[int], bool],
) -> dict[str, tuple[str, tuple[int, ...]]]:
    header = read_header(path)
    shapes = {}
    if record is not None and path.name in record.sizes and path.stat().st_size != record.sizes[path.name]:
        verdict.problems.append(f"{path.name}: {path.stat().st_size} bytes, the manifest says {record.sizes[path.name]}")
    with Shard(path) as shard:
        with shard.window(0, header.data_start) as window:
            if record is not None and xxhash.xxh3_128(window).hexdigest() != record.headers.get(path.name):
                verdict.problems.append(f"{path.name}: hash mismatch in the header")
        for tensor in header.tensors.values():
            shapes[tensor.name] = (tensor.dtype.name, tensor.shape)
            if tensor.dtype.name not in loadable:
                verdict.problems.append(f"{path.name}: {printable(tensor.name)}: dtype {tensor.dtype} cannot be loaded")
            if not mine(tensor.begin):
                progress(tensor.end - tensor.begin)
                continue
            digest = xxhash.xxh3_128()
            for at in range(tensor.begin, tensor.end, 8 << 20):
                stop = min(at + (8 << 20), tensor.end)
                with shard.window(at, stop) as window:
                    digest.update(window)
                progress(stop - at)
            hashed = hashes[path.name, tensor.name] = digest.hexdigest()
            verdict.tensors += 1
            if record is None:
                continue
            recorded = record.hashes.get(path.name, {}).get(tensor.name)
            if recorded is None:
                verdict.problems.append(f"{path.name}: {printable(tensor.name)} is not in the manifest")
            elif recorded != hashed:
                verdict.problems.append(f"{path.name}: {printable(tensor.name)}: hash mismatch")
            else:
                verdict.hashed += 1
    return shapes


def _side_file(path: Path, name: str, size: int, digest: str) -> list[str]:
    """What is wrong with a file that holds no tensors."""
    shown = printable(name)
    if not os.path.lexists(path):
        return [f"{shown} is missing"]
    data = read_file(path, max(size, 1), VerifyError)
    if len(data) != size or xxhash.xxh3_128(data).hexdigest() != digest:
        return [f"{shown}: hash mismatch"]
    return []
