"""Planning costs what the headers cost: models of a quarter of a million tensors, in experts or in layers."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LAYERS, EXPERTS, HIDDEN, INTER = 64, 1299, 64, 64
TENSORS = 3 + LAYERS * (9 + 3 * EXPERTS)
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "moe_intermediate_size": INTER,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def _shapes(layers: int = LAYERS, experts: int = EXPERTS) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, HIDDEN), "lm_head.weight": (256, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": (HIDDEN,), at + "post_attention_layernorm.weight": (HIDDEN,)}
        for name, rows, cols in (("q", 64, HIDDEN), ("k", 32, HIDDEN), ("v", 32, HIDDEN), ("o", HIDDEN, 64)):
            shapes[at + f"self_attn.{name}_proj.weight"] = (rows, cols)
        mlp = [("gate", INTER, HIDDEN), ("up", INTER, HIDDEN), ("down", HIDDEN, INTER)]
        if not experts:
            shapes |= {at + f"mlp.{name}_proj.weight": (rows, cols) for name, rows, cols in mlp}
            continue
        shapes |= {at + "self_attn.q_norm.weight": (16,), at + "self_attn.k_norm.weight": (16,)}
        shapes[at + "mlp.gate.weight"] = (experts, HIDDEN)
        for expert in range(experts):
            for name, rows, cols in mlp:
                shapes[at + f"mlp.experts.{expert}.{name}_proj.weight"] = (rows, cols)
    return shapes


def write_many(folder: Path, layers: int = LAYERS, experts: int = EXPERTS) -> Path:
    """A model of that many tensors, dense without experts; its files are holes."""
    kind = {} if experts else {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(CONFIG | kind | {"num_hidden_layers": layers}))
    shapes = list(_shapes(layers, experts).items())
    where = {}
    for number in range(8):
        name, at, header = f"model-{number}.safetensors", 0, {}
        for tensor, shape in shapes[number::8]:
            size = math.prod(shape) * 2
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at, where[tensor] = at + size, name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)  # holes: no weight is read
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many(tmp_path_factory.mktemp("many"))


def planned(model: Path, *flags: str) -> tuple[dict[str, Any], int]:
    """What `plan` tells, as a user runs it, and its largest resident set, its start counted."""
    code = "import sys; from streamconv import memory; from streamconv.cli.main import main; status = main(sys.argv[1:]);"
    code += "print(memory.peak_resident(), file=sys.stderr); sys.exit(status)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code, "plan", str(model), "--json", "--device", "cpu", "--memory-budget", "2GiB", *flags]
    done = subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{seconds:.1f} s of CPU, peak {int(done.stderr) / (1 << 20):.0f} MiB")
    return json.loads(done.stdout), int(done.stderr)


def test_a_quarter_of_a_million_tensors_are_planned_in_seconds_and_200_mib(model: Path) -> None:
    told, peak = planned(model)
    assert len(_shapes()) == TENSORS > 249_000
    assert told["bytes_to_read"] == sum(math.prod(shape) * 2 for shape in _shapes().values())
    assert peak <= 200 << 20


@pytest.mark.slow
def test_as_many_for_a_hugging_face_directory(tmp_path: Path) -> None:
    told, peak = planned(write_many(tmp_path, 27_000, 0), "--to", "hf")
    shapes = _shapes(27_000, 0)
    assert len(shapes) == 243_003
    assert told["bytes_to_read"] == sum(math.prod(shape) * 2 for shape in shapes.values())
    assert sum(file["tensors"] for file in told["files"]) == len(shapes)
    assert peak <= 200 << 20
