"""Run a SmoothQuant checkpoint as its engine would, in torch: INT8 weights and activations, scales from the converted files.

Activations are quantized where the engine does it: after the two norms (which hold the smoother already), and, divided by the stored
smoother, before o_proj and down_proj. Static variants use the stored factors, per-token ones the row's own maximum. Products of
integers are summed in float32; everything else of the model is float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_INPUTS = {  # module of a layer -> (where its static input factor is, its own smoother or None)
    "attention.qkv": ("input_layernorm.scale_to_int", False),
    "attention.dense": ("attention.quantization_scaling_factor", True),
    "mlp.fc": ("post_layernorm.scale_to_int", False),
    "mlp.gate": ("post_layernorm.scale_to_int", False),
    "mlp.proj": ("mlp.quantization_scaling_factor", True),
}
_MODULES = {
    "self_attn.o_proj": "attention.dense",
    "mlp.gate_proj": "mlp.fc",
    "mlp.up_proj": "mlp.gate",
    "mlp.down_proj": "mlp.proj",
}


class SmoothLinear(torch.nn.Module):
    """y = dequantized(quantized(x / smoother) · W).

    Args:
        weight: int8 [out, in].
        scale: float32 [out] or [1]: what one unit of the integer product is worth; per token the row's scale comes on top.
        factor: float32, units per 1.0 of the input; None per token.
        smoother: float32 [in] or None.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor | None, smoother: torch.Tensor | None) -> None:
        super().__init__()
        self.integers, self.scale, self.factor, self.smoother = weight.float(), scale.reshape(1, -1), factor, smoother

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.smoother is not None:
            x = x / self.smoother
        if self.factor is None:
            unit = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
            return torch.nn.functional.linear((x / unit).round().clamp(-128, 127), self.integers) * self.scale * unit
        return torch.nn.functional.linear((x * self.factor).round().clamp(-128, 127), self.integers) * self.scale


def install(model: Any, out: Path) -> Any:
    """Replace norms and linear layers of a Llama model by what the rank file of a tp 1 conversion holds."""
    with safe_open(out / "rank0.safetensors", "pt") as file, torch.no_grad():
        names = set(file.keys())

        def get(name: str) -> torch.Tensor:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

        for number, layer in enumerate(model.model.layers):
            at = f"transformer.layers.{number}."
            layer.input_layernorm.weight.copy_(get(at + "input_layernorm.weight").float())
            layer.post_attention_layernorm.weight.copy_(get(at + "post_layernorm.weight").float())
            made = {name: _linear(get, names, at, name) for name in _INPUTS}
            for theirs, ours in _MODULES.items():
                owner, _, name = theirs.partition(".")
                setattr(getattr(layer, owner), name, made[ours])
            attention, start = layer.self_attn, 0
            for name in ("q_proj", "k_proj", "v_proj"):
                stop = start + getattr(attention, name).out_features
                setattr(attention, name, _rows(made["attention.qkv"], start, stop))
                start = stop
    return model.eval()


def _linear(get: Any, names: set[str], at: str, name: str) -> SmoothLinear:
    factor, smoothed = _INPUTS[name]
    scale = get(f"{at}{name}.per_channel_scale")
    static = f"{at}{name}.act_scale" in names
    if static:  # accum * act_scale = 1 / (sx * sw)
        scale = scale * get(f"{at}{name}.act_scale").reshape(1)
    smoother = get(f"{at}{name}.smoother").reshape(-1) if smoothed else None
    return SmoothLinear(get(f"{at}{name}.weight"), scale, get(at + factor) if static else None, smoother)


def _rows(whole: SmoothLinear, start: int, stop: int) -> SmoothLinear:
    return SmoothLinear(whole.integers[start:stop], whole.scale[:, start:stop], whole.factor, whole.smoother)
