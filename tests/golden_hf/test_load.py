"""transformers loads what we write, and each weight as loaded is what we decode. Needs compressed-tensors, which reads most formats."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from streamconv.checkpoint.index import open_index
from streamconv.cli.main import main
from streamconv.targets.hf.target import HuggingFace
from tests.conformance.output import decode
from tests.golden_hf import cases, generate
from tests.golden_hf.conftest import Models

try:
    import accelerate  # noqa: F401
    import compressed_tensors  # noqa: F401
    import transformers

    WHY = "" if int(transformers.__version__.split(".")[0]) >= 5 else "needs transformers 5"
except ImportError as missing:
    WHY = f"needs compressed-tensors and accelerate ({missing})"
pytestmark = [pytest.mark.skipif(bool(WHY), reason=WHY), pytest.mark.filterwarnings("ignore")]

DENSE = ("fp8_dynamic", "fp8_block", "int8_dynamic", "w4a16", "w8a16", "nvfp4a16", "mxfp4", "mxfp4a16", "mxfp8", "mxfp8a16")
EXPERTS = ("fp8_dynamic", "w4a16", "w8a16", "mxfp4", "mxfp4a16")
"""What transformers 5.24 with compressed-tensors 0.20 reads: of a dense model every format, of one with experts these."""
RUNS = [(model, quant, "compressed-tensors") for model in ("llama_gqa", "qwen2_bias") for quant in DENSE]
RUNS += [(model, quant, "compressed-tensors") for model in ("qwen3_moe", "mixtral") for quant in EXPERTS]
RUNS += [(model, "fp8_block", "hf") for model in ("llama_gqa", "qwen3_dense", "qwen3_moe", "llama_tied_f32")]


@pytest.mark.parametrize(("model", "quant", "container"), RUNS, ids=str)
def test_every_weight_as_loaded(model: str, quant: str, container: str, models: Models, tmp_path: Path) -> None:
    case = cases.Case(model, model, (), None, {})
    assert model in generate.load_specs()
    source, out = models.source(case), tmp_path / "out"
    flags = ["--to", "hf", "--quant", quant, "--format", container]
    assert main(["convert", str(source), str(out), *flags, "--quiet", "--memory-budget", "1GiB"]) == 0
    with open_index(source) as index, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = HuggingFace(quant=quant, format=container).plan(index)
        held = {name: value for part in decode(plan, index, out) for name, value in part.got.items()}
        loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        with torch.no_grad():
            logits = loaded(torch.arange(12)[None]).logits
    assert torch.isfinite(logits).all()
    params = dict(loaded.named_parameters())
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[loaded.dtype]
    if quant == "int8_dynamic":  # the float32 scale is rounded to the model's dtype, and then the product
        rounding *= 2.01
    seen = 0
    for matrix in plan.matrices:
        if not matrix.codec.quantizes:
            continue
        weight, wanted = _as_loaded(params, matrix.name).float(), held[matrix.places[0].tensor]
        assert float((weight - wanted).abs().max()) <= rounding * float(wanted.abs().max()), matrix.name
        seen += 1
    assert seen >= 14


def _as_loaded(params: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """The parameter of a module; transformers 5 stacks experts."""
    if f"{module}.weight" in params:
        return params[f"{module}.weight"]
    layer, _, rest = module.replace("block_sparse_moe", "mlp").partition(".experts.")
    expert, _, last = rest.partition(".")
    if last in ("down_proj", "w2"):
        return params[f"{layer}.experts.down_proj"][int(expert)]
    return params[f"{layer}.experts.gate_up_proj"][int(expert)].chunk(2)[last in ("up_proj", "w3")]


@pytest.mark.parametrize("kind", ["llava", "mistral3", "gemma3"])
@pytest.mark.parametrize(("quant", "container"), [("fp8_dynamic", "compressed-tensors"), ("fp8_block", "hf")])
def test_a_vision_tower_as_loaded(kind: str, quant: str, container: str, tmp_path: Path) -> None:
    """Transformers has it below `model.`, without a level that the files have."""
    text = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {
        "num_key_value_heads": 1,
        "head_dim": 64,
        "model_type": {"llava": "llama", "mistral3": "mistral", "gemma3": "gemma3_text"}[kind],
    }
    tower = {"llava": "clip_vision_model", "mistral3": "pixtral", "gemma3": "siglip_vision_model"}[kind]
    vision = {"model_type": tower, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(
        kind, text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, image_token_index=5
    )
    made = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(tmp_path / "in")
    flags = ["--to", "hf", "--quant", quant, "--format", container, "--quiet"]
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), *flags]) == 0
    loaded = type(made).from_pretrained(tmp_path / "out", dtype="auto")
    loaded(torch.arange(12)[None] + 10)  # codes are decoded when they are met first
    seen, params = 0, dict(loaded.named_parameters())
    for name, wanted in made.named_parameters():
        if "language_model" not in name and "lm_head" not in name:
            assert torch.equal(params[name].to(wanted.dtype), wanted), name
            seen += 1
    assert seen > 8
