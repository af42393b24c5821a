"""The element types of safetensors, and how the rest of the world names them.

Their order is that of a file of safetensors' own writer, their names those of config.json.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: the safetensors spelling, e.g. "BF16".
        itemsize: bytes per element.
        torch: attribute of the torch module, e.g. "bfloat16"; also the config.json spelling for float types.
        storage: the numpy type that carries the bytes untouched, e.g. "u2" for BF16.
        order: position in a file of the stock writer; larger comes first.
    """

    name: str
    itemsize: int
    torch: str
    storage: str
    order: int

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)  # asked for with every tensor

    @property
    def numpy(self) -> str | None:
        """The numpy type of the same values, e.g. "float16"; None where numpy has none."""
        return None if self.torch.startswith(("bfloat", "float8")) else self.torch

    @property
    def is_float(self) -> bool:
        return self.name in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


_TABLE = (
    # name       bytes torch              storage, in ascending order of the stock writer
    ("BOOL", 1, "bool", "u1"),
    ("U8", 1, "uint8", "u1"),
    ("I8", 1, "int8", "u1"),
    ("F8_E5M2", 1, "float8_e5m2", "u1"),
    ("F8_E4M3", 1, "float8_e4m3fn", "u1"),
    ("F8_E8M0", 1, "float8_e8m0fnu", "u1"),
    ("I16", 2, "int16", "u2"),
    ("U16", 2, "uint16", "u2"),
    ("F16", 2, "float16", "u2"),
    ("BF16", 2, "bfloat16", "u2"),
    ("I32", 4, "int32", "u4"),
    ("U32", 4, "uint32", "u4"),
    ("F32", 4, "float32", "u4"),
    ("F64", 8, "float64", "u8"),
    ("I64", 8, "int64", "u8"),
    ("U64", 8, "uint64", "u8"),
)

DTYPES: dict[str, DType] = {name: DType(name, size, torch, storage, order) for order, (name, size, torch, storage) in enumerate(_TABLE)}

BOOL, U8, I8 = DTYPES["BOOL"], DTYPES["U8"], DTYPES["I8"]
F16, BF16, F32 = DTYPES["F16"], DTYPES["BF16"], DTYPES["F32"]
I32, I64, F8_E4M3 = DTYPES["I32"], DTYPES["I64"], DTYPES["F8_E4M3"]

BY_TORCH_NAME: dict[str, DType] = {d.torch: d for d in DTYPES.values()}

FLOATS = ("F32", "F16", "BF16")
"""Names of the types of a weight that is not quantized."""
MODEL_DTYPES: dict[str, DType] = {d.torch: d for d in (F16, BF16, F32)}
"""What `dtype` in a TensorRT-LLM config.json may be."""
