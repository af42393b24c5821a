"""streamconv.json: what was asked, from what, and the hash of everything written, itself too. No times, no host names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv import __version__
from streamconv.errors import VerifyError, printable
from streamconv.options import Options
from streamconv.plan import Plan, SourceFile

NAME = "streamconv.json"
FORMAT = 1


def build(plan: Plan, hashes: dict[tuple[str, str], str], no_lock: bool = False) -> bytes:
    """The manifest's bytes; the same for the same output.

    Args:
        no_lock: the run was allowed to go on without a lock, and without syncing folders.
    """
    import xxhash

    content: dict[str, Any] = {
        "format": FORMAT,
        "streamconv": __version__,
        "target": {"tool": "tensorrt-llm", "version": plan.options.target_version},
        "family": plan.family,
        "dtype": plan.dtype.torch,
        "fingerprint": plan.fingerprint(),
        "options": plan.options.to_json(),
        "source": [
            {"file": source.name, "size": source.size, "header_sha256": source.header_hash} for source in plan.sources
        ],
        "hash": "xxh3_128",
        "config": xxhash.xxh3_128(plan.config).hexdigest(),
        "files": {
            file.name: {
                "size": file.size,
                "header": xxhash.xxh3_128(file.header).hexdigest(),
                "tensors": {tensor.name: hashes[file.name, tensor.name] for tensor in file.tensors},
            }
            for file in plan.files
        },
    }
    return _render(content | ({"no_lock": True} if no_lock else {}))


def _render(content: dict[str, Any]) -> bytes:
    """JSON whose last entry is the hash of the rest."""
    import xxhash

    check = xxhash.xxh3_128(json.dumps(content).encode()).hexdigest()
    return (json.dumps(content | {"check": check}, indent=1) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest read back.

    Attributes:
        hashes: (file, tensor) -> XXH3-128 hex.
        headers: file -> XXH3-128 hex of everything before its first tensor.
        config: XXH3-128 hex of config.json.
    """

    options: Options
    fingerprint: str
    sources: tuple[SourceFile, ...]
    sizes: dict[str, int]
    hashes: dict[tuple[str, str], str]
    headers: dict[str, str]
    config: str


def load(folder: Path) -> Manifest | None:
    """The manifest of an output folder, None if it has none (another tool wrote it).

    Raises:
        VerifyError: it is not a manifest this version reads.
    """
    path = folder / NAME
    return read(path) if path.exists() else None


def read(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        VerifyError: it is not a manifest this version reads.
    """
    try:
        data = path.read_bytes()
        content: dict[str, Any] = json.loads(data)
        if content["format"] != FORMAT:
            raise VerifyError(f"{printable(str(path))}: format {content['format']} is not {FORMAT}")
        if _render({key: value for key, value in content.items() if key != "check"}) != data:
            raise VerifyError(f"{printable(str(path))}: the bytes are not those that were written")
        return Manifest(
            Options(**content["options"]),
            content["fingerprint"],
            tuple(SourceFile(s["file"], s["size"], s["header_sha256"]) for s in content["source"]),
            {name: file["size"] for name, file in content["files"].items()},
            {(n, t): h for n, file in content["files"].items() for t, h in file["tensors"].items()},
            {name: file["header"] for name, file in content["files"].items()},
            content["config"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerifyError(f"{printable(str(path))} is not a streamconv manifest: {error}") from error
