"""Every golden case through `streamconv-convert-checkpoint`: the same config.json, the same bytes in every tensor."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save

from streamconv import memory
from streamconv.cli.convert_checkpoint import main
from streamconv.planning import memory_plan
from streamconv.planning.memory_plan import MemoryPlan, TileCost
from tests.golden import cases, generate
from tests.golden.cases import ROPE_TABLES, Case

# For what must not depend on budget, workers and tile size: a split, a duplicated head, an odd vocabulary, each format.
VARIED = ["mha_tp2_pp2", "gqa_tp4_kvdup", "odd_tp2_auto", "mha_int8_tp2", "odd_int8_tp2", "gqa_int4_tp2_sm90"]
VARIED += ["mha_sq_tensor_tp2", "gqa_sq_tensor_tp2", "mha_sq_channel_token_tp2_kv8", "gqa_int8_kv8_tp2"]
VARIED += ["meta_gqa_tp4_kvdup", "gptq_tp2", "gptq8_tp2", "gptq_tp1_bf16_sm90", "mha_fp8row_all_tp2", "mha_tp2_fp8kv"]

WITH_ROPE_TABLES = ["mha_tp1", "mistral_tp2", "mha_int8_tp2", "gqa_int4_tp1"]

BY_NAME = cases.load()
SPECS = {spec["name"]: spec for spec in generate.load_specs()}
SMALL_TILES = [case for case in cases.every() if case.model and (case.version == "0.16" or case.name not in BY_NAME or "_sq_" in case.name)]
"""Cases that differ in how they are tiled: the others of 1.2 have the bytes of 0.16."""


def convert(case: Case, out: Path, *more: str) -> None:
    """Run the case's command line with `more` flags; it has to succeed."""
    status = main([*case.arguments(out), *more])
    assert status == 0, f"{case.name}: exit status {status}"


def short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def read_tensors(path: Path) -> dict[str, list[Any]]:
    """Dtype, shape and hash of every tensor, in the form of cases.json; read without any library."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    data = content[8 + size :]
    return {
        name: [entry["dtype"], entry["shape"], short_hash(data[slice(*entry["data_offsets"])])]
        for name, entry in header.items()
    }


def same(found: list[Any], wanted: list[Any]) -> bool:
    """Whether a tensor is the one that is meant; some hashes are stored with fewer digits."""
    return bool(found[:2] == wanted[:2] and len(wanted[2]) >= 16 and found[2].startswith(wanted[2]))


def check_output(case: Case, out: Path, *, rope_tables: bool = False) -> None:
    """Compare everything the case says about its output folder."""
    assert (out / "config.json").read_bytes() == case.config_text.encode()
    assert {path.name for path in out.glob("*.safetensors")} == set(case.files)
    for name, file in case.files.items():
        expected = {key: value for key, value in file["tensors"].items() if rope_tables or key not in ROPE_TABLES}
        found = read_tensors(out / name)
        assert sorted(found) == sorted(expected), name
        wrong = [key for key in expected if not same(found[key], expected[key]) and key not in ROPE_TABLES]
        assert not wrong, f"{name}: {[(key, found[key], expected[key]) for key in wrong[:3]]}"
        # Where nothing is left out, and no math library had a say in the bytes, the whole file is the same.
        if found == file["tensors"] and "sha256" in file:
            assert (out / name).stat().st_size == file["size"]
            assert short_hash((out / name).read_bytes()) == file["sha256"]
        # The stock reader opens it, and the stock writer would have written exactly this.
        assert save(load_file(out / name)) == (out / name).read_bytes(), name


@pytest.fixture(autouse=True)
def in_golden_folder(golden_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases' paths are relative to the folder that holds `inputs/`."""
    monkeypatch.chdir(golden_inputs)


@pytest.mark.parametrize("case", cases.every(), ids=str)
def test_case(case: Case, tmp_path: Path) -> None:
    convert(case, tmp_path / "out")
    check_output(case, tmp_path / "out")


GRID = ("--tp_size", "--pp_size", "--cp_size", "--world-size", "--model_dir", "--model-dir", "--meta_ckpt_dir", "--output_dir")
"""Flags that have no say in what is in a tile."""


def _told(case: Case) -> set[tuple[str, ...]]:
    """What a tile of the case depends on: the family, the dtype it is stored in, every flag and its value."""
    spec = SPECS[Path(str(case.model)).name]
    values = [() if value.startswith("--") or "/" in value else (value,) for value in (*case.argv[1:], "--")]
    flags = {(flag, *value) for flag, value in zip(case.argv, values, strict=True) if flag.startswith("--") and flag not in GRID}
    return {("family", spec["arch"]), ("stored", spec["dtype"]), *flags}


def _quick() -> set[str]:
    """Enough cases that each such thing is in one of them; in the others they only stand together in other ways."""
    left, chosen = set[tuple[str, ...]]().union(*map(_told, SMALL_TILES)), list[Case]()
    while left:
        chosen.append(max(SMALL_TILES, key=lambda case: len(_told(case) & left)))
        left -= _told(chosen[-1])
    return {str(case) for case in chosen}


QUICK = _quick()
COVERED = [pytest.param(case, marks=() if str(case) in QUICK else pytest.mark.slow) for case in SMALL_TILES]


@pytest.mark.parametrize("case", COVERED, ids=str)
def test_same_for_small_tiles_and_many_workers(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMCONV_TILE_ROWS", "5")
    convert(case, tmp_path / "out", "--workers", "8")
    check_output(case, tmp_path / "out")


ALIKE = {"mha_tp2_pp2", "gqa_tp4_kvdup", "mha_int8_tp2", "gqa_sq_tensor_tp2", "mha_sq_tensor_tp2", "gqa_int8_kv8_tp2", "gptq8_tp2"}
ALIKE |= {"gptq_tp1_bf16_sm90", "mha_tp2_fp8kv", "meta_gqa_tp4_kvdup"}
"""Cut into rows as others of `VARIED` are."""
ANY = [pytest.param(name, rows, marks=pytest.mark.slow if rows > 1 or name in ALIKE else ()) for name in VARIED for rows in (1, 64)]


@pytest.mark.parametrize(("name", "rows"), ANY)
def test_same_for_any_tile(name: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMCONV_TILE_ROWS", str(rows))
    convert(BY_NAME[name], tmp_path / "out", "--workers", "2")
    check_output(BY_NAME[name], tmp_path / "out")


@pytest.mark.parametrize("name", VARIED)
def test_same_for_the_smallest_budget(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tiles are other ones than those of a budget with room."""
    seen: list[tuple[MemoryPlan, dict[str, TileCost]]] = []
    allocate = memory_plan.allocate

    def spied(total: int | None, workers: int | None, base: int, costs: dict[str, TileCost], *more: int, **named: int) -> MemoryPlan:
        seen.append((allocate(total, workers, base, costs, *more, **named), costs))
        return seen[-1][0]

    monkeypatch.setattr(memory, "resident", lambda: 100 * memory.MIB)
    monkeypatch.setattr(memory_plan, "allocate", spied)
    convert(BY_NAME[name], tmp_path / "roomy", "--memory_budget", "1GiB")
    roomy, costs = seen[-1]
    smallest = roomy.base + memory_plan.MARGIN + max(cost.smallest() for cost in costs.values())
    convert(BY_NAME[name], tmp_path / "out", "--memory_budget", str(smallest))
    tight, costs = seen[-1]
    assert tight.budget == smallest
    assert any(cost.rows(tight.arena, None) * 8 < cost.rows(roomy.arena, None) for cost in costs.values())
    check_output(BY_NAME[name], tmp_path / "roomy")
    check_output(BY_NAME[name], tmp_path / "out")


@pytest.mark.parametrize("name", WITH_ROPE_TABLES)
def test_rope_tables(name: str, tmp_path: Path) -> None:
    convert(BY_NAME[name], tmp_path / "out", "--rope_tables")
    check_output(BY_NAME[name], tmp_path / "out", rope_tables=True)


def test_all_cases_are_here() -> None:
    assert {version: len(cases.load(version)) for version in cases.FILES} == {"0.16": 107, "1.2": 182}
    assert {case.model for case in cases.every() if case.model} == {f"inputs/{spec['name']}" for spec in generate.load_specs()}
