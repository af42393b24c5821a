"""The golden cases: what NVIDIA's converter wrote for tiny models, as hashes.

`cases.json` (TensorRT-LLM 0.16) and `cases12.json` (1.2) have one case a line. A tensor is `[dtype, shape, hash]`; hashes are the
first hex digits of the SHA-256 of the bytes as stored. `corrected` and `corrected_config` name tensors and keys where NVIDIA's output
is wrong and the right answer is stored. A file that is `like` 0.16 holds what it holds in the case of that name there, less the names
in `without`, and the tensors that are listed.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

# Position tables, not weights: no loader needs them, and their last bits depend on the math library.
ROPE_TABLES = frozenset({"embed_positions", "rotary_inv_freq", "embed_positions_for_gpt_attention"})
FILES = {"0.16": "cases.json", "1.2": "cases12.json"}
"""TensorRT-LLM release -> where its cases are."""


@dataclass(frozen=True)
class Case:
    """One conversion with its right answer."""

    name: str
    version: str
    tool: str
    argv: tuple[str, ...]
    gpu_sm: int
    produced_by: str
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]
    activation_ranges: str | None = None
    corrected: Any = None
    corrected_config: dict[str, Any] | None = None

    def __str__(self) -> str:
        return self.name if self.version == "0.16" else f"{self.name}-{self.version}"

    @property
    def model(self) -> str | None:
        """The input folder, relative to where the inputs were generated; None if config.json is all there is."""
        flags = ("--model_dir", "--model-dir", "--meta_ckpt_dir")
        return next((value for flag, value in zip(self.argv, self.argv[1:], strict=False) if flag in flags), None)

    @property
    def config_text(self) -> str:
        """config.json as the official converter wrote it."""
        return json.dumps(self.config, indent=4)

    def arguments(self, out: Path) -> list[str]:
        """The whole command line; run it in the folder that holds `inputs/`."""
        arguments = [*self.argv, "--output_dir", str(out), "--target_sm", str(self.gpu_sm), "--target_version", self.version]
        if self.activation_ranges:
            arguments += ["--activation_ranges", str(HERE / "act_ranges" / self.activation_ranges)]
        return arguments


@functools.cache
def load(version: str = "0.16") -> dict[str, Case]:
    """The cases of a release by name."""
    found: dict[str, dict[str, Any]] = json.loads((HERE / FILES[version]).read_text())
    for name, case in found.items():
        for number, file in case["files"].items():
            if file.pop("like", None):
                before = load()[name].files[number]["tensors"]
                left_out = ROPE_TABLES.union(file.pop("without", ()))
                file["tensors"] = {key: value for key, value in before.items() if key not in left_out} | file["tensors"]
    return {name: Case(name=name, version=version, **{**case, "argv": tuple(case["argv"])}) for name, case in found.items()}


@functools.cache
def every() -> tuple[Case, ...]:
    """All cases of both releases."""
    return tuple(case for version in FILES for case in load(version).values())
