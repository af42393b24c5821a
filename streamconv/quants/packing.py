"""How signed integers of 4 or 8 bits lie in bytes and words, and nibbles in general.

    bytes   I8 [N, K]           one each
    words   I32 [N, K*bits/32]  offset by half, the lowest column in the lowest bits
    pairs   U8 [N/2, K]         two's complement nibbles of two neighbouring rows, the first in the low one (ModelOpt)
    awq     I32 [N, K/8]        nibbles offset by half, in AutoAWQ's order of columns
"""

from __future__ import annotations

from typing import Literal

from streamconv.checkpoint.dtypes import I8, I32, U8
from streamconv.checkpoint.packed_rows import AWQ_CHANNEL, AWQ_POSITION
from streamconv.lazy import torch
from streamconv.quants.base import Part

Packing = Literal["bytes", "words", "pairs", "awq"]


def packed_part(role: str, packing: Packing, bits: int, rows: int, cols: int) -> Part:
    """The tensor that holds integers [rows, cols]."""
    if packing == "bytes":
        return Part(role, I8, (rows, cols), cols)
    if packing == "pairs":
        return Part(role, U8, (rows // 2, cols), cols, 2)
    words = -(-cols * bits // 32)
    return Part(role, I32, (rows, words), 4 * words)


def pack(q: torch.Tensor, packing: Packing, bits: int) -> torch.Tensor:
    """Signed integers [N, K] -> the bytes that are stored, uint8, 1-D."""
    if packing == "bytes":
        return q.to(torch.int8).reshape(-1).view(torch.uint8)
    if packing == "pairs":
        nibbles = q.to(torch.int16) & 15
        return (nibbles[0::2] | (nibbles[1::2] << 4)).to(torch.uint8).reshape(-1)
    codes = (q.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    if packing == "awq":
        codes = codes.reshape(-1, 8)[:, list(AWQ_CHANNEL)]
    return codes.reshape(-1) if bits == 8 else pack_nibbles(codes)


def unpack(stored: torch.Tensor, packing: Packing, bits: int, rows: int, cols: int) -> torch.Tensor:
    """The inverse of `pack`, [rows, cols]."""
    if packing == "bytes":
        return stored.view(torch.int8).reshape(rows, cols)
    if packing == "pairs":
        pairs = stored.reshape(rows // 2, 1, cols)
        return (torch.cat([pairs & 15, pairs >> 4], 1).reshape(rows, cols).to(torch.int8) ^ 8) - 8
    codes = stored.reshape(rows, -1)
    if bits == 4:
        codes = unpack_nibbles(stored, rows, 2 * codes.shape[1])
    if packing == "awq":
        codes = codes.reshape(-1, 8)[:, list(AWQ_POSITION)].reshape(rows, -1)
    return codes[:, :cols].to(torch.int16) - (1 << (bits - 1))


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, cols] -> uint8 [rows * cols / 2]; even columns in the low nibbles."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).reshape(-1)


def unpack_nibbles(packed: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The inverse of `pack_nibbles`, [rows, cols]."""
    pairs = packed.reshape(rows, cols // 2)
    return torch.stack([pairs & 15, pairs >> 4], 2).reshape(rows, cols)
