"""Channels of a packed integer weight as rows of signed int8.

GPTQ and AutoAWQ store weights input-major, ModelOpt packs two neighbouring channels in a byte.
"""

from __future__ import annotations

from streamconv.lazy import Bytes, np

AWQ_POSITION = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AutoAWQ keeps channel j of eight: the number of its nibble, counted from the least significant."""
AWQ_CHANNEL = tuple(AWQ_POSITION.index(nibble) for nibble in range(8))
"""The inverse: the channel of each nibble."""


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
            places, words = AWQ_CHANNEL[int(high) :: 2], temp.reshape(k, count // 8, 4)
            for byte, channel in enumerate(places):
                out.reshape(count // 8, 8, k)[:, channel] = words[:, :, byte].T
        else:
            out.reshape(count // 2, 2, k)[:, int(high)] = temp.reshape(count // 2, k)
    if packing == "modelopt":
        np.bitwise_xor(out, 8, out=out)  # two's complement nibbles: as unsigned around eight, like the others
    np.subtract(out, 8, out=out)
