"""What is known of a part that is done: the hashes of its tensors, what encoding met, which attempt holds its bytes.

One line as of a journal, in a file that gets its name when all bytes of the part are on the disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from streamconv.planning.parts import Part
from streamconv.planning.plan import Plan
from streamconv.run.journal import sealed, unsealed
from streamconv.run.order import Hashes

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Record:
    """A part that is done.

    Attributes:
        attempt: names the file aside that belongs to it; `aside` is the XXH3-128 (hex) of what is in it.
        hashes: for each tensor of the part, in the order of `tensors`, its XXH3-128 (hex).
        evidence: what each source file was: modification and change time, inode.
        overflow, nonfinite: as of `OutputState`.
        tiles, bytes_read: of this attempt.
        snr: what `--verify inline` measured, as of `run.manifest`.
    """

    fingerprint: str
    attempt: str
    hashes: tuple[str, ...]
    evidence: tuple[tuple[int, ...], ...]
    aside: str = ""
    overflow: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    tiles: int = 0
    bytes_read: int = 0
    snr: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        values = {name: getattr(self, name) for name in self.__slots__}
        return sealed({"format": FORMAT, **values})

    @classmethod
    def from_bytes(cls, data: bytes) -> Record | None:
        """What `to_bytes` gave; None if it is anything else."""
        values = unsealed(data[:-1])
        if values is None or values.pop("format", None) != FORMAT or set(values) != set(cls.__slots__):
            return None
        hashes, evidence = values.pop("hashes"), values.pop("evidence")
        return cls(hashes=tuple(hashes), evidence=tuple(tuple(entry) for entry in evidence), **values)


def tensors(plan: Plan, part: Part) -> Iterator[tuple[int, int]]:
    """File and position of the tensors of a part."""
    for number in part.matrices:
        matrix = plan.matrices[number]
        yield from ((matrix.file, place.position) for place in matrix.places)
    yield from ((constant.file, constant.position) for constant in part.constants)


def hashes_of(plan: Plan, part: Part, hashes: Hashes) -> tuple[str, ...]:
    """Those of a part, once it is done."""
    return tuple(hashes.at(file, position) for file, position in tensors(plan, part))


def put_hashes(plan: Plan, part: Part, record: Record, hashes: Hashes) -> None:
    """The reverse."""
    for (file, position), digest in zip(tensors(plan, part), record.hashes, strict=True):
        hashes.put(file, position, bytes.fromhex(digest))


def measured(records: Sequence[Record]) -> Mapping[str, Mapping[str, float | str]] | None:
    """The SNR of every matrix that some part looked at; None if none did."""
    total: dict[str, dict[str, float | str]] = {}
    for record in records:
        for file, values in record.snr.items():
            total.setdefault(file, {}).update(values)
    return total or None


def counted(records: Sequence[Record], what: str) -> dict[str, int]:
    """EncodeStats of all parts together."""
    total = Counter[str]()
    for record in records:
        total.update(getattr(record, what))
    return total
