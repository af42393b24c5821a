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
        case = CASES[FORMATS[name]]
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
