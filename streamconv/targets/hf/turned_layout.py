"""The tensors of a weight whose container has a row for each input channel."""

from __future__ import annotations

from dataclasses import replace

from streamconv.checkpoint.codes_file import Found
from streamconv.checkpoint.derived_rows import WIDE, turned
from streamconv.checkpoint.dtypes import F16
from streamconv.checkpoint.rows import RowSource, SourceTensor
from streamconv.errors import UsageError, printable
from streamconv.planning.draft import Draft
from streamconv.planning.matrix_table import Spelling
from streamconv.quants.awq_words import AwqCodes, AwqScales
from streamconv.quants.base import Codec
from streamconv.targets.hf.sources import Weight


def turned_weight(
    draft: Draft, file: int, module: str, weight: Weight, codec: Codec, searched: Found | None, spelling: Spelling
) -> None:
    """Add a weight [N, K].

    Args:
        codec: of rows [K, N].
        searched: its codes, where they were found on text.

    Raises:
        UsageError: the source holds it in a form that is not read by columns.
    """
    sources: list[tuple[Codec, RowSource]]
    if searched is None:
        if not (isinstance(weight, SourceTensor) and weight.as_stored and len(weight.pieces) == 1):
            told = f"{printable(module)}: --format awq takes weights that are floats in a tensor of their own"
            raise UsageError(told, hint="--format compressed-tensors, or --quant none first")
        sources = [(codec, turned(weight, WIDE))]
    else:
        sources = [(AwqCodes(), searched.codes.turned()), (AwqScales(), replace(searched.scales, into=F16).turned())]
    for each, source in sources:
        matrix = draft.matrix(file, module, source.rows, source.cols, each, spelling=spelling)
        draft.feed(matrix, source, 0, source.rows)
