"""AWQ whose pre-scales lie in norms and in the rows of other layers: the model stays what it was, and readers need to know nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from streamconv import api  # noqa: E402
from streamconv.calibration.folds import Folds, Norm, Rows  # noqa: E402
from streamconv.calibration.layers import OneLayer  # noqa: E402
from streamconv.calibration.run import find_codes  # noqa: E402
from streamconv.calibration.tiers import LINEAR  # noqa: E402
from streamconv.checkpoint.index import open_index  # noqa: E402
from streamconv.errors import UsageError  # noqa: E402
from streamconv.targets.hf.target import HuggingFace  # noqa: E402
from streamconv.targets.trtllm.options import TensorRTLLM  # noqa: E402
from streamconv.targets.trtllm.target import model_of  # noqa: E402
from streamconv.verification.check import verify  # noqa: E402
from tests import tiny  # noqa: E402
from tests.calibrate.test_int4_codes import GROUP, SIZES, inputs_of, one_thread, text, values  # noqa: E402
from tests.calibrate.test_streamed import model  # noqa: E402
from tests.unit.test_autoawq import decoded  # noqa: E402

__all__ = ["model", "one_thread", "text"]

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "phi3": {"pad_token_id": 0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
}
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 40}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def exact(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms and softmax in float32, whatever the model is in."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda values, dim, dtype=None: softmax(values, dim))
    for module in whole.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps, added = getattr(module, "variance_epsilon", None) or module.eps, float("Gemma" in type(module).__name__)

            def forward(states: Any, module: Any = module, eps: float = eps, added: float = added) -> Any:
                return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps) * (module.weight + added)

            module.forward = forward


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_model_is_the_same_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, with any scales: norms, rows of the layer before, biases, heads that share keys and values."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    random = torch.Generator().manual_seed(5)
    config = CONFIG_MAPPING[kind].from_dict(SMALL | KINDS[kind])
    more = {"experts_implementation": "eager"} if "num_experts" in KINDS[kind] else {}
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float64, **more).eval()
    exact(whole, monkeypatch)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
    whole.save_pretrained(str(tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    ids = torch.arange(30)[None]
    with contextlib.closing(open_index(tmp_path)) as index, torch.no_grad():
        before = whole(ids).logits
        facts, family = model_of(index)
        layer = OneLayer(index, facts, family, torch.float64, "cpu", Counter(), lambda _: None)
        told: Counter[type] = Counter()
        for number in range(2):
            layer.load(number)
            folds = Folds("all", layer.places, (2, 2, facts.head_size), float(family.norm_add_one))
            mine = {name.rpartition(".")[0]: place.role for name, place in layer.places.items() if place.role in LINEAR}
            made: dict[Any, Any] = {}
            for module, role in mine.items():
                weight = layer.layer.get_submodule(module).weight
                into = folds.of(role, module, weight.shape[1], index)
                told[type(into)] += 1
                if into is None:
                    continue
                scale = (torch.randn(weight.shape[1], generator=random, dtype=torch.float64)).exp()
                if into.parameter not in made:  # one for all that share an input
                    made[into.parameter] = into.multiplier(scale)
                    folds.take(into, made[into.parameter])
                weight /= made[into.parameter]
            for name, factors in folds.rows().items():
                layer.layer.get_parameter(name)[-len(factors) :] *= factors[:, None]
            for name in folds.others():
                layer.layer.get_parameter(name).copy_(folds.values(name, index))
            for name, parameter in layer.layer.named_parameters():
                place = layer.places[name]
                rows = state[place.record.name].reshape(-1, *parameter.shape[1:])
                rows[place.start : place.start + place.rows] = parameter
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        folded = AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float64, **more).eval()
        exact(folded, monkeypatch)
        after = folded(ids).logits
    moe = kind == "qwen3_moe"
    assert told[Norm] == 2 * (2 if kind == "phi3" else 3 if moe else 5) and told[Rows] == 2 * (5 if moe else 2)
    assert told[type(None)] == (16 if moe else 0)  # the router reads what the experts read
    assert float((after - before).abs().max()) < 1e-10 * float(before.abs().max())


@pytest.mark.parametrize(("kind", "added"), [("bfloat16", 0.0), ("float16", 1.0)])
def test_weights_are_made_for_the_norm_as_it_is_stored(kind: str, added: float) -> None:
    stored = torch.randn(256, generator=torch.Generator().manual_seed(1)).to(getattr(torch, kind))
    stored[7] = -added  # a channel that nothing comes through
    scale = torch.randn(256, generator=torch.Generator().manual_seed(2)).exp()
    norm = Norm("", stored, added)
    multiplier = norm.multiplier(scale)
    new = norm.folded(multiplier)
    assert new.dtype == stored.dtype and bool(((multiplier * scale - 1).abs()[(stored + added).abs() > 0.5] < 2.0**-6).all())
    exact, kept = (new.double() + added) / multiplier.double(), stored.double() + added
    assert bool(((exact - kept).abs() <= 2 * 2.0**-23 * kept.abs()).all())


def loud(folder: Path, kind: Any) -> dict[str, Any]:
    """The tiny model with some inputs that are far larger than others."""
    weights = {name: values_.to(kind) for name, values_ in load_file(folder / "model.safetensors").items()}
    for layer in range(tiny.LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"][3] *= 40
        weights[f"model.layers.{layer}.self_attn.v_proj.weight"][5] *= 30
        weights[f"model.layers.{layer}.mlp.up_proj.weight"][9] *= 30
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": str(kind).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def test_directories_hold_the_weights_with_every_pre_scale_undone(model: Path, text: Path, tmp_path: Path) -> None:
    weights = loud(model, torch.bfloat16)
    inputs, both = inputs_of(model, text), dict[str, dict[str, Any]]()
    for fold, container in (("all", "compressed-tensors"), ("norms", "modelopt")):
        path, out = tmp_path / f"{fold}.safetensors", tmp_path / fold
        find_codes(model, path, str(text), method="awq", fold=fold, **SIZES)
        both[fold] = load_file(path)
        options = HuggingFace(quant="w4a16", format=container, method="awq", codes=str(path), group_size=GROUP)
        api.convert(model, out, options)
        assert not verify(out, model).problems
        made = load_file(out / "model.safetensors")
        undone(fold, weights, both[fold], made, inputs)
        if fold == "all":  # AutoAWQ's container has them in the same places
            api.convert(model, tmp_path / "awq", dataclasses.replace(options, format="awq"))
            other = load_file(tmp_path / "awq/model.safetensors")
            for name, tensor in made.items():
                module, _, leaf = name.rpartition(".")
                if leaf == "weight_packed":
                    assert np.array_equal(decoded(other, module), values(both[fold], module).numpy())
                elif leaf == "weight":
                    assert torch.equal(other[name], tensor)
        else:
            taken_over(out, both[fold], made)
    paths = {fold: str(tmp_path / f"{fold}.safetensors") for fold in ("none", "norms", "all")}
    find_codes(model, paths["none"], str(text), method="awq", **SIZES)
    a_fold_is_the_same_product(weights, load_file(paths["none"]), both["norms"], both["all"])
    what_does_not_go_together_is_refused(model, paths)


def taken_over(out: Path, found: dict[str, Any], made: dict[str, Any]) -> None:
    """A folded directory of ModelOpt's as a source: the floats it stands for, norms as they are; codes and pre-scales in rank files."""
    api.convert(out, out.parent / "back", HuggingFace(dtype="float32"))
    back = load_file(out.parent / "back/model.safetensors")
    for name, values_ in back.items():
        module = name.removesuffix(".weight")
        if module in {key.removesuffix(".weight_scale") for key in found if key.endswith(".weight_scale")}:
            scale = made.get(f"{module}.pre_quant_scale")
            assert torch.equal(values_, values(found, module) * (1.0 if scale is None else scale.float()))
        else:
            assert torch.equal(values_, made[name].float())
    api.convert(out, out.parent / "ranks", TensorRTLLM(quant="int4_awq", group_size=GROUP))
    rank, at, to = load_file(out.parent / "ranks/rank0.safetensors"), "model.layers.1.", "transformer.layers.1."
    for module, name in (("mlp.down_proj", "mlp.proj"), ("self_attn.o_proj", "attention.dense"), ("mlp.gate_proj", "mlp.fc")):
        assert torch.equal(rank[f"{to}{name}.weight"].view(torch.uint8), made[f"{at}{module}.weight"])
        assert torch.equal(rank[f"{to}{name}.weights_scaling_factor"], found[f"{at}{module}.weight_scale"])
        scale = made.get(f"{at}{module}.pre_quant_scale", torch.ones(1).bfloat16())
        assert bool((rank[f"{to}{name}.prequant_scaling_factor"] == scale).all())
    assert torch.equal(rank[f"{to}input_layernorm.weight"], made[f"{at}input_layernorm.weight"])


def a_fold_is_the_same_product(weights: dict[str, Any], free: dict[str, Any], explicit: dict[str, Any], folded: dict[str, Any]) -> None:
    """Rows that make the inputs of another layer keep their codes, their scales take a factor; behind a norm the weights as they act are
    equal but for its rounding, which ties feel.
    """
    for layer in range(tiny.LAYERS):
        at = f"model.layers.{layer}."
        for name in ("self_attn.v", "mlp.up"):
            assert torch.equal(explicit[f"{at}{name}_proj.weight"], folded[f"{at}{name}_proj.weight"])
        ratio = folded[f"{at}mlp.up_proj.weight_scale"] / explicit[f"{at}mlp.up_proj.weight_scale"]
        factor = ratio.mean(1)
        assert bool(((ratio / factor[:, None] - 1).abs() < 2.0**-7).all())  # one factor a row, scales rounded to bfloat16
        assert float(factor.max() / factor.min()) > 1.5
        for name in ("self_attn.q", "self_attn.k", "mlp.gate"):
            norm = "input_layernorm" if "attn" in name else "post_attention_layernorm"
            module, before, after = f"{at}{name}_proj", weights[f"{at}{norm}.weight"].float(), folded[f"{at}{norm}.weight"].float()
            one, two = values(free, module) * free[f"{module}.pre_quant_scale"] * before, values(folded, module) * after
            error = (one - weights[f"{module}.weight"].float() * before).norm()
            assert float((one - two).norm()) < 0.6 * float(error), module  # codes and clips at a tie: 0.36 to 0.51
            for other in (free, explicit):
                assert torch.allclose(other[f"{module}.losses"], folded[f"{module}.losses"], rtol=0.15)


def undone(fold: str, weights: dict[str, Any], found: dict[str, Any], made: dict[str, Any], inputs: dict[str, Any]) -> None:
    size = tiny.HIDDEN // tiny.HEADS
    changes = Counter[str]()
    for layer in range(tiny.LAYERS):
        at = f"model.layers.{layer}."
        norms = ("input_layernorm", "post_attention_layernorm")
        ratio = {norm: made[f"{at}{norm}.weight"].float() / weights[f"{at}{norm}.weight"].float() for norm in norms}
        into = {"q": "input_layernorm", "k": "input_layernorm", "gate": "post_attention_layernorm"}
        for name in ("self_attn.q", "self_attn.k", "mlp.gate"):
            module, multiplier = f"{at}{name}_proj", ratio[into[name.rpartition(".")[2]]]
            error = (values(found, module) * multiplier - weights[f"{module}.weight"].float()).double()
            kept = found[f"{module}.losses"]
            assert float((error @ inputs[module].double().T).square().mean(1).sum()) == pytest.approx(float(kept[2]), rel=1e-4)
            assert kept[2] <= kept[1]
            changes[name] += bool((multiplier != 1).any())
        heads = (tiny.KV, tiny.HEADS // tiny.KV, size)
        for name, maker, shape in (("self_attn.o", "self_attn.v", heads), ("mlp.down", "mlp.up", (tiny.INTER, 1, 1))):
            module, source = f"{at}{name}_proj", f"{at}{maker}_proj"
            if fold == "norms":
                assert torch.equal(made[f"{module}.pre_quant_scale"], found[f"{module}.pre_quant_scale"].bfloat16())
                changes[name] += bool((made[f"{module}.pre_quant_scale"] != 1).any())
                continue
            # the rows of the maker tell their factor: W' = W * row / column
            before = weights[f"{source}.weight"].float() / ratio[into["q" if "attn" in name else "gate"]]
            factor = (values(found, source) * before).sum(1) / before.square().sum(1)
            wide = factor.reshape(shape[0], 1, shape[2]).expand(shape).reshape(-1)
            back, whole = values(found, module) * wide, weights[f"{module}.weight"].float()
            assert float((back - whole).norm() / whole.norm()) < 0.2, name  # as far as INT4 comes: 0.15
            changes[name] += float(factor.max() / factor.min()) > 1.5
    assert set(changes) == {"self_attn.q", "self_attn.k", "mlp.gate", "self_attn.o", "mlp.down"} and min(changes.values()) > 0, changes


def what_does_not_go_together_is_refused(model: Path, paths: dict[str, str]) -> None:
    common: dict[str, Any] = {"method": "awq", "group_size": GROUP}
    with pytest.raises(UsageError, match="folded into the layers before"):
        api.open_and_plan(model, TensorRTLLM(quant="int4_awq", codes=paths["all"], **common))
    ours = HuggingFace(quant="w4a16", codes=paths["all"], **common)
    for fold, container in (("none", None), ("norms", None), ("none", "modelopt"), ("norms", "awq")):
        with pytest.raises(UsageError, match="are not folded as"):
            api.open_and_plan(model, dataclasses.replace(ours, codes=paths[fold], format=container))
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.down_proj is to stay as it is"):
        api.open_and_plan(model, dataclasses.replace(ours, ignore=("re:.*down_proj$",)))


@pytest.mark.slow
def test_transformers_reads_a_folded_directory(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    from streamconv.cli.main import main

    loud(model, torch.bfloat16)
    command = ["convert", str(model), str(tmp_path / "out"), "--to", "hf", "--quant", "w4a16", "--group-size", str(GROUP), "--quiet"]
    assert main([*command, "--method", "awq", "--text", str(text), "--max-length", "32", "--device", "cpu"]) == 0
    found, ids = load_file(tmp_path / "out.int4.safetensors"), torch.arange(20)[None]
    ours = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    state = ours.state_dict()
    for name in found:
        if name.endswith("norm.weight"):
            state[name].copy_(found[name])
        elif name.endswith(".weight"):
            state[name].copy_(values(found, name.removesuffix(".weight")))
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-4)
