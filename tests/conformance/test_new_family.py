"""One new file adds a family: nothing else has to know of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamconv import api, families
from streamconv.errors import CheckpointError
from streamconv.targets.trtllm.options import TensorRTLLM
from tests import tiny

TABLE = """
from streamconv.families.base import LLAMA_TENSORS, Family

FAMILIES = (Family("novel", ("NovelForCausalLM",), "llama", LLAMA_TENSORS, handles="a test"),)
"""


def test_a_file_in_the_folder_is_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = families.all_families()
    llama = tiny.write(tmp_path / "llama")
    novel = tiny.write(tmp_path / "novel", settings=tiny.config(architectures=["NovelForCausalLM"]))
    with pytest.raises(CheckpointError, match="NovelForCausalLM"):
        families.family_of("NovelForCausalLM")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "conformance_novel.py").write_text(TABLE)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "tables")])
            families.all_families.cache_clear()
            api.convert(llama, tmp_path / "one", TensorRTLLM())
            api.convert(novel, tmp_path / "two", TensorRTLLM())
    finally:
        families.all_families.cache_clear()
    one, two = ((tmp_path / name / "rank0.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert [family.name for family in families.all_families()] == [family.name for family in known]
