"""Places that an output must not have, said before anything is touched."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import xxhash

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.limits import MAX_CONFIG
from streamconv.checkpoint.shard import Shard
from streamconv.checkpoint.untrusted import open_regular, read_json
from streamconv.errors import CheckpointError, OutputError, StreamconvError, VerifyError, few, printable
from streamconv.lazy import np
from streamconv.planning.plan import Plan, RowRange
from streamconv.planning.tasks import encode_tasks
from streamconv.quants.base import EncodeStats
from streamconv.run import manifest
from streamconv.run.encode import encode, read_rows
from streamconv.run.fs import Disk, existing, named, not_ours, translate_errors
from streamconv.run.inside import choose
from streamconv.run.order import ReductionResults
from streamconv.run.place import CONFIG, Existing, Place, foreign

_ELSEWHERE = "choose another folder"
_MOST = 256
"""Spans that are looked at, spread over the plan."""


def check_place(place: Place, source: Path | None, read: Iterable[Path] = ()) -> None:
    """Refuse places that would destroy something.

    Args:
        source: the model's folder or file, if there is one; what its links lead to counts too.
        read: other files that are read.

    Raises:
        OutputError: the output is not a folder, or is the source, or it, or a hidden name of it, holds the source or
            a file that is read; or something else than a run's has such a hidden name.
    """
    out, used = place.out, list(_used(source, read))
    if source is not None:
        real_source = Path(os.path.realpath(source))
        if os.path.isdir(real_source) and out == real_source:
            hint = "choose another folder, a new one in it for example"
            raise OutputError(f"output {printable(out)} is the source folder", hint=hint)
        if out in real_source.parents:
            raise OutputError(f"output {printable(out)} holds the source", hint=_ELSEWHERE)
    for path, real in used:
        if out in real.parents:
            where = f"output {printable(out)} holds {printable(real.name)}"
            raise OutputError(f"{where}, which {printable(path)} leads to", hint=_ELSEWHERE)
    for kept in place.hidden_paths():
        for path, real in used:
            if kept == real or kept in real.parents:
                where = f"{printable(kept)} is where work for the output is kept"
                raise OutputError(f"{printable(path)} is read, and {where}", hint=_ELSEWHERE)
        _check_hidden(kept)
    with translate_errors(out, "look at"):
        if os.path.lexists(out) and not os.path.isdir(out):
            raise OutputError(f"output {printable(out)} exists and is not a folder", hint="choose another name")


def _used(source: Path | None, read: Iterable[Path]) -> Iterator[tuple[Path, Path]]:
    """Everything that is read, and what it leads to."""
    paths = [*read]
    if source is not None:
        with translate_errors(source, "read"):
            paths += [source, *(source.iterdir() if os.path.isdir(source) else [])]
    for path in paths:
        yield path, Path(os.path.realpath(path))


def _check_hidden(path: Path) -> None:
    """A hidden name that leads away, or makes us wait."""
    with translate_errors(path, "look at"):
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise not_ours(path, "is a link" if stat.S_ISLNK(mode) else "is not a file")


def check_free(place: Place, force: bool) -> Existing:
    """Refuse to replace a folder that holds something, unless forced; and one that holds more than a checkpoint in any case,
    or a side file or config.json that somebody edited.

    Args:
        place: opened.

    Returns:
        what may be replaced.

    Raises:
        OutputError: it does.
    """
    shown = printable(place.out)
    with translate_errors(place.out, "read"):
        there = place.existing()
    odd = foreign(there.files, place.ours, place.out / manifest.NAME)
    if odd:
        raise OutputError(
            f"output {shown} exists and is not empty, and is no checkpoint folder: it holds {few([*map(printable, odd)], 3)}",
            hint="choose another folder, or empty it yourself: --force replaces nothing but a checkpoint",
        )
    if there.files and not force:
        raise OutputError(f"output {shown} exists and is not empty", hint="--force replaces it")
    # a model has the names that an output of it has: only the manifest tells them apart
    if whose := foreign(there.files, (), place.out / manifest.NAME):
        raise OutputError(
            f"output {shown} holds {printable(whose[0])} and no {manifest.NAME} that lists it: it may be somebody's model",
            hint="choose another folder, or empty it yourself: --force replaces nothing but an output",
        )
    if changed := edited(place.out, there.files):
        raise OutputError(
            f"output {shown} holds {few([*map(printable, changed)], 3)}, changed after it was written: --force would destroy the change",
            hint="move what you want to keep out of the folder, remove the rest, then run again; or choose another folder",
        )
    return there


def edited(out: Path, names: Collection[str]) -> list[str]:
    """Which of these files of an output, weights apart, hold other bytes than its manifest tells; none if it has no sound manifest.

    A config.json that is no JSON object is damaged and not edited: --force mends it.
    """
    try:
        head = manifest.read_head(out / manifest.NAME)
    except VerifyError:
        return []
    hashes = {name: digest for name, (_, digest) in head.side.items()} | {CONFIG: head.config}
    changed = [name for name, digest in hashes.items() if name in names and _hash_of(out / name) != digest]
    with contextlib.suppress(CheckpointError):
        read_json(out / CONFIG, MAX_CONFIG)
        return changed
    return [name for name in changed if name != CONFIG]


def _hash_of(path: Path) -> str:
    """XXH3-128 (hex) of a file, "" of what cannot be read."""
    digest = xxhash.xxh3_128()
    try:
        with open(open_regular(path, OutputError), "rb") as file:
            for piece in iter(lambda: file.read(1 << 20), b""):
                digest.update(piece)
    except (OSError, OutputError):
        return ""
    return digest.hexdigest()


def check_apart(places: Sequence[Place], source: Path) -> None:
    """Refuse outputs of one run that would get into each other's way.

    Raises:
        OutputError: two are the same folder, or one lies in another, or in the source.
    """
    real = Path(os.path.realpath(source))
    for number, place in enumerate(places):
        if real in place.out.parents:
            raise OutputError(f"output {printable(place.out)} is in the source folder", hint=_ELSEWHERE)
        for other in places[number + 1 :]:
            for one, two in ((place, other), (other, place)):
                if one.out == two.out:
                    raise OutputError(f"two outputs are to be written to {printable(one.out)}", hint="give each a folder of its own")
                if any(one.out in (kept, *kept.parents) for kept in (two.out, *two.hidden_paths())):
                    shown = f"output {printable(two.out)}, or where work for it is kept,"
                    raise OutputError(f"{shown} is in output {printable(one.out)}", hint="give each a folder of its own")


def has_rows_of(plan: Plan, shards: Sequence[Shard], out: Path) -> bool:
    """Whether an output was made of these weights: the first rows of some matrices are what encoding the source gives.

    The manifest tells the plan, which is the same for a fine-tune of the same shapes; `verify --source` compares all of it. What needs a
    reduction is passed over.

    Raises:
        StreamconvError: the source cannot be read.
    """
    step, compared = max(1, len(plan.spans) // _MOST), 0
    for number in range(0, len(plan.spans), step):
        span = plan.spans[number]
        if span.reduce is None and not any(plan.matrices.codec(dest.matrix).needs for dest in span.dests):
            if not _same(plan, shards, span, out):
                return False
            compared += 1
    return compared > 0


def _same(plan: Plan, shards: Sequence[Shard], span: RowRange, out: Path) -> bool:
    source_rows = min(span.align, span.stop - span.start)
    rows = span.op.out_rows(source_rows)
    buffer = np.empty(source_rows * span.row_bytes, np.uint8)
    scratch = np.empty(source_rows * span.scratch_row_bytes, np.uint8)
    block = read_rows(shards, span, span.start, span.start + source_rows, buffer, scratch)
    for task, dests in encode_tasks(span, plan.matrices).items():
        out_arena = np.empty(sum(task.row_costs) * rows + 65536, np.uint8)
        encoded = encode(task.bound(ReductionResults(()), span.source.name), rows, block, out_arena, EncodeStats())
        for dest in dests:
            matrix = plan.matrices[dest.matrix]
            with open(out / plan.files[matrix.file].name, "rb") as file:
                for place, part in zip(matrix.places, encoded, strict=True):
                    file.seek(place.extent(dest.row, rows)[0])
                    if file.read(part.size) != part.tobytes():
                        return False
    return True


def is_made(out: Path, source: Path, plan: Plan, shards: Sequence[Shard]) -> bool:
    """A folder is the finished output of a plan: its manifest says so, its files have their sizes, nobody edited any but the weights, and
    these are those of the source.

    They are if no file of the source is newer than the output, or else if some rows of it are what encoding the source gives.
    """
    manifest_path = out / manifest.NAME
    try:
        if manifest.read_head(manifest_path).fingerprint != plan.fingerprint():
            return False
        sizes = {file.name: file.size for file in plan.files} | {file.name: file.size for file in plan.side_files}
        if any((out / name).stat().st_size != size for name, size in sizes.items()) or edited(out, sizes):
            return False
        modified = manifest_path.stat().st_mtime_ns
        read = [path for path in (source / "config.json", *(shard.path for shard in shards)) if os.path.lexists(path)]
        older = all(max(known.st_mtime_ns, known.st_ctime_ns) <= modified for path in read for known in (path.lstat(), path.stat()))
        here = all(os.path.lexists(shard.path) for shard in shards)  # nothing is downloaded for this
        return older or (here and has_rows_of(plan, shards, out))
    except (OSError, StreamconvError):
        return False


def check_output(place: Place, source: Path, read: Iterable[Path], force: bool) -> None:
    """What can be said of an output without touching anything.

    Args:
        place: not opened.

    Raises:
        OutputError: see `check_place` and `check_free`.
    """
    check_place(place, source, read)
    # what an earlier run left is looked at with the lock held
    if os.path.isdir(place.top) and not any(os.path.lexists(place.top / place.hidden(what)) for what in ("journal", "lock")):
        try:
            place.open()
            check_free(place, force)
        finally:
            place.close()


def files_read(plan: Plan, shards: Sequence[Shard]) -> list[Path]:
    """All that a conversion reads, the source's config.json apart."""
    return [shard.path for shard in shards] + [*plan.target.files_read]


def output_problem(index: Index, plan: Plan, out: str | Path) -> str | None:
    """Why `convert` would refuse to write to `out`, as far as that shows without touching anything; None if nothing speaks against it."""
    try:
        place = choose(named(out), Disk())
        place.ours |= plan.names
        check_output(place, index.root, files_read(plan, index.shards), force=False)
    except OutputError as error:
        return f"{error.message} ({error.hint})" if error.hint else error.message
    folder = existing(place.top)
    return None if os.access(folder, os.W_OK | os.X_OK) else f"nothing can be written in {printable(folder)}"
