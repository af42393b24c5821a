"""INT4 codes that a search found, beside a source of floats: what takes the place of the weights it covers.

For a linear module M the file holds `M.weight` U8 [N/2, K] (ModelOpt's nibbles), `M.weight_scale` F32 [N, K/g], `M.losses` F32 [3] and,
with AWQ, `M.pre_quant_scale` F32 [K], what its inputs are multiplied by. Where norms or the rows of another layer do that (`folded`), the
norms and biases that change are in the file under their own names.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.checkpoint.dtypes import F32, I8
from streamconv.checkpoint.header import read_header
from streamconv.checkpoint.header_parse import TensorEntry
from streamconv.checkpoint.packed_rows import read_channels
from streamconv.checkpoint.rows import PackedTensor, SourceFile, SourceTensor
from streamconv.checkpoint.shard import Shard
from streamconv.errors import TensorError, UsageError, printable
from streamconv.lazy import Bytes
from streamconv.options import SEARCHED

HINT = "--text FILE finds them now"
_FEW = 1024
"""Linear layers that a manifest names one by one."""


@dataclass(frozen=True, slots=True)
class ApartCodes(PackedTensor):
    """Codes of a file of their own: `pieces` is empty, for none of them lie in the source.

    Attributes:
        file, begin: where the stored bytes [N/2, K] lie.
    """

    file: Shard | None = None
    begin: int = 0

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        assert self.file is not None
        at = (self.begin, self.rows // 2, self.cols)
        read_channels(self.file, at, "modelopt", 4, self.cols, start, stop, out, scratch)

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        assert self.file is not None
        self.file.drop_page_cache(self.begin + start // 2 * self.cols, self.begin + stop // 2 * self.cols)


    def turned(self) -> TurnedCodes:
        """The same by input channels, [K, N]."""
        return TurnedCodes(self.name, I8, (self.cols, self.rows), (), 0, 4, "modelopt", self.module, self.file, self.begin)


@dataclass(frozen=True, slots=True)
class TurnedCodes(ApartCodes):
    """Codes read by columns of what is stored, [N/2, K]: `shape` is (K, N)."""

    @property
    def row_align(self) -> int:
        return 1

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        assert self.file is not None
        count, pairs = stop - start, self.cols // 2
        packed = scratch[: count * pairs]
        self.file.read_rows_into(self.begin + start, self.rows, count, pairs, packed.data, count)
        stored, made = packed.reshape(pairs, count).T, out[: count * self.cols].reshape(count, pairs, 2)
        made[:, :, 0], made[:, :, 1] = (stored & 15) ^ 8, (stored >> 4) ^ 8  # two's complement
        made -= 8

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        """Nothing: the pages of a stripe hold parts of the next ones."""


@dataclass(frozen=True, slots=True)
class ApartTensor(SourceTensor):
    """A tensor of a file of its own; as `ApartCodes`."""

    file: Shard | None = None
    begin: int = 0

    def turned(self) -> TurnedTensor:
        """Its columns."""
        return TurnedTensor(self.name, self.dtype, (self.cols, self.rows), (), 0, self.file, self.begin)

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        assert self.file is not None
        each = self.stored_row_bytes
        self.file.read_into(self.begin + start * each, out.data[: (stop - start) * each])

    def drop_page_cache(self, shards: Sequence[Shard], start: int, stop: int) -> None:
        """Nothing: scales are small."""


@dataclass(frozen=True, slots=True)
class TurnedTensor(ApartTensor):
    """Columns of what is stored, [shape[1], shape[0]]."""

    @property
    def scratch_row_bytes(self) -> int:
        return self.stored_row_bytes

    def read(self, shards: Sequence[Shard], start: int, stop: int, out: Bytes, scratch: Bytes) -> None:
        assert self.file is not None
        item, count = self.dtype.itemsize, stop - start
        stripe = scratch[: count * self.stored_row_bytes]
        self.file.read_rows_into(self.begin + start * item, self.rows * item, count * item, self.cols, stripe.data, count * item)
        out[: stripe.size].reshape(count, self.cols, item)[:] = stripe.reshape(self.cols, count, item).swapaxes(0, 1)


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
        return sum(plain for plain, _ in self.each.values()) / count, sum(found for _, found in self.each.values()) / count

    def worst(self, count: int = 5) -> dict[str, tuple[float, float]]:
        """The layers whose error is largest as found, the worst first."""
        return dict(sorted(self.each.items(), key=lambda pair: (-pair[1][1], pair[0]))[:count])

    def line(self) -> str:
        """For people."""
        plain, found = self.mean()
        told = f"{plain:.2%} rounded to nearest, {found:.2%} with {self.method}"
        return f"mean relative output error of {len(self.each)} linear layers: {told}"

    def to_json(self) -> dict[str, Any]:
        """For the manifest; every layer where there are few, else the worst alone."""

        def pair(rtn: float, found: float) -> dict[str, float]:
            return {"rtn": float(f"{rtn:.4g}"), "found": float(f"{found:.4g}")}

        told = {"method": self.method, "linear_layers": len(self.each), "mean": pair(*self.mean())}
        told["worst"] = {name: pair(*both) for name, both in self.worst().items()}
        return told | ({"each": {name: pair(*both) for name, both in self.each.items()}} if len(self.each) <= _FEW else {})


def _told(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """What a file says of the search that made it."""
    try:
        told = json.loads(metadata.get("calibration", "{}"))
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


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
            raise UsageError(f"--codes {printable(str(path))}: no such file", hint=HINT)
        header = read_header(self.path)
        told = _told(header.metadata)
        self._entries, self.folded = header.tensors, str(told.get("folded", ""))
        self.method: str | None = told.get("method") if told.get("method") in SEARCHED else None
        self._shard = Shard(self.path)
        weakref.finalize(self, self._shard.close)  # plans refer to it: the last of them closes it

    def identity(self) -> SourceFile:
        """The header says which calibration it was, so its hash stands for the content."""
        with self._shard.window(0, 8) as length:
            size = 8 + int(struct.unpack("<Q", bytes(length[:8]))[0])
        with self._shard.window(0, size) as header:
            return SourceFile(self.path.name, self._shard.size, hashlib.sha256(header).hexdigest())

    def has(self, module: str) -> bool:
        return f"{module}.weight_scale" in self._entries

    def modules(self) -> Iterator[str]:
        """Linear modules that have codes."""
        return (name.removesuffix(".weight_scale") for name in self._entries if name.endswith(".weight_scale"))

    def changed(self) -> dict[str, ApartTensor]:
        """Norms and biases of the source with pre-scales in them, by name."""
        mine = {f"{module}.{leaf}" for module in self.modules() for leaf in ("weight", "weight_scale", "losses", "pre_quant_scale")}
        return {name: self._apart(entry) for name, entry in self._entries.items() if name not in mine}

    def found(self, module: str, shape: tuple[int, ...], weight: str) -> Found:
        """The codes of a module.

        Args:
            shape: of its weight, (N, K).
            weight: name of the weight that they take the place of.

        Raises:
            TensorError: they are not there, or of another shape.
        """
        where, (rows, cols) = f"{printable(str(self.path))}: {printable(module)}", shape
        codes, scales = (self._entries.get(f"{module}.{leaf}") for leaf in ("weight", "weight_scale"))
        if codes is None or scales is None:
            raise TensorError(f"{where} has no codes; were they found for this model?", hint=HINT)
        groups = scales.shape[1] if len(scales.shape) == 2 else 0
        fits = codes.dtype.name == "U8" and codes.shape == (rows // 2, cols) and scales.dtype == F32
        if not fits or scales.shape[0] != rows or not groups or cols % groups or rows % 2:
            raise TensorError(f"{where}: codes {list(codes.shape)} and scales {list(scales.shape)} are not those of [{rows}, {cols}]")
        multiplier = self._entries.get(f"{module}.pre_quant_scale")
        if multiplier is not None and multiplier.shape != (cols,):
            raise TensorError(f"{where}: pre_quant_scale {list(multiplier.shape)}, and the inputs are {cols}")
        made = ApartCodes(weight, I8, (rows, cols), (), 0, 4, "modelopt", module, self._shard, codes.begin)
        return Found(made, self._apart(scales), None if multiplier is None else self._apart(multiplier))

    def _apart(self, entry: TensorEntry) -> ApartTensor:
        return ApartTensor(entry.name, entry.dtype, entry.shape, (), 0, self._shard, entry.begin)

    def losses(self) -> Losses:
        """What the search lost in each linear layer that tokens reached."""
        each = {}
        for name, entry in self._entries.items():
            if name.endswith(".losses") and entry.shape == (3,) and entry.dtype == F32:
                with self._shard.window(entry.begin, entry.end) as data:
                    energy, rtn, best = struct.unpack("<3f", bytes(data[:12]))
                if energy > 0:
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
            raise UsageError(f"--method {method}: the codes of {printable(str(path))} are those of {codes.method}", hint="name that method")
        return codes
    if path is None:
        raise UsageError(f"--method {method} looks at what goes through the layers on some text", hint=f"{HINT}; or --codes FILE")
    raise UsageError("--codes is for --method " + ", ".join(SEARCHED), hint="leave it out")
