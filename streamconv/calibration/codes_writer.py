"""The file of INT4 codes, laid out before the first layer and filled layer by layer: for each linear module M

    M.weight        U8 [N/2, K], two's complement nibbles of two neighbouring output channels, the first in the low one
    M.weight_scale  F32 [N, K/g]
    M.pre_quant_scale  F32 [K], what the input is multiplied by; with AWQ, where it is not folded
    M.losses        F32 [3], see `search.Found`

and under their own names tensors of the source that a fold changes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from streamconv.checkpoint.dtypes import F32, U8
from streamconv.checkpoint.header_build import Form, Shaped, build_header
from streamconv.checkpoint.tensor_table import TensorRecord
from streamconv.errors import CheckpointError, printable


class CodesWriter:
    """Writes it in place.

    Args:
        path: of the file; one of the same layout goes on being filled.
        modules: module -> (N, K).
        group: input channels that share a scale.
        multipliers: modules that have pre-scales.
        others: tensors of the source that change.
        begun: some layers are in the file already.

    Raises:
        CheckpointError: they are not.
    """

    def __init__(
        self, path: Path, modules: Mapping[str, tuple[int, int]], group: int, multipliers: Collection[str],
        others: Collection[TensorRecord], facts: dict[str, Any], begun: bool,
    ) -> None:  # fmt: skip
        entries: list[tuple[str, Form]] = [(other.name, other) for other in others]
        for module, (rows, cols) in modules.items():
            entries.append((f"{module}.weight", Shaped(U8, (rows // 2, cols))))
            entries.append((f"{module}.weight_scale", Shaped(F32, (rows, cols // group))))
            entries.append((f"{module}.losses", Shaped(F32, (3,))))
            if module in multipliers:
                entries.append((f"{module}.pre_quant_scale", Shaped(F32, (cols,))))
        names, forms = zip(*entries, strict=True)
        header, size, order, begins = build_header(names, forms, {"calibration": json.dumps(facts)})
        self._places = {names[at]: begin for at, begin in zip(order, begins, strict=True)}
        self._start, self.size, self.path = len(header), size, path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if os.fstat(self._fd).st_size != size or os.pread(self._fd, len(header), 0) != header:
            if begun:
                os.close(self._fd)
                message = f"{printable(path)}: the codes of an interrupted search are gone"
                raise CheckpointError(message, hint="run it again: it begins at the first layer")
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, size)
            os.pwrite(self._fd, header, 0)

    def put(self, name: str, values: torch.Tensor) -> None:
        """The content of a tensor."""
        data: memoryview = values.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data.cast("B")
        at = self._start + self._places[name]
        while data:
            done = os.pwrite(self._fd, data, at)
            data, at = data[done:], at + done

    def put_codes(self, name: str, codes: torch.Tensor) -> None:
        """Codes int8 [N, K]."""
        pairs = codes.view(torch.uint8).reshape(-1, 2, codes.shape[1])
        self.put(name, (pairs[:, 0] & 15) | (pairs[:, 1] << 4))

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
