"""The weights that tensors stand for, whatever they are stored as: names and shapes of any model's, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

Told = tuple[str, tuple[int, ...]]
"""Dtype and shape of a stored tensor."""
Tensors = Mapping[str, Told]
Shape = tuple[int, ...]

_BESIDE = frozenset(
    ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_shape", "weight_zero", "weight_zero_point",
     "weight_g_idx", "input_scale", "input_global_scale", "input_zero_point", "activation_scale", "pre_quant_scale", "output_scale",
     "k_scale", "v_scale", "scales", "qzeros", "g_idx", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_format"),
)  # fmt: skip
"""Last names of what stands beside codes."""


def weights(tensors: Tensors, bits: int | None = None) -> Iterator[tuple[str, Shape | None]]:
    """(name as an unquantized model has it, shape) of each weight, bias and buffer, in order; the shape is None where it does not show.

    Args:
        bits: of integers in words, as the config says.
    """
    for name, (dtype, shape) in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in _BESIDE or "quant_state" in leaf:
            continue
        if leaf == "weight_packed":
            yield f"{module}.weight", _packed(dtype, shape, bits)
        elif leaf == "qweight":
            yield f"{module}.weight", _words(shape, tensors.get(f"{module}.scales"), bits)
        elif leaf == "weight" and dtype == "U8":
            yield name, _bytes(shape, tensors.get(f"{module}.weight_scale"))
        elif name.endswith("_blocks") and len(shape) == 4:
            yield name.removesuffix("_blocks"), (shape[0], 32 * shape[2], shape[1])
        elif not (name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors):
            yield name, shape


def _packed(dtype: str, shape: Shape, bits: int | None) -> Shape | None:
    if len(shape) != 2:
        return None
    if dtype == "U8":
        return shape[0], 2 * shape[1]
    return (shape[0], shape[1] * 32 // bits) if bits and shape[1] * 32 % bits == 0 else None


def _words(shape: Shape, scales: Told | None, bits: int | None) -> Shape | None:
    """GPTQ packs along the input features, AutoAWQ along the output features."""
    if len(shape) != 2 or scales is None or len(scales[1]) != 2 or not bits:
        return None
    n = scales[1][1]
    return (n, shape[0] * 32 // bits) if shape[1] == n else (n, shape[0])


def _bytes(shape: Shape, scale: Told | None) -> Shape | None:
    """Two FP4 codes in a byte along the input features; ModelOpt's INT4, with float scales, along the output features."""
    if len(shape) != 2 or scale is None:
        return None
    return (2 * shape[0], shape[1]) if scale[0] == "F32" else (shape[0], 2 * shape[1])
