"""The golden cases: what NVIDIA's converter wrote for tiny models, as hashes.

`cases.json` has one case a line. A tensor is `[dtype, shape, hash]`; hashes are the first 32 hex digits of the SHA-256
of the bytes as stored. `corrected` names tensors where NVIDIA's output is wrong and the right answer is stored.
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

# What is converted so far. Widen here, and only here.
MODEL_PREFIXES = ("inputs/llama", "inputs/mistral", "inputs/meta")
UNSUPPORTED_FLAGS = frozenset(
    {
        "--remove_duplicated_kv_heads",
    }
)


@dataclass(frozen=True)
class Case:
    """One conversion with its right answer."""

    name: str
    tool: str
    argv: tuple[str, ...]
    gpu_sm: int
    produced_by: str
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]
    activation_ranges: str | None = None
    corrected: dict[str, Any] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def model(self) -> str:
        """The input folder, relative to where the inputs were generated."""
        flags = ("--model_dir", "--model-dir", "--meta_ckpt_dir")
        return next(value for flag, value in zip(self.argv, self.argv[1:], strict=False) if flag in flags)

    @property
    def config_text(self) -> str:
        """config.json as the official converter wrote it."""
        return json.dumps(self.config, indent=4)

    @property
    def supported(self) -> bool:
        """Whether streamconv is built far enough for this case."""
        return self.model.startswith(MODEL_PREFIXES) and UNSUPPORTED_FLAGS.isdisjoint(self.argv)

    def arguments(self, out: Path) -> list[str]:
        """The whole command line; run it in the folder that holds `inputs/`."""
        arguments = [*self.argv, "--output_dir", str(out), "--target_sm", str(self.gpu_sm), "--target_version", "0.16"]
        if self.activation_ranges:
            arguments += ["--activation_ranges", str(HERE / "act_ranges" / self.activation_ranges)]
        return arguments


@functools.cache
def load() -> dict[str, Case]:
    """All cases by name."""
    found: dict[str, dict[str, Any]] = json.loads((HERE / "cases.json").read_text())
    return {name: Case(name=name, **{**case, "argv": tuple(case["argv"])}) for name, case in found.items()}


def supported() -> list[Case]:
    """The cases that have to pass."""
    return [case for case in load().values() if case.supported]
