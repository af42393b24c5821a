"""Headers of safetensors files, written by the package's own builder."""

from __future__ import annotations

import math
from collections.abc import Iterable

from streamconv.checkpoint import header_build
from streamconv.checkpoint.dtypes import DType
from streamconv.checkpoint.header_build import Shaped


def build_header(
    entries: Iterable[tuple[str, DType, tuple[int, ...]]],
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file as the stock writer writes them without metadata.

    Returns:
        The header with its length, and by name where in the file each tensor begins and ends.
    """
    listed = [*entries]
    names, forms = [name for name, _, _ in listed], [Shaped(dtype, shape) for _, dtype, shape in listed]
    header, _, order, begins = header_build.build_header(names, forms)
    places = {}
    for at, begin in zip(order, begins, strict=True):
        size = math.prod(forms[at].shape) * forms[at].dtype.itemsize
        places[names[at]] = len(header) + begin, len(header) + begin + size
    return header, places
