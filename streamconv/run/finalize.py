"""All parts are done: what was kept aside goes into place, and the output gets its name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import xxhash

from streamconv.checkpoint.header import parse_header
from streamconv.errors import OutputError, SourceChangedError, VerifyError, printable
from streamconv.planning.parts import Part
from streamconv.planning.plan import Plan
from streamconv.run.claims import Claims
from streamconv.run.order import Hashes, hash_of
from streamconv.run.output_folder import OutputFolder
from streamconv.run.part_folder import Aside, apart
from streamconv.run.part_record import Record, measured, put_hashes, tensors
from streamconv.run.writer import Writer


def records_of(claims: Claims, plan: Plan, parts: Sequence[Part]) -> list[Record]:
    """What is known of every part.

    Raises:
        OutputError: a part is not done, or a record is of something else. SourceChangedError: parts were made from different sources.
    """
    records, fingerprint = list[Record](), plan.fingerprint()
    for number, part in enumerate(parts):
        record = claims.read(number)
        if record is None:
            where = printable(claims.place.out)
            raise OutputError(f"part {number} of {where} is not done", hint="`streamconv status` shows who is at it")
        whole = all(isinstance(digest, str) and len(digest) == 2 * Hashes.SIZE for digest in record.hashes)
        if not whole or record.fingerprint != fingerprint or len(record.hashes) != sum(1 for _ in tensors(plan, part)):
            raise OutputError(f"{printable(claims.base.path / f'{number}.json')} is of another plan", hint="start over with --force")
        records.append(record)
    for entries in zip(*(record.evidence for record in records), strict=True):
        inodes = {entry[-1]: entry for entry in entries}
        if any(entry != inodes[entry[-1]] for entry in entries):  # another inode is a copy on another machine
            raise SourceChangedError("a source file was changed after some of the parts were done", hint="start over with --force")
    return records


def finalize(claims: Claims, writer: Writer, plan: Plan, parts: Sequence[Part], records: Sequence[Record], check: bool) -> None:
    """Put everything into place and publish; the claims of all parts and the lock of the output are held.

    Args:
        check: read the output back first, and compare it with the hashes of the parts.

    Raises:
        VerifyError: something else was read; nothing was published.
    """
    page, private, hashes = claims.plan_file["page"], claims.plan_file["private"], Hashes(plan.files)
    writer.begin()
    for number, (part, record) in enumerate(zip(parts, records, strict=True)):
        put_hashes(plan, part, record, hashes)
        if part.matrices or part.constants:
            aside = Aside(claims.base, f"{number}.{record.attempt}.aside", plan.files, page, fresh=False)
            try:
                if _into_place(aside, writer.folder, plan, part, page, private) != record.aside:
                    raise OutputError(
                        f"{printable(aside.path)} is not what part {number} wrote, as this machine sees it",
                        hint="run `streamconv finalize` again, on another machine if it stays so; nothing was published",
                    )
            finally:
                aside.close()
    if check:
        _read_back(writer.folder, plan, hashes)
    writer.publish(hashes, measured(records))


def _into_place(aside: Aside, folder: OutputFolder, plan: Plan, part: Part, page: int, private: bool) -> str:
    """Copy what a part kept aside; gives its XXH3-128 (hex)."""
    digest = xxhash.xxh3_128()
    for name, begin, end in apart(plan.files, part.extents(plan), page, private):

        def take(at: int, piece: memoryview, name: str = name) -> None:
            digest.update(piece)
            folder.write(name, at, piece)

        aside.copy(name, begin, end, take)
    return digest.hexdigest()


def _read_back(folder: OutputFolder, plan: Plan, hashes: Hashes) -> None:
    """Hash every tensor as it lies on the disk."""
    folder.sync(file.name for file in plan.files)  # and out of the page cache
    for file, digests in zip(plan.files, hashes.of_files(), strict=True):
        header = parse_header(file.header, file.size, file.name)
        for name, digest in zip(file.names(), digests, strict=True):
            tensor = header.tensors[name]
            if hash_of(partial(folder.read_into, file.name), tensor.begin, tensor.end) != digest:
                raise VerifyError(
                    f"{file.name}: {printable(name)} is not what was written: another machine wrote over it",
                    hint="do the locks of this file system reach other machines? start over with --force --private-parts",
                )
