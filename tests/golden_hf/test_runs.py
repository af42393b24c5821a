"""The bytes are the same for any tiles, workers and budget, through the ring of a device, and after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamconv import api, device, memory
from streamconv.device import choice
from streamconv.options import Resources
from streamconv.run.manifest import NAME
from streamconv.targets.hf.target import HuggingFace
from tests.crash.disks import Counting, Killed, Killing
from tests.crash.world import no_thread, snapshot
from tests.golden_hf import cases
from tests.golden_hf.cases import Case, check
from tests.golden_hf.conftest import Models, convert
from tests.stand_in import StandIn

CASES = cases.load()
VARIED = [CASES[name] for name in (
    "ct_llama_scatter_fp8dyn", "ct_odd192_fp8block", "ct_odd200_int8", "ct_llama_f16_w4a16", "ct_qwen3_moe_stacked_w8a16",
    "ct_llama_tied_f32_nvfp4a16", "os_qwen3_moe_nvfp4a16", "ct_qwen2_bias_mxfp4", "ct_zero_expert_mxfp8",
    "mo_micro_fp8pbwo", "mo_odd200_fp8pbwo", "mo_micro_fp8pcpt", "mo_llama_f16_int4wo", "mo_micro_int8wo", "mo_micro_mxfp8",
    "mo_qwen3_moe_w4a16nvfp4", "tf_qwen3_dense_fp8block", "ct_deepseek_fp8src_deq_fp8dyn", "ct_llama_fp8even_deq_nvfp4a16",
    "cv_deepseek_fp8src_float16", "cv_deq_llama_gqa_w4a16", "cv_deq_llama_gqa_nvfp4a16", "f32_mixtral_int8",
)]  # fmt: skip
"""Each format in each container; tiles with partial edges, partners in several files, stacked experts, sources that are decoded."""


def target(case: Case) -> HuggingFace:
    """The options of a case's command line."""
    flags = dict(zip(case.arguments[::2], case.arguments[1::2], strict=True))
    return HuggingFace(**{flag.removeprefix("--"): value for flag, value in flags.items()})  # type: ignore[arg-type]


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_small_tiles_and_many_workers(case: Case, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.source(case)
    monkeypatch.setenv("STREAMCONV_TILE_ROWS", "5")
    convert(case, source, tmp_path / "out", "--workers", "8")
    check(case, source, tmp_path / "out")


@pytest.mark.parametrize("case", VARIED[::4], ids=str)
def test_two_runs_give_the_same_folder(case: Case, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: side files and the manifest too."""
    source = models.source(case)
    convert(case, source, tmp_path / "one", "--workers", "1", "--memory-budget", "4GiB")
    monkeypatch.setattr(memory, "resident", lambda: 100 * memory.MIB)
    convert(case, source, tmp_path / "two", "--workers", "3", "--memory-budget", "300MiB")
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    del one[NAME], two[NAME]  # which tells of the run
    assert one == two


@pytest.mark.parametrize("case", VARIED, ids=str)
def test_on_a_device(case: Case, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With threads in its place: the torch definitions, tile by tile, in any order."""
    source = models.source(case)
    made: list[StandIn] = []

    def opened(name: str) -> StandIn:
        made.append(StandIn(delay=lambda n: 0.001 * (n % 3), name=name))
        return made[-1]

    monkeypatch.setenv("STREAMCONV_TILE_ROWS", "128")
    monkeypatch.setattr(choice, "visible", lambda: 1)
    monkeypatch.setattr(device, "Cuda", opened)
    convert(case, source, tmp_path / "out", "--device", "cuda", "--memory-budget", str(memory.resident() + memory.GIB), "--workers", "3")
    check(case, source, tmp_path / "out")
    assert len(made) == 1 and (made[0].kernels > 0 or case.arguments[1] == "none")


@pytest.mark.parametrize("name", ["mo_micro_fp8pbwo", "ct_zero_expert_mxfp8", "ct_llama_fp8even_deq_nvfp4a16"])
def test_after_a_kill(name: str, models: Models, tmp_path: Path) -> None:
    """Killed at six operations from the first tile to the last file; the second run takes over what was finished."""
    case, out = CASES[name], tmp_path / "out"
    source = models.source(case)
    resources = Resources(memory_budget=4 << 30, workers=1, device="cpu", tile_rows=64)

    def die() -> None:
        raise Killed

    with no_thread(0):
        whole = Counting()
        api.convert(source, tmp_path / "whole", target(case), resources, disk=whole)
        resumed = 0
        for part in range(1, 7):
            disk = Killing(whole.count * part // 7, die)
            with pytest.raises(Killed):
                api.convert(source, out, target(case), resources, disk=disk)
            disk.bury()
            assert not (out / "config.json").exists()
            resumed += api.convert(source, out, target(case), resources).resumed
            assert snapshot(out) == snapshot(tmp_path / "whole")
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
    assert resumed
    check(case, source, tmp_path / "whole")
