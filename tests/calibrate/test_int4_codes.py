"""`convert --text` with INT4 codes: both targets hold the same ones, whatever the batch, the passes and the interruptions."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from streamconv import api, memory  # noqa: E402
from streamconv.calibration import codes as codes_work  # noqa: E402
from streamconv.calibration import foreseen, run  # noqa: E402
from streamconv.calibration.run import calibrate, find_codes  # noqa: E402
from streamconv.calibration.tiers import passes_of  # noqa: E402
from streamconv.cli.main import main  # noqa: E402
from streamconv.errors import BudgetError, DataError, RefusedError, UsageError  # noqa: E402
from streamconv.targets.hf.target import HuggingFace  # noqa: E402
from streamconv.targets.trtllm.options import TensorRTLLM  # noqa: E402
from streamconv.verification.check import verify  # noqa: E402
from tests import tiny  # noqa: E402
from tests.calibrate.test_streamed import WORDS, model  # noqa: E402
from tests.unit.test_autoawq import decoded  # noqa: E402

__all__ = ["model"]

pytestmark = pytest.mark.filterwarnings("ignore")
GROUP = 64
SIZES: dict[str, Any] = {"group": GROUP, "scale": "source", "max_length": 32, "device": "cpu"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices are small here, and threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(WORDS[(i * 7 + j * (13 + i)) % len(WORDS)] for j in range(32)) for i in range(8)))
    return path


def values(found: dict[str, Any], module: str) -> Any:
    """What the codes of a module stand for, decoded here."""
    packed = found[f"{module}.weight"].to(torch.int16)
    nibbles = torch.stack([packed & 15, packed >> 4], 1).reshape(-1, packed.shape[1])
    codes, scales = torch.where(nibbles > 7, nibbles - 16, nibbles).float(), found[f"{module}.weight_scale"]
    return (codes.reshape(*scales.shape, -1) * scales[..., None]).reshape(codes.shape)


def inputs_of(folder: Path, text: Path) -> dict[str, Any]:
    """Module -> its inputs [tokens, K] in the whole model, float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    whole = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    seen: dict[str, list[Any]] = {}
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0]))
    with torch.no_grad():
        for part in text.read_text().split("\n\n"):
            whole(**tokenizer(part, return_tensors="pt", truncation=True, max_length=32))
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_the_losses_are_those_of_the_whole_model(model: Path, text: Path, tmp_path: Path) -> None:
    told = find_codes(model, tmp_path / "c", str(text), method="gptq", **SIZES)
    found, source, inputs = load_file(tmp_path / "c"), load_file(model / "model.safetensors"), inputs_of(model, text)
    assert told["tensors"] == 14 and "rounded to nearest" in told["notes"][0]
    for name in ("0.self_attn.k_proj", "1.self_attn.o_proj", "1.mlp.up_proj", "1.mlp.down_proj"):
        module = f"model.layers.{name}"
        weight, tokens = source[f"{module}.weight"].double(), inputs[module].double()
        energy = float((weight @ tokens.T).square().mean(1).sum())
        error = float(((values(found, module).double() - weight) @ tokens.T).square().mean(1).sum())
        kept = found[f"{module}.losses"]
        assert kept.tolist() == pytest.approx([energy, float(kept[1]), error], rel=1e-4) and kept[2] < 0.7 * kept[1]


@pytest.mark.parametrize("method", ["clip", pytest.param("gptq", marks=pytest.mark.slow)])
def test_both_targets_and_every_rank_hold_the_codes(
    method: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.safetensors"
    find_codes(model, path, str(text), method=method, **SIZES)
    found, module = load_file(path), "model.layers.1.mlp.down_proj"
    common: dict[str, Any] = {"method": method, "codes": str(path), "group_size": GROUP}
    api.convert(model, tmp_path / "hf", HuggingFace(quant="w4a16", **common))
    made = load_file(tmp_path / "hf/model.safetensors")
    codes = torch.stack([(made[f"{module}.weight_packed"] >> (4 * place)) & 15 for place in range(8)], 2).reshape(tiny.HIDDEN, -1) - 8
    scales = made[f"{module}.weight_scale"].float()
    assert torch.equal((codes.reshape(*scales.shape, -1) * scales[..., None]).reshape(codes.shape), values(found, module))
    assert not verify(tmp_path / "hf", model).problems
    told = json.loads((tmp_path / "hf/streamconv.json").read_text())["losses"]
    shares = {name[:-7]: (float(v[1] / v[0]), float(v[2] / v[0])) for name, v in found.items() if name.endswith(".losses")}
    for at, kind in enumerate(("rtn", "found")):
        assert {name: each[kind] for name, each in told["each"].items()} == pytest.approx({n: s[at] for n, s in shares.items()}, rel=1e-3)
    assert told["mean"]["found"] == pytest.approx(sum(best for _, best in shares.values()) / len(shares), rel=1e-3)
    assert next(iter(told["worst"])) == max(shares, key=lambda name: shares[name][1]) and told["method"] == method
    flags = ["--to", "hf", "--quant", "w4a16", "--group-size", str(GROUP), "--method", method, "--codes", str(path)]
    assert main(["convert", str(model), str(tmp_path / "parts"), *flags, "--parts", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["losses"] == told
    other = {"clip": "gptq", "gptq": "clip"}[method]
    with pytest.raises(UsageError, match=f"are those of {method}"):
        api.open_and_plan(model, HuggingFace(quant="w4a16", **common | {"method": other}))
    api.convert(model, tmp_path / "mo", HuggingFace(quant="w4a16", format="modelopt", **common))
    assert torch.equal(load_file(tmp_path / "mo/model.safetensors")[f"{module}.weight"], found[f"{module}.weight"])
    api.convert(model, tmp_path / "awq", HuggingFace(quant="w4a16", format="awq", **common))
    assert np.array_equal(decoded(load_file(tmp_path / "awq/model.safetensors"), module), values(found, module).numpy())
    assert not verify(tmp_path / "awq", model).problems
    for tp in (1, 2):
        api.convert(model, tmp_path / f"t{tp}", TensorRTLLM(quant="int4_awq", tp_size=tp, **common))
        ranks = [load_file(tmp_path / f"t{tp}/rank{rank}.safetensors") for rank in range(tp)]
        name = "transformer.layers.1.mlp.proj"
        assert torch.equal(torch.cat([rank[f"{name}.weight"] for rank in ranks], 1).view(torch.uint8), found[f"{module}.weight"])
        assert torch.equal(torch.cat([rank[f"{name}.weights_scaling_factor"] for rank in ranks], 1), found[f"{module}.weight_scale"])
        assert all(bool((rank[f"{name}.prequant_scaling_factor"] == 1).all()) for rank in ranks)
        assert not verify(tmp_path / f"t{tp}", model).problems


def test_the_plan_foretells_the_search(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--quant", "int4_awq", "--group-size", str(GROUP)]
    for target, more in ((TensorRTLLM, flags), (HuggingFace, ["--to", "hf", "--quant", "w4a16", *flags[2:]])):
        assert main(["plan", str(model), *more, "--text", str(text), "--samples", "4", "--device", "cpu", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        path = tmp_path / "c"
        if not path.exists():
            find_codes(model, path, str(text), method="gptq", **SIZES)
            found = load_file(path)
        options = target(quant=more[more.index("--quant") + 1], method="gptq", codes=str(path), group_size=GROUP)
        index, plan = api.open_and_plan(model, options)
        index.close()
        files = {file["name"]: file["size"] for file in told["files"] if file["tensors"]}
        assert files == {file.name: file.size for file in plan.files} and told["options"]["method"] == "gptq"
        search = told["search"]
        assert (search["method"], search["tokens"], search["layers"], search["passes"]) == ("gptq", 4 * 512, tiny.LAYERS, 1)
        assert search["grams"] == [[tiny.HIDDEN, "full", 3], [tiny.INTER, "full", 1]]
        assert search["codes"] == sum(t.nbytes for name, t in found.items() if not name.endswith(".losses"))
    for method, tier in (("clip", "block"), ("awq", "full")):
        assert main(["plan", str(model), *flags, "--method", method, "--write-config", str(tmp_path / f"{method}.toml")]) == 0
        assert f"3 x {tier} of {tiny.HIDDEN} channels" in capsys.readouterr().out
        assert f'method = "{method}"' in (tmp_path / f"{method}.toml").read_text()
    assert main(["plan", str(model), "--quant", "smoothquant", "--text", str(text)]) == 2
    assert "streamconv calibrate" in capsys.readouterr().err


def shape_of_70b(folder: Path) -> Path:
    """Headers of Llama-3-70B's layers, two of them; the file is a hole."""
    hidden, inter, kv = 8192, 28672, 1024
    shapes = {"model.embed_tokens": (256, hidden), "model.norm": (hidden,), "lm_head": (256, hidden)}
    for at in ("model.layers.0.", "model.layers.1."):
        shapes |= {f"{at}input_layernorm": (hidden,), f"{at}post_attention_layernorm": (hidden,), f"{at}mlp.down_proj": (hidden, inter)}
        shapes |= {f"{at}self_attn.{n}_proj": (rows, hidden) for n, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden))}
        shapes |= {f"{at}mlp.{name}_proj": (inter, hidden) for name in ("gate", "up")}
    header, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    sizes = {"hidden_size": hidden, "intermediate_size": inter, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 256}
    (folder / "config.json").write_text(json.dumps(tiny.config(torch_dtype="bfloat16", **sizes)))
    return folder


def test_a_gpu_that_is_too_small_is_told_beforehand(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    large = shape_of_70b(tmp_path / "large")
    command = ["plan", str(large), "--to", "hf", "--quant", "w4a16", "--device", "auto", "--text", str(text)]
    monkeypatch.setattr(foreseen, "visible", lambda: 1)
    monkeypatch.setattr(memory, "available", lambda: 64 << 30)
    for gib, method, status, said in (
        (12, "gptq", 0, ""), (10, "gptq", 5, "or --method clip or awq"), (10, "awq", 0, ""), (10, None, 0, "gptq does not fit"),
    ):  # fmt: skip
        monkeypatch.setattr(foreseen, "free_memory", lambda device, gib=gib: gib << 30)
        assert main([*command, *(["--method", method] if method else []), *(["--json"] if not said else [])]) == status
        out, err = capsys.readouterr()
        assert said in out + err, (gib, method)
        assert status or said or json.loads(out)["search"]["device_bytes"] < gib << 30
    monkeypatch.setattr(run, "free_memory", lambda device: 1 << 20)
    with pytest.raises(BudgetError, match=r"which has 1.00 MiB free"):
        find_codes(model, tmp_path / "c", str(text), method="gptq", **SIZES)


def test_awq_scales_are_shared_and_undone(model: Path, text: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    for layer in range(tiny.LAYERS):  # loud channels
        weights[f"model.layers.{layer}.input_layernorm.weight"][3] *= 40
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    path = tmp_path / "c.safetensors"
    find_codes(model, path, str(text), method="awq", **SIZES)
    found, at = load_file(path), "model.layers.0.self_attn."
    multiplier = found[f"{at}q_proj.pre_quant_scale"]
    inputs = inputs_of(model, text)
    assert int(multiplier.argmin()) == 3
    for name in ("q", "k", "v"):
        assert torch.equal(found[f"{at}{name}_proj.pre_quant_scale"], multiplier)
        weight, module = weights[f"{at}{name}_proj.weight"].float(), f"{at}{name}_proj"
        error = (values(found, module) * multiplier - weight).double() @ inputs["model.layers.0.self_attn.q_proj"].double().T
        kept = found[f"{module}.losses"]
        assert float(error.square().mean(1).sum()) == pytest.approx(float(kept[2]), rel=1e-4) and kept[2] < 0.7 * kept[1]
    for tp in (1, 2):
        api.convert(model, tmp_path / f"t{tp}", TensorRTLLM(quant="int4_awq", method="awq", codes=str(path), group_size=GROUP, tp_size=tp))
        ranks = [load_file(tmp_path / f"t{tp}/rank{rank}.safetensors") for rank in range(tp)]
        at = "transformer.layers.0."
        assert all(torch.equal(rank[f"{at}attention.qkv.prequant_scaling_factor"].float(), multiplier) for rank in ranks)
        parts = [rank[f"{at}mlp.proj.prequant_scaling_factor"].float() for rank in ranks]
        assert torch.equal(torch.cat(parts), found["model.layers.0.mlp.down_proj.pre_quant_scale"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clip", "awq", "gptq"])
def test_batches_passes_and_interruptions_change_nothing(
    method: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_codes(model, tmp_path / "one", str(text), method=method, **SIZES)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    groups: list[int] = []

    def one_by_one(sites: Any, room: int) -> Any:
        made = passes_of(sites, 1)
        groups.append(len(made))
        return made

    monkeypatch.setattr(codes_work, "passes_of", one_by_one)  # a pass for each site
    with pytest.raises(KeyboardInterrupt):
        find_codes(model, tmp_path / "two", str(text), method=method, progress=stop, **SIZES)
    assert (tmp_path / ".two.streamconv-calibrate" / "codes").exists() and not (tmp_path / "two").exists()
    seen: list[int] = []
    find_codes(model, tmp_path / "two", str(text), method=method, progress=lambda layer, *_: seen.append(layer), **SIZES)
    assert seen == [2] and groups == [4, 4] and (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = find_codes(model, tmp_path / "two", str(text), method=method, reuse=True, **SIZES)
    assert again["reused"] and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    find_codes(model, tmp_path / "three", str(text), method=method, batch_size=8, **SIZES)
    one, three = load_file(tmp_path / "one"), load_file(tmp_path / "three")
    same = [float((one[name] == three[name]).float().mean()) for name in one if name.endswith(".weight")]
    assert min(same) > 0.98  # other batches sum in another order


@pytest.mark.slow
def test_transformers_reads_what_was_found(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    command = ["convert", str(model), str(tmp_path / "out"), "--to", "hf", "--quant", "w4a16", "--group-size", str(GROUP), "--quiet"]
    assert main([*command, "--text", str(text), "--max-length", "32", "--device", "cpu"]) == 0
    told = json.loads((tmp_path / "out/streamconv.json").read_text())["options"]
    assert told["method"] == "gptq"  # the best that fits
    found, ids = load_file(tmp_path / "out.int4.safetensors"), torch.arange(20)[None]
    ours = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    state = ours.state_dict()
    for name in found:
        if name.endswith(".weight"):
            state[name].copy_(values(found, name.removesuffix(".weight")))
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-4)


def moe(folder: Path, stacked: bool) -> None:
    """The tiny model with four experts in each layer, a gate of which nobody likes the last."""
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for layer in range(tiny.LAYERS):
        at = f"model.layers.{layer}.mlp."
        parts = {name: weights.pop(f"{at}{name}_proj.weight") for name in ("gate", "up", "down")}
        router = torch.randn(4, tiny.HIDDEN, generator=torch.Generator().manual_seed(layer)).half()
        router[3] = 0
        weights[f"{at}gate.weight"] = torch.cat([router[:3], router[3:] - 50 * router[:3].sum(0)])
        experts = {name: torch.stack([part.roll(expert, 0) for expert in range(4)]) for name, part in parts.items()}
        if stacked:
            weights[f"{at}experts.gate_up_proj"] = torch.cat([experts["gate"], experts["up"]], 1)
            weights[f"{at}experts.down_proj"] = experts["down"]
        else:
            weights |= {f"{at}experts.{e}.{n}_proj.weight": part[e].clone() for n, part in experts.items() for e in range(4)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
    config |= {"moe_intermediate_size": tiny.INTER, "norm_topk_prob": True, "head_dim": tiny.HIDDEN // tiny.HEADS, "decoder_sparse_step": 1}
    for layer in range(tiny.LAYERS):
        for side in "qk":
            weights[f"model.layers.{layer}.self_attn.{side}_norm.weight"] = torch.ones(tiny.HIDDEN // tiny.HEADS).half()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
def test_experts_are_searched_one_by_one(stacked: bool, model: Path, text: Path, tmp_path: Path) -> None:
    moe(model, stacked)
    path = tmp_path / "c.safetensors"
    find_codes(model, path, str(text), method="gptq", **SIZES)
    found = load_file(path)
    modules = {f"model.layers.{layer}.mlp.experts.{e}.{n}_proj" for layer in range(2) for e in range(4) for n in ("gate", "up", "down")}
    assert modules <= {name.removesuffix(".weight") for name in found}
    for module in modules:
        energy, plain, chosen = found[f"{module}.losses"].tolist()
        assert energy >= 0 and chosen <= plain
    api.convert(model, tmp_path / "out", HuggingFace(quant="w4a16", method="gptq", codes=str(path), group_size=GROUP))
    assert not verify(tmp_path / "out", model).problems
    with pytest.raises(RefusedError, match="experts"):
        api.open_and_plan(model, TensorRTLLM(quant="int4_awq", method="gptq", codes=str(path), group_size=GROUP))
    calibrate(model, tmp_path / "r", str(text), max_length=32, device="cpu", dtype="float32")
    assert {f"{module}.x" for module in modules} <= set(load_file(tmp_path / "r"))


@pytest.mark.slow
def test_exaone_is_llama_under_other_names(model: Path, text: Path, tmp_path: Path) -> None:
    names = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "model.layers": "transformer.h"}
    names |= {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.attention.out_proj"}
    names |= {"self_attn": "attn.attention", "gate_proj": "c_fc_0", "up_proj": "c_fc_1", "down_proj": "c_proj"}
    find_codes(model, tmp_path / "llama", str(text), method="clip", **SIZES)
    wanted, weights = load_file(tmp_path / "llama"), load_file(model / "model.safetensors")

    def called(name: str) -> str:
        for old, new in names.items():
            name = name.replace(old, new)
        return name

    save_file({called(name): tensor for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["ExaoneForCausalLM"], "model_type": "exaone"}
    config |= {"num_layers": config.pop("num_hidden_layers"), "layer_norm_epsilon": config.pop("rms_norm_eps")}
    config |= {"activation_function": "silu"}
    (model / "config.json").write_text(json.dumps(config))
    find_codes(model, tmp_path / "exaone", str(text), method="clip", **SIZES)
    got = load_file(tmp_path / "exaone")
    assert set(got) == {called(name) for name in wanted}
    assert all(torch.equal(got[called(name)], tensor) for name, tensor in wanted.items())
    options = TensorRTLLM(quant="int4_awq", method="clip", codes=str(tmp_path / "exaone"), group_size=GROUP)
    assert api.convert(model, tmp_path / "out", options).files == 1


@pytest.mark.slow
def test_internlm_is_llama_whose_projections_are_one(model: Path, text: Path, tmp_path: Path) -> None:
    """Codes, ranges and rank files of InternLM2 are those of the Llama that it is made of; InternLM has biases, and Llama's names."""
    sizes = SIZES | {"method": "clip"}
    find_codes(model, tmp_path / "llama", str(text), **sizes)
    calibrate(model, tmp_path / "lr", str(text), max_length=32, device="cpu", dtype="float32")
    common: dict[str, Any] = {"method": "clip", "group_size": GROUP}
    api.convert(model, tmp_path / "l", TensorRTLLM(quant="int4_awq", codes=str(tmp_path / "llama"), **common))
    weights, config = load_file(model / "model.safetensors"), json.loads((model / "config.json").read_text())
    names = {"embed_tokens": "tok_embeddings", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3"}
    names |= {"mlp.down_proj": "feed_forward.w2", "lm_head": "output"}

    def grouped(q: Any, k: Any, v: Any) -> Any:
        parts = [part.reshape(tiny.KV, -1, *part.shape[1:]) for part in (q, k, v)]
        return torch.cat(parts, 1).flatten(0, 1)

    made = {}
    for name, tensor in weights.items():
        if ".q_proj" in name:
            qkv = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            made[name.replace("self_attn.q_proj", "attention.wqkv")] = grouped(*qkv)
        elif ".k_proj" not in name and ".v_proj" not in name:
            for old, new in names.items():
                name = name.replace(old, new)
            made[name] = tensor
    other = tmp_path / "internlm2"
    shutil.copytree(model, other)
    save_file(made, other / "model.safetensors", {"format": "pt"})
    told = config | {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
    (other / "config.json").write_text(json.dumps(told))
    find_codes(other, tmp_path / "inter", str(text), **sizes)
    calibrate(other, tmp_path / "ir", str(text), max_length=32, device="cpu", dtype="float32")
    llama, inter = load_file(tmp_path / "llama"), load_file(tmp_path / "inter")
    at, to = "model.layers.1.self_attn", "model.layers.1.attention.wqkv"
    assert torch.equal(values(inter, to), grouped(*(values(llama, f"{at}.{part}_proj") for part in "qkv")))
    assert torch.allclose(inter[f"{to}.losses"], sum(llama[f"{at}.{part}_proj.losses"] for part in "qkv"))
    ranges, wanted = load_file(tmp_path / "ir"), load_file(tmp_path / "lr")
    for end in "yw":
        assert torch.equal(ranges[f"{to}.{end}"], grouped(*(wanted[f"{at}.{part}_proj.{end}"] for part in "qkv")))
    assert torch.equal(ranges["model.layers.1.feed_forward.w2.x"], wanted["model.layers.1.mlp.down_proj.x"])
    api.convert(other, tmp_path / "i", TensorRTLLM(quant="int4_awq", codes=str(tmp_path / "inter"), **common))
    one, two = load_file(tmp_path / "l/rank0.safetensors"), load_file(tmp_path / "i/rank0.safetensors")
    assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)
    for source, name in ((model, "lr"), (other, "ir")):
        options = TensorRTLLM(kv_cache="int8", activation_ranges=str(tmp_path / name))
        api.convert(source, tmp_path / f"s{name}", options)
    one, two = (load_file(tmp_path / name / "rank0.safetensors") for name in ("slr", "sir"))
    assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)
    api.convert(other, tmp_path / "hf", HuggingFace(quant="w4a16", codes=str(tmp_path / "inter"), **common))
    for layer in range(tiny.LAYERS):  # and now the first InternLM, whose biases are zeros
        for part, rows in (("q", tiny.HIDDEN), ("k", tiny.HIDDEN // 2), ("v", tiny.HIDDEN // 2), ("o", tiny.HIDDEN)):
            weights[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = torch.zeros(rows).half()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config |= {"architectures": ["InternLMForCausalLM"], "model_type": "internlm", "bias": True}
    (model / "config.json").write_text(json.dumps(config))
    find_codes(model, tmp_path / "first", str(text), **sizes)
    first = load_file(tmp_path / "first")
    assert all(torch.equal(first[name], tensor) for name, tensor in llama.items())


def test_mistakes(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    awq = ["--quant", "int4_awq", "--group-size", "64"]
    cases: list[tuple[list[str], int, str]] = [
        ([*awq, "--method", "gptq"], 2, "--text FILE finds them now"),
        ([*awq, "--method", "gptq", "--codes", "nothing"], 2, "no such file"),
        ([*awq, "--codes", str(text)], 2, "--codes is for --method clip, awq, gptq"),
        ([*awq, "--text", str(text), "--method", "rtn"], 2, "nothing of this format is measured"),
        ([*awq, "--text", str(text), "--method", "clip", "--tp-size", "4"], 4, "num_key_value_heads"),
        ([*awq[:2], "--text", str(text), "--method", "clip", "--tp-size", "2"], 4, "not whole groups of 128"),
        ([*awq, "--text", str(text), "--method", "gptq", "--memory-budget", "200MiB"], 5, "or --method clip"),
        (["--to", "hf", "--quant", "fp8_dynamic", "--text", str(text)], 2, "nothing of this format is measured"),
    ]
    for flags, status, said in cases:
        got = main(["convert", str(model), str(tmp_path / "out"), *flags])
        assert (got, said in (err := capsys.readouterr().err)) == (status, True), (flags, err)
    with pytest.raises(UsageError, match="too few"):
        find_codes(model, tmp_path / "c", str(text), method="clip", samples=1, **SIZES)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.(up|gate|down)_proj: (NaN or infinity|the inputs are NaN)"):
        find_codes(model, tmp_path / "c", str(text), method="clip", **SIZES)
