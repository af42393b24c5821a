"""Golden models that are quantized already: GPTQ and AutoAWQ."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.golden.random_numbers import Spec, Tensors, random_stream, random_tensor
from tests.golden.tensors import hf_tensors


def _pack_rows(codes: np.ndarray[Any, Any], bits: int) -> torch.Tensor:
    """Codes [rows, columns] packed along the rows into int32, lowest bits first."""
    rows, columns = codes.shape
    per_word = 32 // bits
    grouped = codes.reshape(rows // per_word, per_word, columns).astype(np.uint32)
    words = np.zeros((rows // per_word, columns), np.uint32)
    for j in range(per_word):
        words |= grouped[:, j] << np.uint32(bits * j)
    return torch.from_numpy(words.view(np.int32).copy())


def gptq_tensors(spec: Spec) -> Tensors:
    """A synthetic group-quantized file: random codes, zeros and scales instead of the layers' weights."""
    group, bits = spec["group_size"], spec.get("bits", 4)
    tensors: Tensors = {}
    for key, weight in hf_tensors({**spec, "dtype": "float16"}).items():
        if weight.dim() != 2 or "layers." not in key:
            tensors[key] = weight
            continue
        base = key.removesuffix(".weight")
        outputs, inputs = weight.shape
        stream = random_stream(spec["seed"], f"gptq:{base}")
        codes = stream.randint(0, 2**bits, size=(inputs, outputs))
        if spec.get("asym", True):
            zeros = stream.randint(0, 2**bits - 1, size=(inputs // group, outputs))
        else:
            zeros = np.full((inputs // group, outputs), 2 ** (bits - 1) - 1)
        scales = random_tensor(spec["seed"], base + ".scales", (inputs // group, outputs), 0.01)
        tensors[base + ".qweight"] = _pack_rows(codes, bits)
        tensors[base + ".qzeros"] = _pack_rows(zeros.T.copy(), bits).t().contiguous()
        tensors[base + ".scales"] = (scales.abs() + 0.001).to(torch.float16)
        tensors[base + ".g_idx"] = torch.arange(inputs, dtype=torch.int32) // group
    return tensors


def awq_tensors(spec: Spec) -> Tensors:
    """A synthetic AutoAWQ file: random packed codes and zeros, float16 scales."""
    tensors: Tensors = {}
    for key, weight in hf_tensors({**spec, "dtype": "float16"}).items():
        if weight.dim() != 2 or "layers." not in key:
            tensors[key] = weight
            continue
        base = key.removesuffix(".weight")
        outputs, inputs = weight.shape
        groups = inputs // spec["group_size"]
        stream = random_stream(spec["seed"], f"awq:{base}")
        tensors[base + ".qweight"] = _random_words(stream, (inputs, outputs // 8))
        tensors[base + ".qzeros"] = _random_words(stream, (groups, outputs // 8))
        scales = random_tensor(spec["seed"], base + ".scales", (groups, outputs), 0.01)
        tensors[base + ".scales"] = (scales.abs() + 0.001).to(torch.float16)
    return tensors


def _random_words(stream: np.random.RandomState, shape: tuple[int, int]) -> torch.Tensor:
    halves = [stream.randint(0, 65536, size=shape).astype(np.int64) for _ in range(2)]
    return torch.from_numpy((halves[0] * 65536 + halves[1]).astype(np.uint32).view(np.int32))
