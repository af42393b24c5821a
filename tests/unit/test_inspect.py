"""`streamconv inspect` shows any checkpoint that can be read, also one that no family table knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamconv.cli.main import main
from tests import tiny


@pytest.mark.parametrize(
    ("changes", "title", "problem"),
    [
        ({}, "llama (LlamaForCausalLM)", None),
        ({"architectures": ["NovelForCausalLM"]}, "NovelForCausalLM", "unknown architecture 'NovelForCausalLM'"),
        ({"architectures": None}, "no architecture", "architectures names no model class"),
        ({"hidden_size": "wide"}, "LlamaForCausalLM", "hidden_size"),
        ({"num_hidden_layers": 7}, "llama (LlamaForCausalLM)", "missing tensor"),
    ],
    ids=str,
)
def test_what_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], title: str, problem: str | None
) -> None:
    held = tiny.tensors()
    model = str(tiny.write(tmp_path / "model", held, tiny.config() | changes))
    assert main(["inspect", model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{title}, {len(held)} tensors, ") and len(lines) >= len(held) + 4
    told = "\n".join(lines).partition("\n--to trtllm: ")[2]
    assert problem in told if problem else not told
    assert main(["inspect", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [tensor["name"] for tensor in facts["tensors"]] and (facts["problem"] is None) == (problem is None)
    assert all(bool(tensor["becomes"]) == (problem is None) for tensor in facts["tensors"])
