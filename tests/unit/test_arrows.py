"""The shape of the house: imports point one way, and the light commands stay light."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import streamconv
from streamconv.targets import TARGETS, checks_of
from streamconv.targets.checks import Checks
from tests import tiny

ROOT = Path(streamconv.__file__).parent
LEVELS = (
    ("errors", "lazy", "memory", "options", "process", "streams", "natural", "cache_folder", "digest", "mounts", "arguments", "reports"),
    ("progress", "memory_trace", "launchers"),
    ("checkpoint",),
    ("quants", "families", "kernels"),
    ("planning",),
    ("run", "device"),
    ("targets", "hub", "open_plan", "allocation", "estimate", "execution"),
    ("verification", "calibration"),
    ("in_parts", "publishing"),
    ("api",),
    ("run_on_ray", "verbs", "opening"),
    ("pages", "bench"),
    ("cli", "__main__"),
)
"""Rooms from the bottom up; a room imports from its own level and below (kernels and quants know each other)."""


def _level(module: str) -> int:
    room = module.split(".")[1] if "." in module else ""
    for level, rooms in enumerate(LEVELS):
        if room in rooms:
            return level
    raise AssertionError(f"{module} has no place in LEVELS")


def _imports(text: str, package: str) -> set[str]:
    """Modules of streamconv that a module's code imports, however it says so.

    Args:
        package: the package that the module lies in, which relative imports start from.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            if module == "streamconv":  # the rooms themselves, or what the package says of itself (__version__)
                found |= {f"streamconv.{alias.name}" for alias in node.names if _is_room(alias.name) or alias.name == "*"}
            else:
                found.add(module)
    return {name for name in found if name.startswith("streamconv.")}


def _is_room(name: str) -> bool:
    return (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("from streamconv import memory, __version__", {"streamconv.memory"}),
        ("from streamconv import memory as room", {"streamconv.memory"}),
        ("from streamconv.device.pipeline import DevicePipeline", {"streamconv.device.pipeline"}),
        ("import streamconv.api, os", {"streamconv.api"}),
        ("def f():\n    import streamconv.api as api", {"streamconv.api"}),
        ("from . import base", {"streamconv.quants"}),
        ("from .base import Codec", {"streamconv.quants.base"}),
        ("from .. import api", {"streamconv.api"}),
        ("from ..device.pipeline import DevicePipeline", {"streamconv.device.pipeline"}),
        ("import os\nfrom pathlib import Path", set()),
    ],
)
def test_every_spelling_of_an_import_is_seen(text: str, modules: set[str]) -> None:
    assert _imports(text, "streamconv.quants") == modules


def test_imports_point_one_way() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        if path.name == "__init__.py" and path.parent == ROOT:
            continue
        name = ".".join(("streamconv", *path.relative_to(ROOT).with_suffix("").parts))
        package = ".".join(("streamconv", *path.relative_to(ROOT).parent.parts))
        for other in _imports(path.read_text(), package):
            if _level(other) > _level(name):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_no_rooms_without_a_purpose() -> None:
    names = {path.stem for path in ROOT.rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


HEAVY = {"torch", "numba", "numpy", "transformers"}


@pytest.mark.parametrize(
    ("command", "heavy"),
    [
        (["--help"], HEAVY),
        (["convert", "--help"], HEAVY),
        (["list", "families"], HEAVY),
        (["list", "quants"], HEAVY),
        (["list", "targets"], HEAVY),
        (["plan", "MODEL"], {"torch", "transformers"}),
        (["plan", "MODEL", "--to", "hf", "--quant", "fp8_dynamic"], {"torch", "transformers"}),
        (["plan", "MODEL", "--quant", "int4_awq", "--group-size", "64", "--method", "gptq"], {"torch", "transformers"}),
        (["inspect", "MODEL"], {"torch", "transformers"}),
    ],
)
def test_light_commands_import_nothing_heavy(command: list[str], heavy: set[str], tmp_path: Path) -> None:
    model = str(tiny.write(tmp_path / "model"))
    assert not _loaded([model if word == "MODEL" else word for word in command]) & heavy


def test_help_loads_no_planning() -> None:
    """A start takes 0.15 s at most: what `--help` does not show is not imported."""
    own = {name.removeprefix("streamconv.") for name in _loaded(["--help"]) if name.startswith("streamconv.")}
    rooms = ("api", "planning", "quants", "families", "kernels", "run", "hub", "device", "verification", "calibration")
    assert not {name for name in own if name.split(".")[0] in rooms}
    assert not {name for name in own if name.startswith(("checkpoint.", "targets."))}


def test_help_of_the_drop_in_command_loads_no_planning() -> None:
    rooms = ("api", "planning", "quants", "families", "kernels", "run", "hub", "device", "verification", "calibration", "checkpoint")
    own = {name.removeprefix("streamconv.") for name in _loaded(["--help"], "convert_checkpoint") if name.startswith("streamconv.")}
    assert "cli.official_flags" in own and not {name for name in own if name.split(".")[0] in rooms} - {"checkpoint.dtypes", "checkpoint"}


def test_an_unquantized_conversion_loads_no_other_codec(tmp_path: Path) -> None:
    """A start of 0.4 s is mostly imports: those of other formats took a quarter of it. OpenSSL alone is 3.6 MiB of memory."""
    loaded = _loaded(["convert", str(tiny.write(tmp_path / "model")), str(tmp_path / "out"), "--device", "cpu"])
    own = {name.removeprefix("streamconv.") for name in loaded}
    codecs = {f"quants.{name}" for name in ("given_codes", "int_group", "gptq", "weight_only", "fp8_rowwise", "fp8_tensor", "smoothquant")}
    others = {"cli.recipe", "checkpoint.torch_zip", "checkpoint.codes_file", "calibration.run", "memory_trace", "hub.shard"}
    others |= {"quants.decoded_rows"}
    assert all((ROOT / f"{name.replace('.', '/')}.py").exists() for name in codecs | others)
    assert "quants.plain" in own and not own & {*codecs, *others, "_hashlib", "ssl"}


def _loaded(command: list[str], program: str = "main") -> set[str]:
    """Modules that a command has imported when it ends."""
    code = (
        f"import sys; from streamconv.cli.{program} import main; status = main(sys.argv[1:]);"
        "print('modules:', *sys.modules, file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rpartition("modules: ")[2].split())


def test_modules_stay_small() -> None:
    lines = sorted(len(path.read_text().splitlines()) for path in ROOT.rglob("*.py"))
    assert statistics.median(lines) <= 130 and lines[-1] <= 350


def test_verification_knows_no_target() -> None:
    """What a kind of output means, its folder says: nothing else names the files of a rank, nor how config.json spells a format."""
    named = re.compile(r"""rank(\d|\[|\\d)[^"']*safetensors|["']quant_algo["']|["']mapping["']""")
    apart = ("targets/", "checkpoint/quantized.py", "cli/official_flags.py", "cli/config_from_flags.py", "cli/list_view.py")
    found = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if named.search(path.read_text())]
    # run/place.py: an interrupted run with more ranks leaves files that no manifest lists yet
    assert [name for name in found if not name.startswith(apart)] == ["run/place.py"]


@pytest.mark.parametrize("key", TARGETS)
def test_a_target_answers_what_verify_asks(key: str) -> None:
    asked = {name for name in vars(Checks) if not name.startswith("_")} | set(Checks.__annotations__)
    assert len(asked) == 6 and not asked - set(vars(checks_of(key)))
