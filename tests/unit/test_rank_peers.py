"""Rank files that are not of one conversion: copies, exchanged ones, and those of other weights, formats and models."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import streamconv
from streamconv import HuggingFace, Resources, TensorRTLLM
from streamconv.errors import CheckpointError
from streamconv.targets.trtllm import rank_peers
from tests import tiny
from tests.golden import cases

CPU = Resources(device="cpu", workers=1)
CUT = re.compile(r".*(qkv|dense|fc|gate|proj|lm_head)\.weight|.*(qkv\.bias|smoother)")


@pytest.mark.parametrize("case", [case for case in cases.every() if len(case.files) > 1], ids=str)
def test_every_golden_conversion_of_nvidia_is_one(case: cases.Case) -> None:
    """What is taken for alike is so in all of them, whatever is cut differs."""
    files = {file: tuple(what["tensors"]) for file, what in case.files.items()}

    def digest(file: str, tensor: str) -> str:
        return str(case.files[file]["tensors"][tensor][2])

    assert list(rank_peers.problems(case.config, files, digest)) == []
    tp = case.config["mapping"]["tp_size"]
    for file, other in [(f"rank{n}.safetensors", f"rank{n + 1}.safetensors") for n in range(len(files) - 1) if (n + 1) % tp]:

        def copied(name: str, tensor: str, file: str = file, other: str = other) -> str:
            return digest(file if name == other else name, tensor)

        told = list(rank_peers.problems(case.config, files | {other: files[file]}, copied))
        assert told and f"{file} and {other}" in told[-1]
        for tensor in filter(CUT.fullmatch, files[file]):
            assert digest(file, tensor) != digest(other, tensor), tensor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Conversions by what is different in them."""
    root = tmp_path_factory.mktemp("ranks")
    model, other = tiny.write(root / "model"), tiny.write(root / "other", tiny.tensors(seed=2))
    targets = {
        "fp8": (model, "fp8_rowwise", 2), "seed": (other, "fp8_rowwise", 2),
        "none": (model, "none", 2), "four": (model, "none", 4),
    }
    for name, (source, quant, tp) in targets.items():
        streamconv.convert(source, root / name, TensorRTLLM(tp_size=tp, quant=quant), resources=CPU)
    return {name: root / name for name in targets}


ATTACKS = {
    "copy of the first": [("fp8", 0, 1)],
    "copy of the second": [("fp8", 1, 0)],
    "exchanged": [("fp8", 0, 1), ("fp8", 1, 0)],
    "other weights": [("seed", 1, 1)],
    "other weights, first": [("seed", 0, 0)],
    "another format": [("none", 1, 1)],
    "cut in another way": [("four", 1, 1)],
}
"""(conversion, its rank, rank that it is put in the place of)."""


TRIED = [(attack, recorded) for attack in ATTACKS for recorded in (True, False) if recorded or attack != "exchanged"]
"""Without a manifest nothing in the files tells the order of two ranks."""


@pytest.mark.parametrize(("attack", "recorded"), TRIED)
def test_a_rank_that_does_not_belong_there(attack: str, recorded: bool, made: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["fp8"], tmp_path / "ranks"))
    for conversion, rank, place in ATTACKS[attack]:
        shutil.copyfile(made[conversion] / f"rank{rank}.safetensors", folder / f"rank{place}.safetensors")
    if not recorded:
        (folder / "streamconv.json").unlink()
    for target in (TensorRTLLM(), HuggingFace()):
        with pytest.raises(CheckpointError, match=r"rank\d"):
            streamconv.convert(folder, tmp_path / "out", target, resources=CPU)
    with pytest.raises(CheckpointError, match=r"rank\d"):
        streamconv.open(folder)
    assert streamconv.verify(folder).problems
    assert not (tmp_path / "out").exists()


def test_ranks_of_equal_numbers_are_no_copies(tmp_path: Path) -> None:
    """Made-up weights, as for a benchmark."""
    model = tiny.write(tmp_path / "model", {name: value * 0 + 1 for name, value in tiny.tensors().items()})
    for quant, tp in (("none", 4), ("fp8_rowwise", 2)):
        streamconv.convert(model, tmp_path / quant, TensorRTLLM(tp_size=2, quant=quant), resources=CPU)
        for recorded in (True, False):
            streamconv.convert(tmp_path / quant, tmp_path / f"again-{quant}-{recorded}", TensorRTLLM(tp_size=tp), resources=CPU)
            (tmp_path / quant / "streamconv.json").unlink(missing_ok=True)
