"""Read channels of a packed integer weight and turn them into rows of signed int8.

GPTQ and AutoAWQ store weights input-major: a block of output channels is a stripe of columns, one run of bytes in each
source row. ModelOpt packs two neighbouring channels in a byte.
"""

from __future__ import annotations

from streamconv.checkpoint.shard import Shard
from streamconv.lazy import Bytes, np

AWQ_POSITION = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AutoAWQ keeps channel j of eight: the number of its nibble, counted from the least significant."""

_LOW = [AWQ_POSITION.index(2 * byte) for byte in range(4)]
_HIGH = [AWQ_POSITION.index(2 * byte + 1) for byte in range(4)]


def read_channels(
    shard: Shard,
    at: tuple[int, int, int],
    packing: str,
    bits: int,
    k: int,
    start: int,
    stop: int,
    out: Bytes,
    scratch: Bytes,
) -> None:
    """Channels [start, stop), multiples of the channels that share bytes: 8 for awq, 2 for modelopt.

    Args:
        at: (offset in the file, rows and columns as they are stored).
        k: input features.
        out: uint8, (stop-start) * k bytes; then int8 [stop-start, k], row-major, signed values around zero.
        scratch: uint8, as large as `out`.
    """
    begin, rows, cols = at
    count = stop - start
    stored = count * k * bits // 8
    packed, temp = scratch[:stored], scratch[stored : 2 * stored]
    if packing == "modelopt":
        shard.read_into(begin + start // 2 * k, packed.data)
    else:
        width = 4 * (count if packing == "gptq" else count // 8)
        first = 4 * (start if packing == "gptq" else start // 8)
        shard.read_rows_into(begin + first, 4 * cols, width, rows, packed.data, width)
    unpack(packing, bits, k, packed, temp, out)


def unpack(packing: str, bits: int, k: int, packed: Bytes, temp: Bytes, out: Bytes) -> None:
    """Stored bytes of some channels -> `out`, int8 [channels, k] as uint8; 4 bits need `temp`, as large as `packed`."""
    count = out.size // k
    if bits == 8:
        words = packed.reshape(k // 4, count, 4)
        np.bitwise_xor(words.transpose(1, 0, 2), 0x80, out=out.reshape(count, k // 4, 4))
        return
    for high in (False, True):
        if high:
            np.right_shift(packed, 4, out=temp)
        else:
            np.bitwise_and(packed, 15, out=temp)
        if packing == "gptq":
            out.reshape(count, k // 8, 4, 2)[..., int(high)] = temp.reshape(k // 8, count, 4).transpose(1, 0, 2)
        elif packing == "awq":
            places, words = (_HIGH if high else _LOW), temp.reshape(k, count // 8, 4)
            for byte, channel in enumerate(places):
                out.reshape(count // 8, 8, k)[:, channel] = words[:, :, byte].T
        else:
            out.reshape(count // 2, 2, k)[:, int(high)] = temp.reshape(count // 2, k)
    if packing == "modelopt":
        np.bitwise_xor(out, 8, out=out)  # two's complement nibbles: as unsigned around eight, like the others
    np.subtract(out, 8, out=out)
