"""Files that are read back: whatever they hold, an error is typed, and none makes a reader wait or take much memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from streamconv import api
from streamconv.checkpoint.limits import MAX_CONFIG
from streamconv.cli import recipe
from streamconv.errors import CheckpointError, OutputError, StreamconvError, UsageError, VerifyError
from streamconv.options import Resources
from streamconv.run import journal, manifest
from streamconv.run.fs import Disk, hidden
from streamconv.run.inside import choose
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification.check import verify
from tests import tiny
from tests.fuzz.read_back import KINDS, run


def test_spoiled_files_end_in_typed_errors(tmp_path: Path) -> None:
    ended, wrong = run(50 * len(KINDS), 0, tmp_path)
    assert not wrong, "\n".join(wrong[:5])
    # the rounds are worth something only if most files are refused, and some are not
    assert all(ended[f"{kind}: refused"] + ended[f"{kind}: taken"] == 50 for kind in KINDS)
    assert sum(times for verdict, times in ended.items() if "refused" in verdict) > 100


def test_a_reader_without_types_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    untyped = lambda path, present: json.loads(path.read_text())["weight_map"]["a"]  # noqa: E731
    monkeypatch.setattr("tests.fuzz.read_back.weight_files.read_weight_map", untyped)
    _, wrong = run(20 * len(KINDS), 0, tmp_path)
    assert any(", index: " in line for line in wrong)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(3 << 30)  # a hole: no byte of it is stored


def deep(path: Path) -> None:
    path.write_bytes(b'{"format": 1, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def number(path: Path) -> None:
    path.write_bytes(b'{"format": 1' + b"0" * 3000 + b"}")


MAKERS = [fifo, zeros, folder, huge, deep, number]


def _verify_config(path: Path, make: Callable[[Path], None]) -> None:
    make(path / "config.json")
    verify(path)


def _verify_manifest(path: Path, make: Callable[[Path], None]) -> None:
    (path / "config.json").write_text(json.dumps({"mapping": {}}))
    make(path / manifest.NAME)
    verify(path)


def _recipe(name: str) -> Callable[[Path, Callable[[Path], None]], None]:
    def read(path: Path, make: Callable[[Path], None]) -> None:
        make(path / name)
        recipe.read(path / name, {})

    return read


def _source_config(path: Path, make: Callable[[Path], None]) -> None:
    tiny.write(path)
    (path / "config.json").unlink()
    make(path / "config.json")
    api.open_and_plan(path, TensorRTLLM())


READERS: dict[str, tuple[Callable[[Path, Callable[[Path], None]], None], type[StreamconvError]]] = {
    "verify: config.json": (_verify_config, VerifyError),
    "verify: streamconv.json": (_verify_manifest, VerifyError),
    "--config x.json": (_recipe("x.json"), UsageError),
    "--config x.toml": (_recipe("x.toml"), UsageError),
    "--config x.yaml": (_recipe("x.yaml"), UsageError),
    "MODEL/config.json": (_source_config, CheckpointError),
}


@pytest.mark.parametrize("make", MAKERS, ids=[make.__name__ for make in MAKERS])
@pytest.mark.parametrize("name", READERS)
def test_no_regular_or_no_small_file(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    read, error = READERS[name]
    with pytest.raises(error) as raised:
        read(tmp_path, make)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("make", [fifo, zeros, folder], ids=["fifo", "zeros", "folder"])
def test_a_journal_that_is_no_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(hidden(tmp_path / "out", "journal"))
    with contextlib.closing(choose(tmp_path / "out", Disk())) as place:
        place.open()
        with pytest.raises(OutputError, match="it is not what a run leaves there"):
            place.journal().read()


def test_a_journal_of_3_gib_of_zeros_is_none_and_takes_no_memory(tmp_path: Path) -> None:
    huge(hidden(tmp_path / "out", "journal"))
    code = "import sys; from pathlib import Path; from streamconv import memory; from streamconv.run import fs, inside, journal;"
    code += "place = inside.choose(Path(sys.argv[1]), fs.Disk()); place.open();"
    code += "assert not place.journal().read(); print(memory.peak_resident())"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 100 << 20


_MORE = ", ".join(f"{b}: &{b} [*{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
YAML_LAUGHS = "model: m\nquant: {a: &a [x, x], " + _MORE + "}"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.yaml", YAML_LAUGHS, "aliases"),
        ("x.yaml", "tp-size: 0x" + "f" * 9000, "a number of many digits"),
        ("x.yaml", "quant: " + "[" * 5000, "nested too deeply"),
        ("x.toml", "tp-size = " + "[" * 5000, "nested too deeply"),
        ("x.toml", "tp-size = " + "9" * 9000, "digits"),
        ("x.toml", "tp-size = 0x" + "f" * 9000, "a number of many digits"),
        ("x.toml", "smoothquant = nan", "smoothquant is nan, not a number"),
        ("x.toml", "# " + "x" * (1 << 20), "at most"),
    ],
)
def test_hostile_recipes(name: str, text: str, says: str, tmp_path: Path) -> None:
    from tests.fuzz.read_back import World

    (tmp_path / name).write_text(text)
    known = World(tmp_path / "world").kinds
    with pytest.raises(UsageError, match=says):
        recipe.read(tmp_path / name, known)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantization_config": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 10**99}}, "not a positive float32"),
        ({"quantization_config": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 10**400}}, "integer of 401 digits"),
        ({"quantization_config": {"quant_method": "fbgemm_fp8", "activation_scale_ub": "x"}}, "activation_scale_ub is 'x'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor is 0"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "rope_scaling.factor is None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": None}}, "low_freq_factor is None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}, "not below high_freq_factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 0}}, "original_max_position"),
    ],
)
def test_numbers_that_would_be_divided_by_or_overflow(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model", settings=tiny.config(**changes))
    with pytest.raises(CheckpointError, match=re.escape(says)):
        api.open_and_plan(model, TensorRTLLM(rope_tables=True))


def lines_of(path: Path, records: list[dict[str, Any]]) -> None:
    texts = [json.dumps(record, separators=(",", ":")).encode() for record in records]
    path.write_bytes(b"".join(xxhash.xxh3_64(text).hexdigest().encode() + b" " + text + b"\n" for text in texts))


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_forged_lines_with_right_hashes_of_wrong_rows_change_no_byte(quant: str, tmp_path: Path) -> None:
    """Rows cut where the layout cannot be cut, spans that only reduce, spans that are not there; all bytes they name hash as they say."""
    model = tiny.write(tmp_path / "model")
    options = TensorRTLLM(quant="int8", target_sm=80) if quant == "int8" else TensorRTLLM()
    api.convert(model, tmp_path / "right", options)
    right = (tmp_path / "right" / "rank0.safetensors").read_bytes()
    opened, plan = api.open_and_plan(model, options)
    with opened:
        records: list[dict[str, Any]] = [{"run": journal.identity(plan, opened.shards)}]
    out = tmp_path / "out"
    work = hidden(out, "partial")
    work.mkdir()
    (work / "rank0.safetensors").write_bytes(bytes(len(right)))
    for span_number, span in enumerate(plan.spans):
        (dest,) = span.dests[:1]
        first, last = span.start, span.stop
        for start, stop in ((first + 1, last), (first, last - 1), (first + 1, last - 1), (last, last + 2)):
            if span.align > 1 and stop > start:
                sizes = [place.record_bytes * (stop - start) for place in plan.matrices[dest.matrix].places]
                hashes = [[xxhash.xxh3_128(bytes(size)).hexdigest() for size in sizes]]
                records.append({"tile": [span_number, start, stop], "hash": hashes, "found": [0, 0]})
    records += [{"tile": [len(plan.spans) + 7, 0, 1], "hash": [], "found": [0, 0]}, {"tile": [0, 5, 5], "hash": [], "found": [0, 0]}]
    lines_of(hidden(out, "journal"), records)
    report = api.convert(model, out, options, Resources(workers=2, tile_rows=64))
    assert (out / "rank0.safetensors").read_bytes() == right
    assert report.resumed == 0


def test_a_config_of_just_the_limit_is_read(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model")
    text = json.dumps(tiny.config()).encode()
    (model / "config.json").write_bytes(text + b" " * (MAX_CONFIG - len(text)))
    api.open_and_plan(model, TensorRTLLM())[0].close()
    (model / "config.json").write_bytes(text + b" " * (MAX_CONFIG - len(text) + 1))
    with pytest.raises(CheckpointError, match="at most"):
        api.open_and_plan(model, TensorRTLLM())
