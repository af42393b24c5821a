"""--verify inline: what is written was decoded first, and a codec that is wrong stops the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamconv import api
from streamconv.checkpoint.dtypes import DTYPES
from streamconv.cli.main import main
from streamconv.errors import StreamconvError, VerifyError
from streamconv.options import Resources
from streamconv.progress import Meter
from streamconv.quants.base import EncodeStats
from streamconv.quants.weight_only import WeightOnly
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny

INLINE = Resources(verify_inline=True, tile_rows=32)
INT8 = TensorRTLLM(quant="int8", target_sm=80, tp_size=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("inline") / "model")


def snr(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((folder / "streamconv.json").read_text())["snr"]
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["sm80", "sm70", "sm90-0.16", "sm90"])
@pytest.mark.parametrize(("source", "model_dtype"), [("BF16", "BF16"), ("F16", "F16"), ("F32", "F16"), ("F32", "F32"), ("F16", "BF16")])
def test_the_kernel_sees_what_decoding_sees(bits: int, family: str, source: str, model_dtype: str) -> None:
    """Sums of the fused kernel against the definition, and every single bit that flips in a code."""
    encoding, rows, cols = WeightOnly(bits, family, DTYPES[model_dtype]), 8, 256
    weights = (torch.randn(rows, cols, generator=torch.Generator().manual_seed(3)) * 0.02).to(getattr(torch, DTYPES[source].torch))
    weights[3], weights[5, 7], weights[6, 9] = 0, float("inf"), float("nan")
    parts = encoding.encode(weights, EncodeStats())
    fine = torch.isfinite(weights)
    want = torch.where(fine, weights.double(), 0.0)
    gap = torch.where(fine, encoding.decode(parts, rows, cols).double(), 0.0) - want
    flat = weights.reshape(-1).view(torch.uint8).numpy().view(DTYPES[source].storage)
    kernel = encoding.error_kernel(DTYPES[source])
    assert kernel is not None
    found = kernel(flat, 0, cols, rows, cols, [part.numpy() for part in parts])
    sums = (found.noise, found.signal, found.largest, found.peak)
    assert sums == pytest.approx((float((gap**2).sum()), float((want**2).sum()), float(gap.abs().max()), float(want.abs().max())), rel=1e-4)
    assert found.wrong == 0
    for at in range(0, parts[0].numel(), 97):
        broken = parts[0].clone()
        broken[at] ^= 1 << (bits - 1)
        moved = (encoding.decode((broken, parts[1]), rows, cols) - encoding.decode(parts, rows, cols)).abs()
        wrong = int((torch.where(fine, moved, 0.0).amax(1) > 0).sum())
        assert kernel(flat, 0, cols, rows, cols, [broken.numpy(), parts[1].numpy()]).wrong == wrong


def test_the_bytes_are_the_same_and_the_manifest_knows_more(model: Path, tmp_path: Path) -> None:
    """SNR per tensor, against a computation of its own from the bytes of the output and of the source."""
    report = api.convert(model, tmp_path / "inline", INT8, INLINE)
    api.convert(model, tmp_path / "plain", INT8)
    for rank in range(2):
        name = f"rank{rank}.safetensors"
        assert (tmp_path / "inline" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    told = snr(tmp_path / "inline")
    from safetensors.numpy import load_file

    held, source = load_file(tmp_path / "inline" / "rank0.safetensors"), tiny.tensors()["model.layers.1.mlp.gate_proj.weight"]
    name = "transformer.layers.1.mlp.fc"  # NVIDIA's name of gate_proj
    weight = held[f"{name}.weight"]
    encoding = WeightOnly(8, "sm80", DTYPES["F16"])
    rows = source.shape[0] // 2
    parts = [torch.from_numpy(weight).reshape(-1).view(torch.uint8), torch.from_numpy(held[f"{name}.per_channel_scale"]).view(torch.uint8)]
    gap = encoding.decode(parts, rows, source.shape[1]).double().numpy() - source[:rows].astype(np.float64)
    expected = 10 * math.log10(float((source[:rows].astype(np.float64) ** 2).sum()) / float((gap**2).sum()))
    assert told["rank0.safetensors"][f"{name}.weight"] == pytest.approx(expected, abs=0.01)
    assert {error.name for error in report.outputs[0].errors} == set(told["rank0.safetensors"])
    assert "snr" not in json.loads((tmp_path / "plain" / "streamconv.json").read_text())
    assert main(["verify", str(tmp_path / "inline"), "--source", str(model), "--quiet"]) == 0


@pytest.mark.parametrize("target", [HuggingFace(quant="nvfp4a16"), HuggingFace(quant="fp8_dynamic"), TensorRTLLM(dtype="bfloat16")])
def test_other_formats(model: Path, tmp_path: Path, target: Any) -> None:
    """Whatever the tiles, the manifest is the same."""
    made = []
    for number, rows in enumerate((None, 16)):
        api.convert(model, tmp_path / f"out{number}", target, Resources(verify_inline=True, tile_rows=rows))
        made.append((tmp_path / f"out{number}" / "streamconv.json").read_bytes())
    values = [value for file in snr(tmp_path / "out0").values() for value in file.values()]
    assert made[0] == made[1] and all(value == "exact" or value > 10 for value in values) and any(value != "exact" for value in values)


def test_a_codec_that_is_broken_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One code of one row, in a kernel; without the check the run ends well."""
    from streamconv.quants import weight_only

    real = weight_only.fused

    def broken(*of: Any) -> Any:
        kernel = real(*of)

        def run(*arguments: Any) -> EncodeStats:
            found = kernel(*arguments)
            arguments[-1][0][5] ^= 0x40
            return found

        return run

    monkeypatch.setattr(weight_only, "fused", broken)
    api.convert(model, tmp_path / "believed", INT8)
    with pytest.raises(VerifyError, match=r"transformer\.layers\.0\.\S+: decoded values are up to .* allows"):
        api.convert(model, tmp_path / "out", INT8, INLINE)
    assert not (tmp_path / "out").exists()


def test_a_torch_codec_that_is_broken_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamconv.quants.nvfp4 import NvFp4

    def broken(self: NvFp4, block: torch.Tensor, stats: EncodeStats) -> tuple[torch.Tensor, ...]:
        weight, *others = real(self, block, stats)
        return weight.roll(1), *others

    real = NvFp4.encode
    monkeypatch.setattr(NvFp4, "encode", broken)
    monkeypatch.setattr(NvFp4, "kernel", lambda self, source: None)
    with pytest.raises(VerifyError):
        api.convert(model, tmp_path / "out", HuggingFace(quant="nvfp4a16"), INLINE)


def test_min_snr(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert = ["convert", str(model), str(tmp_path / "out"), "--quant", "int8", "--target-sm", "80", "--quiet"]
    assert main([*convert, "--min-snr", "30"]) == 2
    assert main([*convert, "--verify", "inline", "--min-snr", "60"]) == 7
    assert "below --min-snr 60" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*convert, "--verify", "inline", "--min-snr", "30"]) == 0


def test_a_resume_knows_what_was_found_and_looks_where_nobody_did(model: Path, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(now: Any) -> None:
        if now.phase == "syncing":
            raise Enough

    api.convert(model, tmp_path / "whole", INT8, INLINE)
    for before in (INLINE, Resources(tile_rows=32)):
        out = tmp_path / f"out{before.verify_inline}"
        with pytest.raises(Enough):
            api.convert(model, out, INT8, before, meter=Meter(stop))
        report = api.convert(model, out, INT8, INLINE)
        assert (report.resumed > 0) is before.verify_inline
        assert (out / "streamconv.json").read_bytes() == (tmp_path / "whole" / "streamconv.json").read_bytes()


def test_the_budget_counts_what_decoding_takes(model: Path, tmp_path: Path) -> None:
    with pytest.raises(StreamconvError, match="memory-budget"):
        api.convert(model, tmp_path / "out", HuggingFace(quant="nvfp4a16"), Resources(verify_inline=True, memory_budget=60 << 20))
