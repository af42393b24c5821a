"""`verify --with-tensorrt-llm`: how TensorRT-LLM's reader is called, and what is said when it is not there or refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from streamconv.cli.main import main
from streamconv.errors import UsageError, VerifyError
from streamconv.verification.check import verify
from tests import tiny

NAMES = ("tensorrt_llm", "tensorrt_llm.models", "tensorrt_llm.models.modeling_utils")


class Reader:
    """Stands in for the package: records every call, and refuses the ranks in `refuse`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.refuse: set[int] = set()
        reader = self

        class PretrainedConfig:
            @classmethod
            def from_json_file(cls, path: str) -> SimpleNamespace:
                reader.calls.append(("config", path))
                content = json.loads(Path(path).read_text())
                return SimpleNamespace(architecture=content["architecture"], mapping=SimpleNamespace(**content["mapping"]))

        class Model:
            @classmethod
            def from_checkpoint(cls, ckpt_dir: str, rank: int | None = None, config: Any = None) -> Model:
                reader.calls.append(("model", ckpt_dir, rank))
                assert config is None and (Path(ckpt_dir) / f"rank{rank}.safetensors").exists()
                if rank in reader.refuse:
                    raise RuntimeError("Required but not provided tensors:\n {'lm_head.weight'}")
                return cls()

        modules = [ModuleType(name) for name in NAMES]
        modules[0].__version__ = "1.2.1"  # type: ignore[attr-defined]
        modules[1].MODEL_MAP = {"LlamaForCausalLM": Model}  # type: ignore[attr-defined]
        modules[2].PretrainedConfig = PretrainedConfig  # type: ignore[attr-defined]
        for name, module in zip(NAMES, modules, strict=True):
            monkeypatch.setitem(sys.modules, name, module)
        self.models = modules[1]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    assert main(["convert", str(tiny.write(tmp_path / "model")), str(folder), "--tp-size", "2", "--pp-size", "2", "-q"]) == 0
    return folder


def test_every_rank_is_read(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(monkeypatch)
    verdict = verify(out, with_tensorrt_llm=True)
    assert verdict.problems == [] and verdict.reader == "TensorRT-LLM 1.2.1 accepted 4 ranks, refused 0"
    assert reader.calls == [("config", str(out / "config.json"))] + [("model", str(out), rank) for rank in range(4)]


def test_a_rank_that_is_refused_fails_the_check(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Reader(monkeypatch).refuse = {1, 3}
    assert main(["verify", str(out), "--with-tensorrt-llm"]) == 7
    told = capsys.readouterr()
    assert "error: rank 1: TensorRT-LLM 1.2.1 refuses it: RuntimeError: Required but not provided tensors: {'lm_head.weight'}" in told.err
    assert "rank 3" in told.err and "rank 0" not in told.err and "accepted 2 ranks, refused 2" in told.out


def test_it_is_called_only_when_asked_for(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(monkeypatch)
    assert verify(out).reader is None and not reader.calls


def test_an_architecture_it_does_not_know(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Reader(monkeypatch).models.MODEL_MAP = {}  # type: ignore[attr-defined]
    assert "does not know LlamaForCausalLM" in verify(out, with_tensorrt_llm=True).problems[0]


def test_absent(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Hidden(), *sys.meta_path])
    with pytest.raises(UsageError) as caught:
        verify(out, with_tensorrt_llm=True)
    assert caught.value.hint == "pip install 'streamconv[tensorrt-llm]'"
    assert main(["verify", str(out), "--with-tensorrt-llm"]) == 2
    assert "tensorrt_llm is not installed" in capsys.readouterr().err


class _Hidden:
    """Nobody finds the package, installed or not."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "tensorrt_llm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


class _Broken:
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "tensorrt_llm":
            raise OSError("libmpi.so.40: cannot open shared object file")


def test_installed_but_broken(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt_llm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Broken(), *sys.meta_path])
    with pytest.raises(VerifyError, match=r"cannot be imported: libmpi\.so\.40"):
        verify(out, with_tensorrt_llm=True)


def test_a_release_without_the_engine_workflow(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del Reader(monkeypatch).models.MODEL_MAP
    with pytest.raises(VerifyError, match=r"tensorrt_llm 1\.2\.1 cannot read engine checkpoints"):
        verify(out, with_tensorrt_llm=True)
