"""The numbers of the golden models: numpy's frozen `RandomState` integer stream, seeded per tensor name."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch

Spec = dict[str, Any]
Tensors = dict[str, torch.Tensor]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def random_stream(seed: int, key: str) -> np.random.RandomState:
    """The integer stream that belongs to one tensor."""
    return np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()))


def random_tensor(seed: int, key: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Float32 values of roughly normal distribution: the sum of four uniform integers."""
    count = int(np.prod(shape))
    total = random_stream(seed, key).randint(-32768, 32768, size=(4, count)).astype(np.int64).sum(0)
    values = (total.astype(np.float64) / 65536.0 * (std * 1.7320508)).astype(np.float32)
    return torch.from_numpy(values.reshape(shape))


def add_quirks(key: str, weight: torch.Tensor) -> torch.Tensor:
    """Make a few rows awkward: all zero, exact rounding ties, nearly underflowing, one large outlier."""
    if weight.dim() != 2:
        return weight
    rows, columns = weight.shape
    if key.endswith(("up_proj.weight", "w3.weight")):
        weight[3 % rows] = 0.0
    if key.endswith(("down_proj.weight", "w2.weight", "k_proj.weight", "wk.weight")):
        k = torch.arange(columns)
        sign = (1 - 2 * (k % 2)).float()
        ties = ((2 * (k % 60) + 1).float() / 256.0) * sign
        ties[0] = 1.0
        ties[1] = -1.0
        coarse = k[2:columns:7]
        ties[2:columns:7] = ((2 * (coarse % 8) + 1).float() / 16.0) * (1 - 2 * (coarse % 2)).float()
        weight[5 % rows] = ties
    if key.endswith(("o_proj.weight", "wo.weight", "lm_head.weight")):
        weight[7 % rows] *= 2.0**-18
    if key.endswith(("q_proj.weight", "gate_proj.weight", "w1.weight", "wq.weight")):
        weight[1, columns // 2] = 7.5
    return weight


def make(spec: Spec, key: str, shape: tuple[int, ...], kind: str = "linear") -> torch.Tensor:
    """One tensor of the model, in the model's dtype."""
    seed = spec["seed"]
    if kind == "norm":
        weight = 1.0 + random_tensor(seed, key, shape, 0.15)
    elif kind == "bias":
        weight = random_tensor(seed, key, shape, 0.3)
    elif kind == "embedding":
        weight = random_tensor(seed, key, shape, 0.6)
    else:
        weight = random_tensor(seed, key, shape, spec.get("std", 0.05))
        if spec.get("quirks", True):
            weight = add_quirks(key, weight)
    return weight.to(DTYPES[spec["dtype"]]).contiguous()
