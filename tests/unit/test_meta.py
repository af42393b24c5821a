"""Meta folders and PyTorch shards as sources: any number of files, the same tensors and the same output."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamconv import api
from streamconv.checkpoint.index import open_index
from streamconv.checkpoint.source_tensors import SourceTensors
from streamconv.cli.convert_checkpoint import main
from streamconv.errors import CheckpointError, StreamconvError, TensorError
from streamconv.options import Resources
from streamconv.planning.plan import PLAIN_ROWS, RowRange
from streamconv.run.encode import read_rows
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.target import make_plan
from streamconv.verification.difference import compare
from tests import tiny

H, WIDTH, HEADS, KV, V, LAYERS = 64, 128, 4, 2, 80, 2
D = H // HEADS
PARAMS = {"dim": H, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV, "norm_eps": 1e-5, "vocab_size": V}


def weights() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (V, H), "norm.weight": (H,), "output.weight": (V, H)}
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        shapes |= {
            at + "attention.wq.weight": (H, H),
            at + "attention.wk.weight": (KV * D, H),
            at + "attention.wv.weight": (KV * D, H),
            at + "attention.wo.weight": (H, H),
            at + "feed_forward.w1.weight": (WIDTH, H),
            at + "feed_forward.w2.weight": (H, WIDTH),
            at + "feed_forward.w3.weight": (WIDTH, H),
            at + "attention_norm.weight": (H,),
            at + "ffn_norm.weight": (H,),
        }
    return {name: torch.randn(shape, generator=random).bfloat16() for name, shape in shapes.items()}


def cut(state: dict[str, torch.Tensor], files: int, tok_axis: int = 0) -> list[dict[str, torch.Tensor]]:
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(files)]
    for name, value in state.items():
        axis = tok_axis if name.startswith("tok") else int("wo." in name or "w2." in name)
        chunks = torch.chunk(value, files, axis) if value.dim() > 1 else [value] * files
        for part, chunk in zip(parts, chunks, strict=True):
            part[name] = chunk.clone()
    for part in parts:
        part["rope.freqs"] = torch.ones(D // 2)
    return parts


def write(
    folder: Path, files: int = 2, tok_axis: int = 0, state: dict[str, torch.Tensor] | None = None, **params: Any
) -> Path:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS | {"hidden_dim": WIDTH} | params))
    for number, part in enumerate(cut(state or weights(), files, tok_axis)):
        torch.save(part, str(folder / f"consolidated.{number:02d}.pth"))
    return folder


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor as the reader assembles it, read in odd tiles."""
    found = {}
    with open_index(folder) as index:
        for name, source in SourceTensors(index).items():
            row = source.cols * source.dtype.itemsize
            span = RowRange(source, 0, source.rows, PLAIN_ROWS, (), 1)
            out = bytearray()
            for start in range(0, source.rows, 7):
                stop = min(start + 7, source.rows)
                buffer = np.empty((stop - start) * row, np.uint8)
                out += bytes(read_rows(index.shards, span, start, stop, buffer, buffer[:0]))
            found[name] = torch.frombuffer(out, dtype=getattr(torch, source.dtype.torch)).reshape(source.shape)
    return found


def converted(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    rows = options.pop("tile_rows", None)
    api.convert(source, out, TensorRTLLM(**options), Resources(tile_rows=rows))
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix == ".safetensors"} | {
        "config": (out / "config.json").read_bytes()
    }


@pytest.mark.parametrize("tok_axis", [0, 1])
@pytest.mark.parametrize("files", [1, 2, 4])
def test_assembled(tmp_path: Path, files: int, tok_axis: int) -> None:
    found = whole(write(tmp_path / "m", files, tok_axis))
    expected = weights()
    assert set(found) == {*expected, "rope.freqs"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("options", [{}, {"tp_size": 2}, {"tp_size": 4}, {"tp_size": 2, "pp_size": 2}, {"quant": "int8"}])
def test_any_number_of_files_gives_the_same_bytes(tmp_path: Path, options: dict[str, Any]) -> None:
    """Four files cut the two KV heads in the middle: the rotary rows of a head come from two files."""
    if "quant" in options:
        options = options | {"target_sm": 80}
    reference = converted(write(tmp_path / "one", 1), tmp_path / "out1", **options)
    for files, tok_axis, rows in ((2, 0, None), (2, 1, 1), (4, 0, 3), (4, 1, None)):
        name = f"{files}-{tok_axis}"
        found = converted(write(tmp_path / name, files, tok_axis), tmp_path / f"out{name}", tile_rows=rows, **options)
        assert found == reference


def test_same_as_hugging_face(tmp_path: Path) -> None:
    """The rotary rows turned by hand as transformers' own conversion turns them, the rest renamed."""
    names = {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {}
    for name, value in weights().items():
        if name.endswith(("wq.weight", "wk.weight")):
            value = value.view(-1, D // 2, 2, H).transpose(1, 2).reshape(-1, H).contiguous()
        stem = name.removesuffix(".weight")
        layer = ""
        if stem.startswith("layers."):
            _, number, stem = stem.split(".", 2)
            layer = f"model.layers.{number}."
        state[layer + names[stem] + ".weight"] = value
    hf = tmp_path / "hf"
    hf.mkdir()
    save_file(state, hf / "model.safetensors")
    sizes = {"hidden_size": H, "intermediate_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV}
    settings = tiny.config(**sizes, vocab_size=V, num_hidden_layers=LAYERS, torch_dtype="bfloat16")
    (hf / "config.json").write_text(json.dumps(settings))
    left = converted(hf, tmp_path / "a", tp_size=2, rope_tables=False)
    right = converted(write(tmp_path / "m", 2), tmp_path / "b", tp_size=2, rope_tables=False)
    assert left.keys() == right.keys()
    assert all(left[name] == right[name] for name in left if name != "config")
    assert compare(str(tmp_path / "m"), str(hf)).within()


def test_split_folders(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", 2)
    for number in range(2):
        file = folder / f"consolidated.{number:02d}.pth"
        state = torch.load(str(file), weights_only=True)
        file.unlink()
        inner = folder / f"consolidated.{number:02d}"
        inner.mkdir()
        items = list(state.items())
        for part, some in enumerate((items[:5], items[5:])):
            torch.save(dict(some), str(inner / f"consolidated-{part:05d}.pth"))
    found = whole(folder)
    assert all(torch.equal(found[name], value) for name, value in weights().items())
    inner = folder / "consolidated.00"
    (inner / "consolidated-again.pth").write_bytes((inner / "consolidated-00000.pth").read_bytes())
    with pytest.raises(TensorError, match=r"in two files of consolidated\.00"):
        open_index(folder)


def test_tokens_stated_nowhere(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", 2, 1, vocab_size=-1)
    converted(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == V
    assert load_file(tmp_path / "out" / "rank0.safetensors")["lm_head.weight"].shape == (V, H)


def break_file(folder: Path, change: Any) -> Path:
    file = folder / "consolidated.01.pth"
    state = torch.load(str(file), weights_only=True)
    change(state)
    torch.save(state, str(file))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), r"norm\.weight is not in consolidated\.01"),
        (lambda s: s.update(extra=torch.ones(1)), r"extra is not in consolidated\.00"),
        (lambda s: s.update({"norm.weight": torch.ones(H // 2)}), r"norm\.weight: F32 \[32\] in consolidated\.01"),
        (lambda s: s.update({"output.weight": s["output.weight"].float()}), r"output\.weight: F32"),
        (lambda s: s.update({"output.weight": torch.ones(40, 8).bfloat16()}), r"output\.weight: BF16 \[40, 8\]"),
        (lambda s: s.update({"output.weight": torch.ones(40).bfloat16()}), r"output\.weight: BF16 \[40\]"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(TensorError, match=message):
        open_index(break_file(write(tmp_path / "m"), change))


def test_files_that_are_no_parts_of_one_checkpoint(tmp_path: Path) -> None:
    """A copy of another part, a part of another model, exchanged files."""
    folder = write(tmp_path / "in", 4)
    paths = [folder / f"consolidated.{number:02d}.pth" for number in range(4)]
    right = [path.read_bytes() for path in paths]
    paths[2].write_bytes(right[1])
    with pytest.raises(CheckpointError, match=r"consolidated\.02\.pth holds the weights of consolidated\.01\.pth"):
        open_index(folder)
    paths[1].write_bytes(right[2])
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth was saved as consolidated\.02\.pth"):
        open_index(folder)
    paths[1].write_bytes(right[1])
    part = torch.load(io.BytesIO(right[2]))
    part["layers.1.ffn_norm.weight"][3] += 1
    torch.save(part, paths[2])
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn_norm\.weight differs between .*00.* and .*02"):
        open_index(folder)


def test_unknown_and_missing_tensors_are_named(tmp_path: Path) -> None:
    state = weights()
    state["layers.0.feed_forward.gate.weight"] = torch.ones(4, H).bfloat16()
    state["layers.0.attention.wq.qweight"] = torch.ones(4, H).int()
    del state["layers.1.attention.wo.weight"]
    with open_index(write(tmp_path / "m", state=state)) as index, pytest.raises(TensorError) as error:
        make_plan(index, TensorRTLLM())
    for part in ("layers.0.feed_forward.gate.weight", "wq.qweight", "missing tensor layers.1.attention.wo.weight"):
        assert part in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", 4)
    (folder / "consolidated.02.pth").unlink()
    with pytest.raises(CheckpointError, match=r"missing file consolidated\.02\.pth"):
        open_index(folder)
    (folder / "params.json").write_text("{}")
    (folder / "consolidated.03.pth").unlink()
    with pytest.raises(CheckpointError, match=r"params\.json: 'dim' is missing"):
        api.open_and_plan(folder, TensorRTLLM())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": "x"}, "rope_theta is 'x', not a number"),
        ({"norm_eps": float("nan")}, "norm_eps is nan, not a number"),
        ({"rope_scaling": [1]}, "rope_scaling is"),
        ({"n_kv_heads": "x"}, "a size is no number"),
        ({"dim": float("inf")}, "a size is no number"),
        ({"dim": 10**30}, "below 2"),
        ({"hidden_dim": -5}, "must be positive"),
        ({"n_layers": 10**9}, "says 1000000000 layers, but the source holds only"),
    ],
)
def test_bad_params(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        api.open_and_plan(write(tmp_path / "m", **change), TensorRTLLM())


def test_safetensors_of_that_name_are_not_meta(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    save_file(weights(), tmp_path / "consolidated.00.safetensors")
    with pytest.raises(CheckpointError, match=r"missing config\.json"):
        open_index(tmp_path)


def test_official_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "m")
    assert main(["--meta_ckpt_dir", str(folder), "--output_dir", str(tmp_path / "out"), "--tp_size", "2"]) == 0
    assert len(list((tmp_path / "out").glob("rank*.safetensors"))) == 2
    (folder / "config.json").write_text("{}")
    assert main(["--meta_ckpt_dir", str(folder), "--output_dir", str(tmp_path / "out2")]) == 2
    assert "holds a config.json" in capsys.readouterr().err


# ---- Hugging Face .bin


def hf_bin(folder: Path, files: int = 2) -> Path:
    folder.mkdir()
    state = {name: torch.from_numpy(value) for name, value in tiny.tensors().items()}
    names = list(state)
    weight_map: dict[str, str] = {}
    for number in range(files):
        file = f"pytorch_model-{number + 1:05d}-of-{files:05d}.bin" if files > 1 else "pytorch_model.bin"
        part = {name: state[name] for name in names[number::files]}
        torch.save(part, str(folder / file))
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(tiny.config()))
    return folder


@pytest.mark.parametrize("options", [{}, {"tp_size": 2}, {"quant": "int4", "target_sm": 80}])
def test_bin_is_the_same_as_safetensors(tmp_path: Path, options: dict[str, Any]) -> None:
    reference = converted(tiny.write(tmp_path / "st"), tmp_path / "a", **options)
    assert converted(hf_bin(tmp_path / "one", 1), tmp_path / "b", **options) == reference
    assert converted(hf_bin(tmp_path / "three", 3), tmp_path / "c", **options) == reference
    one = tmp_path / "one" / "pytorch_model.bin"
    assert converted(one, tmp_path / "d", **options) == reference


def test_safetensors_come_first(tmp_path: Path) -> None:
    folder = hf_bin(tmp_path / "m", 2)
    tiny.write(folder)
    with open_index(folder) as index:
        assert [shard.path.name for shard in index.shards] == ["model.safetensors"]


def test_bin_shards_are_held_to_the_index_file(tmp_path: Path) -> None:
    folder = hf_bin(tmp_path / "m", 2)
    first, second = sorted(folder.glob("*.bin"))
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(TensorError, match="the index file places it in"):
        open_index(folder)
    second.unlink()
    with pytest.raises(CheckpointError, match="missing file pytorch_model-00002"):
        open_index(folder)
    second.write_bytes(kept)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        open_index(folder)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "config.json"}}))
    with pytest.raises(CheckpointError, match=r"not a \.bin file"):
        open_index(folder)


def test_a_changed_pickle_is_another_source(tmp_path: Path) -> None:
    """The fingerprint that a resume compares covers the directory and the pickle."""
    folder = hf_bin(tmp_path / "m", 1)
    _, plan = api.open_and_plan(folder, TensorRTLLM())
    file = folder / "pytorch_model.bin"
    state = torch.load(str(file), weights_only=True)
    torch.save(dict(reversed(state.items())), str(file))
    _, other = api.open_and_plan(folder, TensorRTLLM())
    assert plan.fingerprint() != other.fingerprint()
    assert [source.name for source in plan.sources] == ["pytorch_model.bin"]


def test_errors_are_typed(tmp_path: Path) -> None:
    folder = hf_bin(tmp_path / "m", 1)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(StreamconvError, match=r"pytorch_model\.bin is not a whole zip"):
        api.open_and_plan(folder, TensorRTLLM())


@pytest.mark.parametrize("stored", ["float16", "float32", "bfloat16"])
def test_fp8_rows_are_rounded_to_the_model_dtype_first(tmp_path: Path, stored: str) -> None:
    """The loader of Meta's files casts every weight before it quantizes; the definition, by hand."""
    state = {name: (value.float() * 1.0009765625).to(getattr(torch, stored)) for name, value in weights().items()}
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS | {"hidden_dim": WIDTH, "n_layers": 3}))
    for name, value in list(state.items()):  # a layer more: the first and the last are not quantized
        if name.startswith("layers.1."):
            state[name.replace("layers.1.", "layers.2.")] = value
    torch.save(state, str(folder / "consolidated.00.pth"))
    out = tmp_path / "out"
    api.convert(folder, out, TensorRTLLM(quant="fp8_rowwise", use_meta_fp8_rowwise_recipe=True, dtype="bfloat16"))
    made = load_file(out / "rank0.safetensors")
    for ours, theirs in (("fc", "w1"), ("gate", "w3"), ("proj", "w2")):
        value = state[f"layers.1.feed_forward.{theirs}.weight"].bfloat16().float().clamp(-1200, 1200)
        scale = (value.abs().amax(1) / 448).clamp(min=1 / (448 * 512))
        want = (value / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(made[f"transformer.layers.1.mlp.{ours}.per_channel_scale"], scale)
        assert torch.equal(made[f"transformer.layers.1.mlp.{ours}.weight"].view(torch.uint8), want.view(torch.uint8))
