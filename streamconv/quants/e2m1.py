"""FP4: the e2m1 values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, four bits each, two in a byte."""

from __future__ import annotations

from streamconv.lazy import torch

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e2m1_codes(ratio: torch.Tensor) -> torch.Tensor:
    """float32 -> uint8 codes 0 to 15: nearest, ties to the even code, at most 6. The sign is that of ratio < 0: -0.0 is code 0."""
    size = ratio.abs()
    code = torch.zeros_like(ratio, dtype=torch.uint8)
    for edge, up in ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        code += (size >= edge) if up else (size > edge)
    return code + 8 * (ratio < 0).to(torch.uint8)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes -> float32."""
    table = torch.tensor(_VALUES + tuple(-value for value in _VALUES), device=codes.device)
    return table[codes.to(torch.int64)]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, cols] -> uint8 [rows * cols / 2]; even columns in the low nibbles."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).reshape(-1)


def unpack_nibbles(packed: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The inverse of `pack_nibbles`, [rows, cols]."""
    pairs = packed.reshape(rows, cols // 2)
    return torch.stack([pairs & 15, pairs >> 4], 2).reshape(rows, cols)
