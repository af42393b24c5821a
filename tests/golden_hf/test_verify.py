"""`verify` of quantized Hugging Face directories that hold a fault: each kind is found, and the tensor is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamconv.cli.main import main
from streamconv.errors import BudgetError
from streamconv.options import Resources
from streamconv.run.manifest import NAME
from streamconv.verification.check import verify
from tests.golden_hf import cases
from tests.golden_hf.conftest import Models, convert

CASES = cases.load()
Q = "model.layers.0.self_attn.q_proj"
K, V = Q.replace("q_proj", "k_proj"), Q.replace("q_proj", "v_proj")
FORMATS = {
    "fp8_dynamic": "ct_micro_fp8dyn", "fp8_block": "ct_micro_fp8block", "int8": "ct_micro_int8", "w4a16": "ct_micro_w4a16",
    "w8a16": "ct_micro_w8a16", "nvfp4": "ct_micro_nvfp4a16", "mxfp4": "ct_micro_mxfp4", "mxfp8": "ct_micro_mxfp8",
    "hf": "tf_llama_gqa_fp8block", "mo_fp8": "mo_micro_fp8pcpt", "mo_block": "mo_llama_gqa_fp8pbwo", "mo_nvfp4": "mo_micro_w4a16nvfp4",
    "mo_mxfp8": "mo_micro_mxfp8", "mo_int8": "mo_micro_int8wo", "mo_w4a16": "mo_micro_int4wo",
}  # fmt: skip
Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


class Output:
    """One conversion, to be spoilt.

    Attributes:
        scale: last name of a weight's scales.
        code: last name of its codes.
    """

    def __init__(self, name: str, models: Models, root: Path) -> None:
        case, self.name = CASES[FORMATS[name]], name
        self.source, self.folder = models.source(case), root / "out"
        convert(case, self.source, self.folder)
        self.own = shutil.copytree(self.folder, root / "own")
        (self.folder / NAME).unlink()
        self.file = next(path for path in sorted(self.folder.glob("*.safetensors")) if f"{Q}.weight" in str(sorted(load_file(path))))
        held = load_file(self.file)
        self.scale = next(leaf for leaf in ("weight_scale_inv", "weight_scale") if f"{Q}.{leaf}" in held)
        self.code = next(leaf for leaf in ("weight_packed", "weight") if f"{Q}.{leaf}" in held)
        self.code_dtype = held[f"{Q}.{self.code}"].dtype

    def spoil(self, change: Callable[[Tensors], object]) -> None:
        """Change the tensors of the file with layer 0's attention; the index follows."""
        tensors = load_file(self.file)
        change(tensors)
        save_file({name: value.clone() for name, value in tensors.items()}, self.file, metadata={"format": "pt"})
        path = self.folder / "model.safetensors.index.json"
        if path.exists():
            index = json.loads(path.read_text())
            where = {name: file for name, file in index["weight_map"].items() if file != self.file.name}
            index["weight_map"] = where | dict.fromkeys(tensors, self.file.name)
            others = sum(t.nbytes for p in self.folder.glob("*.safetensors") for t in load_file(p).values())
            index["metadata"]["total_size"] = others
            path.write_text(json.dumps(index))

    def restate(self, change: Callable[[Config], object], name: str = "config.json") -> None:
        content = json.loads((self.folder / name).read_text())
        change(content)
        (self.folder / name).write_text(json.dumps(content))

    def finds(self, text: str) -> None:
        problems = verify(self.folder).problems
        assert any(text in line for line in problems), problems


@pytest.fixture
def output(request: pytest.FixtureRequest, models: Models, tmp_path: Path) -> Output:
    return Output(request.param, models, tmp_path)


def every(*less: str) -> Any:
    return pytest.mark.parametrize("output", [name for name in FORMATS if name not in less], indirect=True)


@every()
def test_tensors_of_a_weight(output: Output) -> None:
    """Scales that are missing, of another dtype, of another shape, or of no weight."""
    whole = output.file.read_bytes()
    scale = f"{Q}.{output.scale}"
    output.spoil(lambda t: t.pop(scale))
    output.finds(f"{Q} has codes and no {output.scale}")
    output.file.write_bytes(whole)
    output.spoil(lambda t: t.update({scale: t[scale].to(torch.float32).to(torch.int32)}))
    output.finds(scale)
    output.file.write_bytes(whole)
    output.spoil(lambda t: t.update({scale: torch.cat([t[scale].reshape(-1, 1)] * 2)}))
    output.finds(scale)
    output.file.write_bytes(whole)
    output.spoil(lambda t: t.update({f"model.norm.{output.scale}": t[scale]}))
    output.finds(f"model.norm.{output.scale}")
    output.file.write_bytes(whole)
    output.spoil(lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(2, dtype=torch.int32)}))
    output.finds(f"{Q}.weight_zero_point")


@every()
def test_numbers_that_are_no_scales(output: Output) -> None:
    whole = output.file.read_bytes()
    for raw, word in (([255, 255, 255, 255], "NaN"), ([0, 0, 0, 0], " 0,"), ([0, 0, 0, 0xBF], "negative")):
        exponents = load_file(output.file)[f"{Q}.{output.scale}"].dtype == torch.uint8
        if exponents and word != "NaN":
            continue

        def change(tensors: Tensors, raw: list[int] = raw) -> None:
            bytes_of = tensors[f"{Q}.{output.scale}"].reshape(-1).view(torch.uint8)
            bytes_of[-4:] = torch.tensor(raw, dtype=torch.uint8)[-bytes_of.numel() :]

        output.spoil(change)
        output.finds(f"{Q}.{output.scale} holds")
        output.file.write_bytes(whole)


@every()
def test_what_the_config_says(output: Output) -> None:
    """An ignore list that lacks a layer or has one too many; another format; none at all; the second file."""
    config = (output.folder / "config.json").read_text()
    stated = json.loads(config)["quantization_config"]
    key = "ignore" if "ignore" in stated else "modules_to_not_convert"
    output.restate(lambda c: c["quantization_config"][key].remove("lm_head"))
    output.finds("lm_head")
    (output.folder / "config.json").write_text(config)
    output.restate(lambda c: c["quantization_config"][key].append(Q))
    output.finds(f"{Q} is quantized, and the config's ignore list covers it")
    (output.folder / "config.json").write_text(config)
    output.restate(lambda c: c.pop("quantization_config"))
    output.finds("is quantized, and config.json has no quantization_config")
    other = cases.configs()["compressed-tensors " + ("fp8_dynamic" if output.code_dtype == torch.int8 else "int8_dynamic")]["schemes"][0]
    said = {"quant_method": "compressed-tensors", "format": other["format"], "config_groups": {"g": other}, "ignore": ["lm_head"]}
    output.restate(lambda c: c.update(quantization_config=said))
    output.finds(f"{Q}: ")
    (output.folder / "config.json").write_text(config)
    second = output.folder / "hf_quant_config.json"
    if second.exists():
        second.unlink()
        output.finds("hf_quant_config.json is missing")
    else:
        second.write_text("{}")
        output.finds("hf_quant_config.json is left over")


def group(config: Config) -> Config:
    """The one scheme of a config."""
    (only,) = config["quantization_config"]["config_groups"].values()
    held: Config = only
    return held


def stated(**changes: object) -> Callable[[Config], object]:
    return lambda config: config["quantization_config"].update(changes)


def of_weights(**changes: object) -> Callable[[Config], object]:
    return lambda config: group(config)["weights"].update(changes)


COMPRESSED: dict[str, Callable[[Config], object]] = {
    "asymmetric": of_weights(symmetric=False),
    "bits": of_weights(num_bits=2),
    "words": of_weights(num_bits="4"),
    "type": lambda c: group(c)["weights"].update(type={"int": "float", "float": "int"}[group(c)["weights"]["type"]]),
    "strategy": of_weights(strategy="token"),
    "tensor": of_weights(strategy="tensor"),
    "group": of_weights(strategy="group", group_size=48),
    "dynamic": of_weights(dynamic=True),
    "key": of_weights(bits=4),
    "null": lambda c: group(c).update(weights=None),
    "list": lambda c: group(c).update(weights=[]),
    "inputs": lambda c: group(c).update(input_activations={"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}),
    "targets": lambda c: group(c).update(targets=[]),
    "no targets": lambda c: group(c).pop("targets"),
    "cut": lambda c: group(c).update(targets=["re:.*[kv]_proj$", "re:.*o_proj$"]),
    "class": lambda c: group(c).update(targets=["Lin"]),
    "format": lambda c: group(c).update(format="int-packed"),
    "no groups": stated(config_groups=None),
    "empty": stated(config_groups={}),
    "null group": stated(config_groups={"group_0": None}),
    "status": stated(quantization_status="frozen"),
    "sparse": stated(sparsity_config={"format": "sparse-24-bitmask", "targets": ["Linear"]}),
    "2:4": stated(sparsity_config={"format": "dense", "sparsity_structure": "2:4"}),
    "method": stated(quant_method="compressed_tensor"),
    "awq": stated(quant_method="awq", bits=4, group_size=128),
    "fp8": stated(quant_method="fp8"),
    "no method": lambda c: c["quantization_config"].pop("quant_method"),
    "cache": stated(kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}),
    "integer cache": stated(kv_cache_scheme={"num_bits": 8, "type": "int"}),
    "glob": lambda c: c["quantization_config"].update(ignore=["*lm_head*"]),
    "names": stated(ignore=[1]),
    "no list": stated(ignore="lm_head"),
    "expression": stated(ignore=["lm_head", "re:("]),
    "slow": stated(ignore=["lm_head", "re:(a+)+$"]),
}


@pytest.mark.parametrize("output", ["fp8_dynamic", "w4a16", "nvfp4", "mxfp8"], indirect=True)
def test_every_word_of_a_statement_counts(output: Output) -> None:
    """compressed-tensors: what engines would misread, refuse or leave out; and what says nothing is no fault."""
    config = (output.folder / "config.json").read_text()
    assert not verify(output.folder).problems
    for name, change in COMPRESSED.items():
        output.restate(change)
        assert verify(output.folder).problems, name
        (output.folder / "config.json").write_text(config)
    output.restate(stated(sparsity_config={}, transform_config={}, version="0.20.0", global_compression_ratio=None))
    output.restate(lambda c: group(c).update(output_activations=None, targets=[r"re:.*layers\.\d+\..*_proj$"]))
    output.restate(of_weights(observer="minmax", observer_kwargs={}, actorder=None, block_structure=None, zp_dtype=None))
    verdict = verify(output.folder)
    assert not verdict.problems and len(verdict.warnings) == 1  # there is no streamconv.json


OTHERS: dict[str, dict[str, Callable[[Config], object]]] = {
    "hf": {
        "block": stated(weight_block_size=[64, 128]),
        "one": stated(weight_block_size=None),
        "number": stated(weight_block_size=128),
        "static": stated(activation_scheme="static"),
        "scheme": stated(activation_scheme="maybe"),
        "e5m2": stated(fmt="e5m2"),
    },
    "mo_nvfp4": {
        "algo": stated(quant_algo="NVFP4"),
        "none": stated(quant_algo=None),
        "new": stated(quant_algo="NVFP5"),
        "group": lambda c: group(c)["weights"].update(group_size=32),
        "cache": stated(kv_cache_scheme={"dynamic": False, "num_bits": 8, "type": "float"}),
    },
    "mo_w4a16": {"algo": stated(quant_algo="W8A16"), "method": stated(quant_method="awq", bits=4, group_size=128)},
}


@pytest.mark.parametrize("output", OTHERS, indirect=True)
def test_every_word_of_other_statements_counts(output: Output) -> None:
    config = (output.folder / "config.json").read_text()
    for key, change in OTHERS[output.name].items():
        output.restate(change)
        assert verify(output.folder).problems, key
        (output.folder / "config.json").write_text(config)
    second = output.folder / "hf_quant_config.json"
    if second.exists():
        whole = second.read_text()
        for key, value in (("quant_algo", "FP8"), ("exclude_modules", []), ("kv_cache_quant_algo", "FP8"), ("exclude_modules", None)):
            output.restate(lambda c, key=key, value=value: c["quantization"].update({key: value}), second.name)  # type: ignore[misc]
            output.finds("hf_quant_config.json: " + key)
            second.write_text(whole)
        second.write_text("[1]")
        output.finds("hf_quant_config.json")


def test_methods_of_others_are_said_to_be_unknown(models: Models, tmp_path: Path) -> None:
    output = Output("fp8_dynamic", models, tmp_path)
    output.restate(lambda c: c.update(quantization_config={"quant_method": "quark", "ignore": ["lm_head"]}))
    verdict = verify(output.folder)
    assert not verdict.problems and any("quark, which is not known here" in line for line in verdict.warnings)


@pytest.mark.parametrize("output", ["hf", "mo_block", "nvfp4"], indirect=True)
def test_a_set_of_partners_half_quantized(output: Output) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(K + ".weight")]:
            shape = tensors.pop(name).shape
            if name == f"{K}.{output.code}":
                tensors[f"{K}.weight"] = torch.ones(shape[0], 128, dtype=torch.bfloat16)

    output.spoil(change)
    output.finds(f"{Q} is quantized and {K} is not")
    output.finds(f"{K} is not quantized, and the config's ignore list does not name it")


@pytest.mark.parametrize("output", ["nvfp4", "mo_nvfp4"], indirect=True)
def test_partners_with_scales_of_their_own(output: Output) -> None:
    leaf = "weight_global_scale" if output.code == "weight_packed" else "weight_scale_2"
    output.spoil(lambda t: t.update({f"{V}.{leaf}": t[f"{V}.{leaf}"] * 2}))
    output.finds(f"{V}.{leaf} differs from {Q}.{leaf}")


@pytest.mark.parametrize("output", ["hf"], indirect=True)
def test_the_index(output: Output) -> None:
    name, whole = "model.safetensors.index.json", (output.folder / "model.safetensors.index.json").read_text()
    output.restate(lambda c: c["weight_map"].pop(f"{Q}.weight_scale_inv"), name)
    output.finds(f"{Q}.weight_scale_inv is not where it says")
    (output.folder / name).write_text(whole)
    output.restate(lambda c: c["weight_map"].update(ghost=output.file.name), name)
    output.finds("ghost is not where it says")
    (output.folder / name).write_text(whole)
    output.restate(lambda c: c["metadata"].update(total_size=1), name)
    output.finds("total_size is 1")
    (output.folder / name).unlink()
    output.finds("no model.safetensors.index.json")


@every()
def test_against_the_source(output: Output, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Good as it is; a swapped k and v, another scale, another code, another model are found."""
    assert main(["verify", str(output.own), "--source", str(output.source), "--quiet"]) == 0
    stated = json.loads((output.own / NAME).read_text())["options"]
    assert stated["quant"] != "none"
    file = output.own / output.file.name
    whole = file.read_bytes()

    def swap(t: Tensors) -> None:
        for leaf in {output.code, output.scale}:
            t[f"{K}.{leaf}"], t[f"{V}.{leaf}"] = t[f"{V}.{leaf}"].clone(), t[f"{K}.{leaf}"].clone()

    def flip(leaf: str) -> Callable[[Tensors], None]:
        def change(t: Tensors) -> None:
            t[f"{Q}.{leaf}"].reshape(-1).view(torch.uint8)[-2] ^= 1

        return change

    for change, named in ((swap, f"{K}."), (flip(output.code), f"{Q}.{output.code}"), (flip(output.scale), f"{Q}.{output.scale}")):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        capsys.readouterr()
        assert main(["verify", str(output.own), "--source", str(output.source), "--quiet"]) != 0
        assert named in "".join(capsys.readouterr())
        file.write_bytes(whole)
    other = tmp_path / "other"
    shutil.copytree(output.source, other)
    path = other / output.file.name
    tensors = load_file(path)
    tensors[f"{Q}.weight"][3] *= 2
    save_file(tensors, path, metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["verify", str(output.own), "--source", str(other), "--quiet"]) != 0
    assert Q in "".join(capsys.readouterr())


@every()
def test_against_the_source_without_a_manifest(output: Output) -> None:
    """Good as it is, of any format; exchanged weights, another scale, a spoilt row and one spoilt code are found, and named."""
    assert not verify(output.folder, output.source).problems
    whole = output.file.read_bytes()
    leaves = {output.code, output.scale}

    def swap(t: Tensors) -> None:
        for leaf in leaves:
            t[f"{K}.{leaf}"], t[f"{V}.{leaf}"] = t[f"{V}.{leaf}"].clone(), t[f"{K}.{leaf}"].clone()

    def rescale(t: Tensors) -> None:
        held = t[f"{Q}.{output.scale}"]
        if held.dtype == torch.uint8:
            held += 1
        else:
            t[f"{Q}.{output.scale}"] = (held.float() * 1.5).to(held.dtype)

    def row(t: Tensors) -> None:
        codes = t[f"{Q}.{output.code}"].view(torch.uint8)
        codes[3] = codes[3].flip(0)

    def norm(t: Tensors) -> None:
        t["model.layers.0.input_layernorm.weight"][5] *= 1.0625

    for change, named in ((swap, K), (rescale, Q), (row, Q), (norm, "input_layernorm")):
        output.spoil(change)
        problems = verify(output.folder, output.source).problems
        assert any(named in line for line in problems), (change.__name__, problems)
        output.file.write_bytes(whole)


def test_another_model_and_half_a_model(models: Models, tmp_path: Path) -> None:
    output = Output("fp8_dynamic", models, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(output.source, other)
    for path in other.glob("*.safetensors"):
        tensors = load_file(path)
        changed = {name: value + 0.01 * torch.randn_like(value) if "proj" in name else value for name, value in tensors.items()}
        save_file(changed, path, metadata={"format": "pt"})
    problems = verify(output.folder, other).problems
    assert sum("is not the source's" in line for line in problems) == 7
    with pytest.raises(BudgetError, match="memory-budget") as refused:
        verify(output.folder, output.source, resources=Resources(memory_budget=1 << 20))
    assert refused.value.hint


AUTO_ROUND = {"auto_round:auto_gptq": ("gptq", False), "auto_round": ("gptq", True), "auto_round:auto_awq": ("awq", False)}


@pytest.mark.parametrize("packing", AUTO_ROUND)
def test_auto_round(packing: str, tmp_path: Path) -> None:
    """Its layouts are those of GPTQ and AutoAWQ; single modules may have other bits, or none."""
    from tests.unit.test_hf_decode import integer_weight, source

    method, v2 = AUTO_ROUND[packing]
    down, up = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
    wide = integer_weight(64, 128, 32, "gptq", bits=8, v2=v2)[0] if method == "gptq" else {"weight": torch.ones(64, 128).half()}
    made = {f"{down}.{leaf}": value for leaf, value in integer_weight(64, 128, 32, method, bits=4, v2=v2)[0].items()}
    made |= {f"{up}.{leaf}": value for leaf, value in wide.items()} | {"lm_head.weight": torch.ones(8, 8).half()}
    other = {"bits": 8 if method == "gptq" else 16}
    stated = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
    stated["extra_config"] = {"lm_head": {"bits": 16, "data_type": "float"}, up: other}
    folder = source(tmp_path / "source", stated, made)

    def told(**changes: Any) -> list[str]:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated | changes}))
        return verify(folder).problems

    assert told() == [] and not any("not checked" in line for line in verify(folder).warnings)
    assert any(down in line for line in told(bits=8)) and any(down in line for line in told(group_size=64))
    if method == "gptq":
        assert any(up in line for line in told(extra_config={})) and any("qzeros" in line for line in told(sym=True))
    assert any(down in line for line in told(extra_config=stated["extra_config"] | {down: {"bits": 16}}))
    assert told(packing_format="auto_round:mxfp4") == [] and any("not checked" in line for line in verify(folder).warnings)
    told()
    for leaf in ("qweight", "qzeros", "scales"):
        save_file({name: value for name, value in made.items() if name != f"{down}.{leaf}"}, folder / "model.safetensors")
        assert any(down in line for line in verify(folder).problems), leaf
