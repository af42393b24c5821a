"""A source that streamconv wrote is held against its own streamconv.json: a byte that was changed ends the run before anything is made."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamconv
from streamconv import HuggingFace, Resources, TensorRTLLM, api
from streamconv.checkpoint.header import read_header
from streamconv.cli.main import main
from streamconv.errors import CheckpointError, OutputError
from streamconv.hub import open_stored
from streamconv.run import source_record
from streamconv.run.fs import Disk
from streamconv.targets.base import Target
from tests import tiny

CPU = Resources(device="cpu", workers=1)
SOURCES: dict[str, Target] = {
    "ranks": TensorRTLLM(tp_size=2),
    "int8": TensorRTLLM(tp_size=2, quant="int8", target_sm=80),
    "fp8_rowwise": TensorRTLLM(tp_size=2, quant="fp8_rowwise"),
    "directory": HuggingFace(),
    "w4a16": HuggingFace(quant="w4a16"),
    "fp8_block": HuggingFace(quant="fp8_block", format="hf"),
}

LONG = ("fp8_rowwise", "int8", "fp8_block")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    model = tiny.write(root / "model")
    for name, target in SOURCES.items():
        streamconv.convert(model, root / name, target, resources=CPU)
    return {name: root / name for name in SOURCES}


def _copy(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / "source"))


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _tensors(folder: Path) -> Iterator[tuple[Path, str, int, int]]:
    for path in sorted(folder.glob("*.safetensors")):
        for entry in read_header(path).tensors.values():
            yield path, entry.name, entry.begin, entry.end


def _large(folder: Path) -> tuple[Path, str, int, int]:
    return max(_tensors(folder), key=lambda tensor: tensor[3] - tensor[2])


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in SOURCES])
def test_a_flipped_bit_of_any_tensor_is_found(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(made[name], tmp_path)
    index = open_stored(folder)
    source_record.check(index)
    for path in sorted(folder.glob("*.safetensors")):
        tensors, whole = [held for held in _tensors(folder) if held[0] == path], path.read_bytes()
        for share in (0.0, 0.5, 1.0):
            for _, _, begin, end in tensors:
                _flip(path, begin + int(share * (end - begin - 1)))
            with pytest.raises(CheckpointError) as told:
                source_record.check(index)
            assert told.value.exit_status == 3
            assert [problem.split(": ")[1].split(" ")[0] for problem in told.value.problems] == [tensor for _, tensor, _, _ in tensors]
            path.write_bytes(whole)
    index.close()


@pytest.mark.parametrize("name", ["w4a16", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", [(), ("--parts", "2"), ("--part", "0/2")], ids=" ".join)
def test_convert_publishes_nothing(
    name: str, how: tuple[str, ...], made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _copy(made[name], tmp_path)
    path, tensor, begin, _ = _large(folder)
    _flip(path, begin)
    command = ["convert", str(folder), str(tmp_path / "out"), "--to", "hf", "--device", "cpu"]
    found = main([*command, *how])
    if how == ("--part", "0/2") and not found:  # the other part reads it
        found = main([*command, "--part", "1/2"])
    assert found == 3 and f"{path.name}: {tensor} " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_outputs_are_refused_together(made: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(made["ranks"], tmp_path)
    path, tensor, begin, _ = _large(folder)
    _flip(path, begin)
    outputs = TensorRTLLM(tp_size=4).to(tmp_path / "a"), HuggingFace(quant="fp8_dynamic").to(tmp_path / "b")
    with pytest.raises(CheckpointError, match=tensor):
        streamconv.convert(folder, *outputs, resources=CPU)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_a_header_and_a_file_that_nobody_told_of(made: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(made["directory"], tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F16"', b'"I16"', 1))
    with pytest.raises(CheckpointError, match="its header"):
        streamconv.convert(folder, tmp_path / "out", HuggingFace(), resources=CPU)
    path.rename(folder / "other.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        streamconv.convert(folder / "other.safetensors", tmp_path / "out", HuggingFace(), resources=CPU)


def test_a_resumed_run_looks_again(made: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(made["directory"], tmp_path)
    path, tensor, begin, _ = _large(folder)
    _flip(path, begin)

    class Full(Disk):
        left = 100

        def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
            self.left -= 1
            if not self.left:
                raise OSError(errno.ENOSPC, "no space")
            return super().pwrite(fd, data, offset)

    trusting = Resources(device="cpu", workers=1, tile_rows=8, source_check=False)
    with pytest.raises(OutputError):
        api.convert(folder, tmp_path / "out", HuggingFace(), trusting, disk=Full())
    with pytest.raises(CheckpointError, match=tensor):
        api.convert(folder, tmp_path / "out", HuggingFace(), CPU)
    assert not (tmp_path / "out").exists()
    assert api.convert(folder, tmp_path / "out", HuggingFace(), trusting).resumed


def test_plan_tells_and_the_flag_skips(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _copy(made["fp8_block"], tmp_path)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert main(["plan", str(folder), "--to", "hf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_to_check"] == size
    assert main(["plan", str(folder), "--to", "hf"]) == 0
    assert "held against its streamconv.json" in capsys.readouterr().out
    path, _, begin, _ = _large(folder)
    _flip(path, begin)
    command = ["convert", str(folder), str(tmp_path / "out"), "--to", "hf", "--device", "cpu"]
    assert main([*command, "--no-source-check"]) == 0
    assert main(["verify", str(tmp_path / "out"), "--source", str(folder)]) == 3


def test_what_lies_beside_may_be_edited_and_broken(made: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(made["directory"], tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("10000.0", "20000.0"))
    report = streamconv.convert(folder, tmp_path / "out", HuggingFace(), resources=CPU)
    assert [line for line in report.warnings if "config.json is not the one" in line]
    _flip(folder / "streamconv.json", 300)
    with pytest.raises(CheckpointError, match=r"streamconv\.json"):
        streamconv.convert(folder, tmp_path / "again", HuggingFace(), resources=CPU)
    (folder / "streamconv.json").unlink()
    assert streamconv.plan(folder, HuggingFace()).bytes_checked == 0
    streamconv.convert(folder, tmp_path / "again", HuggingFace(), resources=CPU)
