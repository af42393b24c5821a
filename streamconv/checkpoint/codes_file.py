"""INT4 codes that a search found, beside a source of floats: what takes the place of the weights it covers.

For a linear module M the file holds `M.weight` U8 [N/2, K] (ModelOpt's nibbles), `M.weight_scale` F32 [N, K/g], `M.losses` F32 [3] and,
with AWQ, `M.pre_quant_scale` F32 [K], what its inputs are multiplied by. Where norms or the rows of another layer do that (`folded`), the
norms and biases that change are in the file under their own names.
"""

from __future__ import annotations

import json
import math
import os
import struct
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from streamconv.checkpoint.derived_rows import BLOCK, WIDE, read_stripe, turned
from streamconv.checkpoint.dtypes import F32, I8, DType
from streamconv.checkpoint.header import read_header
from streamconv.checkpoint.header_parse import TensorEntry
from streamconv.checkpoint.rows import Derived, Extent, PackedTensor, SourceFile, tensor_at
from streamconv.checkpoint.shard import Shard
from streamconv.errors import DataError, TensorError, UsageError, printable
from streamconv.lazy import Bytes, np
from streamconv.options import SEARCHED

if TYPE_CHECKING:
    from streamconv.checkpoint.index import Index

HINT = "--text FILE finds them now"
_RANGE = {"F16": (2.0**-24, 65504.0), "BF16": (2.0**-126, 3.3895e38), "F32": (2.0**-126, 3.4028e38)}
"""The smallest and largest scale in a type; engines take numbers below the normal ones of the wide types for zero."""
_FOLDS = ("", "norms", "all")
_MARK, _MARKED = 4096, 64
"""Bytes of a weight that `mark_of` reads, and of about how many weights."""
_FEW = 1024
"""Linear layers that a manifest names one by one."""


@dataclass(frozen=True, slots=True)
class ApartCodes(PackedTensor):
    """Codes of a file of their own: `pieces` is empty, for none of them lie in the source; `stored` is the tensor there."""

    file: Shard = field(kw_only=True)
    stored: PackedTensor = field(kw_only=True)

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        self.stored.read((self.file,), start, stop, out, scratch)

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        self.stored.drop_page_cache((self.file,), start, stop)

    def turned(self) -> ApartTensor:
        """The same by input channels, [K, N]."""
        shape = self.cols, self.rows
        return ApartTensor(self.name, I8, shape, (), file=self.file, stored=TurnedCodes(self.name, I8, shape, self.stored.pieces))


@dataclass(frozen=True, slots=True)
class TurnedCodes(PackedTensor):
    """Codes read by columns of what is stored, [N/2, K]: `shape` is (K, N)."""

    @property
    def row_align(self) -> int:
        return WIDE

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        count, pairs = stop - start, self.cols // 2
        stored = read_stripe(shards, self.pieces[0], start, stop, scratch).reshape(pairs, count)
        codes = out[: count * self.cols]
        columns = codes.view(np.uint16).reshape(count, pairs)  # an item is a pair of channels
        for first in range(0, pairs, BLOCK):
            block = stored[first : first + BLOCK]
            columns[:, first : first + BLOCK] = ((block & 15) | ((block >> 4).astype(np.uint16) << 8)).T
        np.bitwise_xor(codes, 8, out=codes)  # two's complement
        np.subtract(codes, 8, out=codes)


@dataclass(frozen=True, slots=True)
class ApartTensor(Derived):
    """A tensor of a file of its own; as `ApartCodes`.

    Attributes:
        into: the type that these scales are rounded to; None if they are none.
    """

    file: Shard = field(kw_only=True)
    into: DType | None = None

    def turned(self) -> ApartTensor:
        """Its columns."""
        return replace(self, shape=(self.cols, self.rows), stored=turned(self.stored))

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        """Rows [start, stop).

        Raises:
            DataError: one is no scale: not positive, or not finite, before or after it is rounded.
        """
        self.stored.read((self.file,), start, stop, out, scratch)
        if self.into is None:
            return
        values, (least, most) = out[: (stop - start) * 4 * self.cols].view(np.float32), _RANGE[self.into.name]
        bad = ~((values >= least) & (values <= most))  # NaN is in no range
        if bad.any():
            problem = f"{printable(self.file.path)}: {printable(self.name)} holds {float(values[bad.argmax()]):g}, which is no scale"
            raise DataError(problem if self.into == F32 else f"{problem} in {self.into.torch}", hint=HINT)


@dataclass(frozen=True, slots=True)
class Found:
    """What the file has for a module.

    Attributes:
        codes: [N, K]; scales: F32 [N, K/g]; multiplier: F32 [K], None for ones.
    """

    codes: ApartCodes
    scales: ApartTensor
    multiplier: ApartTensor | None

    @property
    def group(self) -> int:
        return self.codes.cols // self.scales.cols


@dataclass(frozen=True, slots=True)
class Losses:
    """Relative output errors on the text: mean square of what the codes change in a layer's outputs, over that of the outputs.

    Attributes:
        each: linear layer -> (rounded to nearest, as found).
    """

    method: str
    each: Mapping[str, tuple[float, float]]

    def mean(self) -> tuple[float, float]:
        """Over all layers, rounded to nearest and as found."""
        count = max(1, len(self.each))
        return sum(plain for plain, _ in self.each.values()) / count, sum(searched for _, searched in self.each.values()) / count

    def worst(self, count: int = 5) -> dict[str, tuple[float, float]]:
        """The layers whose error is largest as found, the worst first."""
        return dict(sorted(self.each.items(), key=lambda pair: (-pair[1][1], pair[0]))[:count])

    def line(self) -> str:
        """For people."""
        plain, searched = self.mean()
        errors = f"{plain:.2%} rounded to nearest, {searched:.2%} with {self.method}"
        return f"mean relative output error of {len(self.each)} linear layers: {errors}"

    def to_json(self) -> dict[str, Any]:
        """For the manifest; every layer where there are few, else the worst alone."""

        def pair(rtn: float, searched: float) -> dict[str, float]:
            return {"rtn": float(f"{rtn:.4g}"), "found": float(f"{searched:.4g}")}

        record: dict[str, Any] = {"method": self.method, "linear_layers": len(self.each), "mean": pair(*self.mean())}
        record["worst"] = {name: pair(*both) for name, both in self.worst().items()}
        return record | ({"each": {name: pair(*both) for name, both in self.each.items()}} if len(self.each) <= _FEW else {})


def _told(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """What a file says of the search that made it."""
    try:
        calibration = json.loads(metadata.get("calibration", "{}"))
    except (ValueError, RecursionError):
        return {}
    return calibration if isinstance(calibration, dict) else {}


def mark_of(index: Index, modules: Iterable[str]) -> str:
    """XXH3-128 (hex) of the first bytes of some weights, in whatever files they lie: tells the model that codes were found for."""
    names = sorted(name for name in (f"{module}.weight" for module in modules) if name in index.tensors)
    digest = xxhash.xxh3_128()
    for name in names[:: len(names) // _MARKED + 1]:
        record = index.tensors[name]
        with index.shards[record.shard].window(record.begin, record.begin + min(record.nbytes, _MARK)) as data:
            digest.update(data)
    return digest.hexdigest()


class Codes:
    """An open file of codes; equal only to itself. Safe to read from any thread.

    Attributes:
        method: that found them; None if the file does not say.
        folded: which pre-scales the layers before take: "", "norms" or "all".

    Raises:
        UsageError: there is no such file. HeaderError: it is no safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not os.path.isfile(self.path):
            raise UsageError(f"--codes {printable(path)}: no such file", hint=HINT)
        header = read_header(self.path)
        calibration = _told(header.metadata)
        self._entries, self._weights = header.tensors, calibration.get("weights")
        self.folded = str(calibration.get("folded", ""))
        self.method: str | None = calibration.get("method") if calibration.get("method") in SEARCHED else None
        self.shard = Shard(self.path)
        weakref.finalize(self, self.shard.close)  # plans refer to it: the last of them closes it
        stray = next((name for name in self.changed() if not self.folded), None)
        if self.folded not in _FOLDS or stray is not None:
            why = "it does not say where pre-scales are" if stray is None else f"{printable(stray)} is none of a linear layer's codes"
            raise TensorError(f"--codes {printable(path)}: {why}", hint=HINT)

    def identity(self) -> SourceFile:
        """The header says which calibration it was, so its hash stands for the content."""
        return SourceFile(self.path.name, self.shard.size, self.shard.header_hash())

    def check_model(self, index: Index) -> None:
        """Raises TensorError if the codes were found for other weights; files of earlier releases do not say it."""
        if self._weights is not None and self._weights != mark_of(index, self.modules()):
            raise TensorError(f"--codes {printable(self.path)}: they were found for other weights than these", hint=HINT)

    def has(self, module: str) -> bool:
        return f"{module}.weight_scale" in self._entries

    def modules(self) -> Iterator[str]:
        """Linear modules that have codes."""
        return (name.removesuffix(".weight_scale") for name in self._entries if name.endswith(".weight_scale"))

    def changed(self) -> dict[str, ApartTensor]:
        """Norms and biases of the source with pre-scales in them, by name."""
        mine = {f"{module}.{leaf}" for module in self.modules() for leaf in ("weight", "weight_scale", "losses", "pre_quant_scale")}
        return {name: self._apart(entry, None) for name, entry in self._entries.items() if name not in mine}

    def found(self, module: str, shape: tuple[int, ...], weight: str) -> Found:
        """The codes of a module.

        Args:
            shape: of its weight, (N, K).
            weight: name of the weight that they take the place of.

        Raises:
            TensorError: they are not there, or of another shape.
        """
        where, (rows, cols) = f"{printable(self.path)}: {printable(module)}", shape
        codes, scales = (self._entries.get(f"{module}.{leaf}") for leaf in ("weight", "weight_scale"))
        if codes is None or scales is None:
            raise TensorError(f"{where} has no codes; were they found for this model?", hint=HINT)
        groups = scales.shape[1] if len(scales.shape) == 2 else 0
        fits = codes.dtype.name == "U8" and codes.shape == (rows // 2, cols) and scales.dtype == F32
        if not fits or scales.shape[0] != rows or not groups or cols % groups or rows % 2:
            raise TensorError(f"{where}: codes {list(codes.shape)} and scales {list(scales.shape)} are not those of [{rows}, {cols}]")
        multiplier = self._entries.get(f"{module}.pre_quant_scale")
        if multiplier is not None and (multiplier.shape != (cols,) or multiplier.dtype != F32):
            other = f"pre_quant_scale {multiplier.dtype} {list(multiplier.shape)}, and the inputs mean F32 [{cols}]"
            raise TensorError(f"{where}: {other}")
        pairs = PackedTensor(weight, I8, shape, (Extent(0, codes.begin, rows // 2, cols),), packing="modelopt", module=module)
        apart = ApartCodes(weight, I8, shape, (), packing="modelopt", module=module, file=self.shard, stored=pairs)
        return Found(apart, self._apart(scales, F32), None if multiplier is None else self._apart(multiplier, F32))

    def _apart(self, entry: TensorEntry, into: DType | None) -> ApartTensor:
        stored = tensor_at(entry.name, entry.dtype, entry.shape, 0, entry.begin)
        return ApartTensor(entry.name, entry.dtype, entry.shape, (), file=self.shard, stored=stored, into=into)

    def losses(self) -> Losses:
        """What the search lost in each linear layer that tokens reached."""
        each = {}
        for name, entry in self._entries.items():
            if name.endswith(".losses") and entry.shape == (3,) and entry.dtype == F32:
                with self.shard.window(entry.begin, entry.end) as data:
                    energy, rtn, best = struct.unpack("<3f", bytes(data[:12]))
                if 0 < energy < math.inf and 0 <= rtn < math.inf and 0 <= best < math.inf:
                    each[name.removesuffix(".losses")] = (rtn / energy, best / energy)
        return Losses(self.method or "", each)


def codes_of(method: str | None, path: str | None) -> Codes | None:
    """The file of codes that a method needs.

    Raises:
        UsageError: it is not given, or another method needs none.
    """
    if (path is None) == (method not in SEARCHED):
        codes = None if path is None else Codes(path)
        if codes is not None and codes.method not in (None, method):
            raise UsageError(f"--method {method}: the codes of {printable(path)} are those of {codes.method}", hint="name that method")
        return codes
    if path is None:
        raise UsageError(f"--method {method} looks at what goes through the layers on some text", hint=f"{HINT}; or --codes FILE")
    raise UsageError("--codes is for --method " + ", ".join(SEARCHED), hint="leave it out")
