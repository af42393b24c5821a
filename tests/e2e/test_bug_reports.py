"""Inputs after public bug reports: what a user needs to happen, for each of them and its kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from streamconv.cli.convert_checkpoint import main as official
from streamconv.cli.main import main
from tests import tiny

Weights = dict[str, np.ndarray[Any, Any]]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def convert(model: Path, out: Path, *flags: object) -> int:
    """Converts with both command lines; what ends with 0 is the same folder twice, and `verify` accepts it."""
    status = main(["convert", str(model), str(out), "--quiet", *map(str, flags)])
    drop_in = ["--model_dir", str(model), "--output_dir", f"{out}.drop-in", "--log_level", "error", *map(str, flags)]
    if not {"--quant", "--text", "--activation-ranges"} & set(map(str, flags)):
        assert official(drop_in) == status
    if status == 0:
        assert main(["verify", str(out), "--source", str(model), "--quiet"]) == 0
        if Path(f"{out}.drop-in").exists():
            assert rank(out, raw=True) == rank(Path(f"{out}.drop-in"), raw=True)
    return status


def rank(out: Path, number: int = 0, raw: bool = False) -> Any:
    path = out / f"rank{number}.safetensors"
    return path.read_bytes() if raw else load_file(path)


def config_of(out: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((out / "config.json").read_text())
    return made


def shards(folder: Path, extra: dict[str, str] | None = None, drop: tuple[str, ...] = (), **settings: Any) -> Path:
    """The tiny model in two shards and an index file, into which `extra` goes and from which `drop` is left out."""
    weights, placed = tiny.tensors(), dict[str, str]()
    if settings.get("tie_word_embeddings"):
        del weights[HEAD]
    folder.mkdir(parents=True)
    for number in range(2):
        part = {name: weights[name] for name in list(weights)[number::2]}
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file(part, folder / file)
        placed |= dict.fromkeys(part, file)
    placed = {name: file for name, file in (placed | (extra or {})).items() if name not in drop}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(tiny.config(**settings)))
    return folder


def reference(tmp_path: Path, **settings: Any) -> bytes:
    """The rank file of the plain model."""
    model = tiny.write(tmp_path / "plain", settings=tiny.config(**settings))
    assert main(["convert", str(model), str(tmp_path / "plain.out"), "--quiet"]) == 0
    made: bytes = rank(tmp_path / "plain.out", raw=True)
    return made


# ---- config.json


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None),
        ({"rope_theta": 5e5, "rope_parameters": None}, None),
    ],
)
def test_rope_theta_in_two_places(tmp_path: Path, capfd: pytest.CaptureFixture[str], settings: dict[str, Any], base: float | None) -> None:
    model = tiny.write(tmp_path / "in", settings=tiny.config(**settings))
    assert convert(model, tmp_path / "out") == 0
    made, said = config_of(tmp_path / "out"), capfd.readouterr().err
    assert made["rotary_base"] == 5e5 and "rope_theta" not in (made["rotary_scaling"] or {})
    assert ("500000.0" in said and "10000.0" in said) == (base is not None)


@pytest.mark.parametrize("inner", [{"rope_theta": "x"}, {"rope_theta": -1}, [1], {"full_attention": {"rope_theta": 1e4}}])
def test_rope_parameters_that_cannot_be(tmp_path: Path, inner: Any) -> None:
    assert convert(tiny.write(tmp_path / "in", settings=tiny.config(rope_parameters=inner)), tmp_path / "out") == 3


@pytest.mark.parametrize("stated", [None, "llama"])
def test_the_architecture_decides(tmp_path: Path, stated: str | None) -> None:
    weights = {name: value for name, value in tiny.tensors().items() if ".mlp." not in name}
    random = np.random.default_rng(2)
    for layer in range(tiny.LAYERS):
        at = f"model.layers.{layer}.block_sparse_moe."
        weights[at + "gate.weight"] = random.normal(0, 1, (2, tiny.HIDDEN)).astype(np.float16)
        for expert in range(2):
            for name, shape in (("w1", (256, 128)), ("w2", (128, 256)), ("w3", (256, 128))):
                weights[f"{at}experts.{expert}.{name}.weight"] = random.normal(0, 0.1, shape).astype(np.float16)
    settings = tiny.config(architectures=["MixtralForCausalLM"], model_type=stated, num_local_experts=2, num_experts_per_tok=2)
    settings = {key: value for key, value in settings.items() if value is not None}
    assert convert(tiny.write(tmp_path / "in", weights, settings), tmp_path / "out") == 0
    made = config_of(tmp_path / "out")
    assert made["moe"]["normalization_mode"] == 1 and made["hidden_act"] == "swiglu"


def test_qwen_type_without_a_model_type(tmp_path: Path) -> None:
    weights, size = tiny.tensors(), tiny.HIDDEN // tiny.HEADS
    for layer in range(tiny.LAYERS):
        for name, heads in (("q", tiny.HEADS), ("k", tiny.KV), ("v", tiny.KV)):
            weights[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = np.ones(heads * size, np.float16)
    settings = tiny.config(architectures=["Qwen2ForCausalLM"])
    del settings["model_type"]
    assert convert(tiny.write(tmp_path / "in", weights, settings), tmp_path / "out") == 0
    assert config_of(tmp_path / "out")["qwen_type"] == "qwen2"


def test_an_unknown_architecture_gets_the_nearest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for given, near in (("FSDPLlamaForCausalLM", "LlamaForCausalLM"), ("MistralForCasualLM", "MistralForCausalLM")):
        assert convert(tiny.write(tmp_path / given, settings=tiny.config(architectures=[given])), tmp_path / "out") == 3
        assert f"if it is a {near} under another name" in capfd.readouterr().err


def test_problems_are_one_line_each(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = tiny.tensors()
    for name in [name for name in weights if "layers" in name]:
        weights[name.replace("layers", "blocks")] = weights.pop(name)
    assert convert(tiny.write(tmp_path / "in", weights), tmp_path / "out") == 3
    lines = capfd.readouterr().err.splitlines()[: 22]
    assert lines[0] == "error: 36 problems" and lines[1].startswith("  missing tensor") and lines[21] == "  and 16 more"
    settings = tiny.config(hidden_size=0, vocab_size="x")
    assert convert(tiny.write(tmp_path / "two", settings=settings), tmp_path / "out") == 3
    assert "\n  config.json: vocab_size is 'x'" in capfd.readouterr().err


# ---- which files, and what they hold


def test_the_index_lists_what_no_file_holds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = shards(tmp_path / "in", {HEAD: "model-00002-of-00002.safetensors"}, tie_word_embeddings=True)
    assert convert(model, tmp_path / "out") == 0
    assert "lm_head.weight is listed in the index file, in no file" in capfd.readouterr().err
    (model / "config.json").write_text(json.dumps(tiny.config()))
    assert convert(model, tmp_path / "needed") == 3
    assert "missing tensor lm_head.weight" in capfd.readouterr().err


def test_the_index_does_not_list_what_a_file_holds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = shards(tmp_path / "in", drop=("model.norm.weight",))
    path = model / "model-00002-of-00002.safetensors"
    save_file(load_file(path) | {"value_head.weight": np.ones((1, 128), np.float16)}, path)
    assert convert(model, tmp_path / "out") == 0
    assert rank(tmp_path / "out", raw=True) == reference(tmp_path)
    assert "value_head.weight is not listed in the index file and not needed" in capfd.readouterr().err


@pytest.mark.parametrize("there", [False, True])
def test_an_index_of_another_sharding(tmp_path: Path, capfd: pytest.CaptureFixture[str], there: bool) -> None:
    """As transformers: model.safetensors comes first."""
    model = shards(tmp_path / "in")
    if not there:
        (model / "model-00001-of-00002.safetensors").unlink()
    save_file(tiny.tensors(seed=5), model / "model.safetensors")
    assert convert(model, tmp_path / "out") == 0
    assert "is not used: model.safetensors is read" in capfd.readouterr().err
    assert (rank(tmp_path / "out")["lm_head.weight"] == tiny.tensors(seed=5)[HEAD]).all()


def test_links_out_of_the_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = shards(tmp_path / "in")
    for path in sorted(model.glob("*.safetensors")):
        shutil.move(path, tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert convert(model, tmp_path / "out") == 0
    assert rank(tmp_path / "out", raw=True) == reference(tmp_path)
    said = f"model-00001-of-00002.safetensors is a link to {tmp_path / 'model-00001-of-00002.safetensors'} (and 1 more"
    capfd.readouterr()
    assert main(["plan", str(model)]) == 0 and said in capfd.readouterr().out
    path.unlink()
    path.symlink_to("/dev/zero")
    assert convert(model, tmp_path / "device") == 3


def test_an_output_below_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    model = shards(tmp_path / "in")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    monkeypatch.chdir(model)
    assert main(["plan", ".", "trt/ckpt", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["output_problem"] is None
    assert convert(Path("."), Path("trt/ckpt")) == 0
    assert official(["--model_dir", ".", "--output_dir", "conf", "--save_config_only"]) == 0
    assert rank(Path("trt/ckpt"), raw=True) == reference(tmp_path)
    assert main(["convert", ".", "trt/ckpt", "--quiet"]) == 6 and main(["convert", ".", "trt/ckpt", "--force", "--quiet"]) == 0
    assert main(["convert", ".", "trt", "--force"]) == 6 and main(["convert", ".", ".", "--force"]) == 6
    shutil.rmtree("trt")
    shutil.rmtree("conf")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_ranges_beside_an_output_below_the_source_are_no_weights(tmp_path: Path) -> None:
    model = shards(tmp_path / "in")
    (model / "model.safetensors.index.json").unlink()
    save_file({"model.layers.0.mlp.up_proj.x": np.ones(4, np.float32)}, model / "out.ranges.safetensors")
    assert convert(model, tmp_path / "out") == 0


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4976698672\n"


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_git_lfs_pointer(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    model = shards(tmp_path / "in")
    (model / name).write_text(POINTER)
    assert convert(model, tmp_path / "out") == 3
    said = capfd.readouterr().err
    assert f"{name} is a Git LFS pointer" in said and "git lfs pull" in said


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter(tmp_path: Path, capfd: pytest.CaptureFixture[str], with_config: bool) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save_file({"base_model.model.model.layers.0.q_proj.lora_A.weight": np.ones((8, 128), np.float16)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}))
    if with_config:
        (folder / "config.json").write_text(json.dumps(tiny.config()))
    assert convert(folder, tmp_path / "out") == 3
    said = capfd.readouterr().err
    assert "is a LoRA adapter for org/base" in said and "merge_and_unload" in said
    tiny.write(folder)
    assert convert(folder, tmp_path / "out") == 0


def test_an_adapter_that_is_not_merged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = {f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer."): value for name, value in tiny.tensors().items()}
    assert convert(tiny.write(tmp_path / "in", weights), tmp_path / "out") == 3
    assert "merge_and_unload" in capfd.readouterr().err


@pytest.mark.parametrize(("name", "what"), [("m-q4.gguf", "GGUF"), ("model.onnx", "ONNX"), ("tf_model.h5", "TensorFlow")])
def test_other_formats_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, what: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(b"GGUF" + bytes(100))
    for path in (tmp_path / "in", tmp_path / "in" / name):
        assert convert(path, tmp_path / "out") == 3
        said = capfd.readouterr().err
        assert f"{name} in" in said and what in said
    (tmp_path / "in" / "config.json").write_text(json.dumps(tiny.config()))
    assert convert(tmp_path / "in", tmp_path / "out") == 3
    assert what in capfd.readouterr().err


# ---- names


def _head_alone(weights: Weights) -> None:
    weights[HEAD] = weights.pop(EMBEDDING)


@pytest.mark.parametrize(("flags", "version"), [((), "1.2"), (("--target-version", "0.16"), "0.16")])
def test_a_tied_model_that_stores_its_head(tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: tuple[str, ...], version: str) -> None:
    weights = tiny.tensors()
    _head_alone(weights)
    model = tiny.write(tmp_path / "in", weights, tiny.config(tie_word_embeddings=True))
    assert convert(model, tmp_path / "out", *flags) == 0
    made = rank(tmp_path / "out")
    assert (made["transformer.vocab_embedding.weight"] == weights[HEAD]).all() and (made["lm_head.weight"] == weights[HEAD]).all()
    assert "lm_head.weight is the embedding" in capfd.readouterr().err
    assert convert(tiny.write(tmp_path / "untied", weights), tmp_path / "other") == 3


@pytest.mark.parametrize(
    "name",
    [
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.1.self_attn.rotary_emb.sin_cached",
        "model.rotary_emb.long_inv_freq",
        "rope.freqs",
    ],
)
def test_rotary_buffers(tmp_path: Path, name: str) -> None:
    model = tiny.write(tmp_path / "in", tiny.tensors() | {name: np.ones(16, np.float32)})
    assert convert(model, tmp_path / "out") == 0
    assert rank(tmp_path / "out", raw=True) == reference(tmp_path)


def _prefixed(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


NAMES: dict[str, Callable[[str], str]] = {
    "_orig_mod.": _prefixed("_orig_mod."),
    "module.": _prefixed("module."),
    "base_model.model.": _prefixed("base_model.model."),
    "module._orig_mod.": _prefixed("module._orig_mod."),
    "model.": _prefixed("model."),
    "any.": _prefixed("policy.net."),
    "each layer compiled": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "inner model": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_behind_a_prefix(tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    model = tiny.write(tmp_path / "in", {NAMES[case](name): value for name, value in tiny.tensors().items()})
    assert convert(model, tmp_path / "out") == 0
    said = capfd.readouterr().err
    assert "left out" in said or "is added" in said
    assert rank(tmp_path / "out", raw=True) == reference(tmp_path)


@pytest.mark.parametrize("other", ["ema.", "value."])
def test_a_prefix_that_is_not_safe(tmp_path: Path, capfd: pytest.CaptureFixture[str], other: str) -> None:
    weights = {f"module.{name}": value for name, value in tiny.tensors().items()}
    model = tiny.write(tmp_path / "in", weights | {f"{other}model.norm.weight": np.ones(128, np.float16)})
    assert convert(model, tmp_path / "out") == 3
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "behind the prefix module., but 1 of 22 tensors are not" in lines[0]  # a line of each command


def test_the_same_tensor_with_and_without_a_wrapper(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny.write(tmp_path / "in", tiny.tensors() | {f"_orig_mod.{EMBEDDING}": np.ones((160, 128), np.float16)})
    assert convert(model, tmp_path / "out") == 3
    assert f"are both {EMBEDDING}" in capfd.readouterr().err


LAYOUTS: dict[str, Callable[[str], str]] = {
    "language_model.": _prefixed("language_model."),
    "model.language_model.": _prefixed("model.language_model."),
    "transformers 5": lambda name: name if name == HEAD else "model.language_model." + name.removeprefix("model."),
    "head at the top": lambda name: name if name == HEAD else "language_model." + name,
    "module.": _prefixed("module.language_model."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("wrapper", "inner"),
    [("Mistral3", "mistral"), ("Llava", "llama"), ("LlavaNext", "mistral")],
)
def test_a_language_model_inside_another(tmp_path: Path, layout: str, wrapper: str, inner: str) -> None:
    text = tiny.config(model_type=inner)
    del text["architectures"], text["torch_dtype"]
    weights = {LAYOUTS[layout](name): value for name, value in tiny.tensors().items()}
    outside = "module." if layout == "module." else ""
    for name in ("vision_tower.layers.0.q_proj.weight", "model.multi_modal_projector.linear_1.weight", "model.image_newline"):
        weights[outside + name] = np.ones((4, 4), np.float16)
    settings = {"architectures": [f"{wrapper}ForConditionalGeneration"], "model_type": wrapper.lower(), "torch_dtype": "float16"}
    model = tiny.write(tmp_path / "in", weights, settings | {"text_config": text, "vision_config": {"hidden_size": 4}})
    assert convert(model, tmp_path / "out") == 0
    assert config_of(tmp_path / "out")["architecture"] == {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[inner]
    assert rank(tmp_path / "out", raw=True) == reference(tmp_path)


@pytest.mark.parametrize(("kind", "says"), [("llama", "(LlamaForCausalLM)"), ("mllama_text_model", "of which nothing is known")])
def test_other_wrappers_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, says: str) -> None:
    settings = {"architectures": ["OtherForConditionalGeneration"], "text_config": tiny.config(model_type=kind, architectures=None)}
    assert convert(tiny.write(tmp_path / "in", settings=settings), tmp_path / "out") == 3
    said = capfd.readouterr().err
    assert "OtherForConditionalGeneration is a multimodal model" in said and kind in said and says in said


# ---- sources that are quantized, or say so


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8"])
def test_a_config_left_over_from_a_merge(tmp_path: Path, capfd: pytest.CaptureFixture[str], method: str) -> None:
    settings = tiny.config(quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    model = tiny.write(tmp_path / "in", settings=settings)
    assert convert(model, tmp_path / "out") == 0
    assert f"config.json says {method}" in capfd.readouterr().err
    assert rank(tmp_path / "out", raw=True) == reference(tmp_path)
    scale = {"model.layers.0.mlp.up_proj.weight_scale": np.ones(1, np.float16)}
    assert convert(tiny.write(tmp_path / "scaled", tiny.tensors() | scale, settings), tmp_path / "no") != 0


def _gptq(group: int) -> dict[str, Any]:
    return tiny.config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False})


def _packed() -> Weights:
    name = "model.layers.0.mlp.up_proj"
    weights = {key: value for key, value in tiny.tensors().items() if key != name + ".weight"}
    return weights | {name + ".qweight": np.zeros((16, 256), np.int32)}


@pytest.mark.parametrize("group", [-1, 16, 32, 256])
@pytest.mark.parametrize("flags", [(), ("--target-sm", "80"), ("--target-version", "0.16"), ("--quant", "int8", "--target-sm", "80")])
def test_groups_without_kernels(tmp_path: Path, capfd: pytest.CaptureFixture[str], group: int, flags: tuple[str, ...]) -> None:
    assert convert(tiny.write(tmp_path / "in", _packed(), _gptq(group)), tmp_path / "out", *flags) == 4
    said = capfd.readouterr().err
    assert "groups of 64 and 128 only" in said and "use --" not in said and "add --" not in said


def test_hints_offer_what_then_works(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny.write(tmp_path / "in", _packed(), _gptq(128))
    assert convert(model, tmp_path / "out") == 2
    said = capfd.readouterr().err
    assert "--target-sm 80 (A100)" in said and "--encoding" not in said
    experts = _gptq(128) | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 1}
    for flags in ((), ("--target-sm", "80"), ("--quant", "int8", "--target-sm", "80")):
        assert convert(tiny.write(tmp_path / "moe", _packed(), experts), tmp_path / "out", *flags) == 4
        said = capfd.readouterr().err
        assert "convert the unquantized model" in said and "§" not in said and "use --quant int4_gptq" not in said


def test_no_message_names_a_section_of_a_document() -> None:
    import ast

    root = Path(__file__).parents[2] / "streamconv"
    told = []
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text())
        raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise | ast.Return | ast.JoinedStr)]
        told += [f"{path}: {ast.unparse(node)}" for node in raised if "§" in ast.unparse(node)]
    assert not told
