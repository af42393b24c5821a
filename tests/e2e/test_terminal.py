"""What reaches a terminal, and streams that are closed or cannot encode."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamconv.cli import convert_checkpoint
from streamconv.cli.main import main
from streamconv.cli.output import block, flush_or_fail, line, note
from streamconv.errors import RefusedError, StreamconvError, visible
from tests import tiny

EVIL = "\x1b[31m\x07\r\n\x9b2J\u202e\u2066\u200b\ud800\x7f\U000e0041\ufeff\u2028"
COMMAND = [sys.executable, "-m", "streamconv"]


def harmless(text: str) -> bool:
    return all(each.isprintable() for each in text.split("\n"))


def test_visible() -> None:
    assert visible(EVIL).isprintable() and visible(visible(EVIL)) == visible(EVIL)
    assert visible("Größe × 日本 \\n") == "Größe × 日本 \\n"
    assert visible("".join(map(chr, range(0x110000)))).isprintable()


def test_errors_are_visible_however_they_are_made() -> None:
    error = StreamconvError(EVIL, hint=EVIL)
    error.message += EVIL
    error.hint = f"{error.hint}{EVIL}"
    assert str(error).isprintable() and error.message.isprintable()
    assert all(each.isprintable() for each in RefusedError([EVIL, EVIL]).problems)


@pytest.mark.parametrize("say", [line, note, block, lambda text: print(text), lambda text: print(text, file=sys.stderr)])
def test_everything_printed_in_a_command_is_harmless(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert flush_or_fail(lambda: say("a" + EVIL) or 0) == 0
    told = capsys.readouterr()
    assert harmless(told.out) and harmless(told.err) and "a" in told.out + told.err


def _evil_model(folder: Path) -> Path:
    weights = tiny.tensors() | {f"model.layers.0.{EVIL.replace(chr(0xD800), '')}": tiny.tensors()["lm_head.weight"]}
    return tiny.write(folder, weights)


@pytest.mark.parametrize("json_", [False, True])
@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("config.json", {"quantization_config": {"quant_method": EVIL}}),
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": EVIL, "checkpoint_format": EVIL}}),
        ("config.json", {"architectures": [EVIL]}),
        ("config.json", {"hidden_act": EVIL, "torch_dtype": EVIL}),
        ("config.json", {"rope_scaling": {"rope_type": EVIL}}),
        ("config.json", {"model_type": EVIL}),
        ("hf_quant_config.json", {"quantization": {"quant_algo": EVIL, "kv_cache_quant_algo": EVIL}}),
        ("tensor", {}),
    ],
)
def test_a_model_reaches_no_terminal(
    place: str, changes: dict[str, Any], json_: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _evil_model(tmp_path / "model") if place == "tensor" else tiny.write(tmp_path / "model")
    if place != "tensor":
        (model / place).write_text(json.dumps((tiny.config() if place == "config.json" else {}) | changes))
    for command in (["inspect", str(model)], ["plan", str(model)], ["convert", str(model), str(tmp_path / "out")]):
        main([*command, *["--json"] * json_])
        told = capsys.readouterr()
        assert harmless(told.out) and harmless(told.err), command
        if json_:
            assert isinstance(json.loads(told.out), dict)


@pytest.mark.parametrize(("key", "value"), [("format", EVIL), ("config", EVIL), ("options", {EVIL: EVIL}), ("sources", {EVIL: EVIL})])
def test_a_manifest_reaches_no_terminal(key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tiny.write(tmp_path / "model"), tmp_path / "out"
    assert main(["convert", str(model), str(out), "--quiet"]) == 0
    manifest = json.loads((out / "streamconv.json").read_text())
    (out / "streamconv.json").write_text(json.dumps(manifest | {key: value}))
    for command in (["verify", str(out)], ["plan", str(model), "--config", str(out / "streamconv.json")]):
        main(command)
        told = capsys.readouterr()
        assert harmless(told.out) and harmless(told.err)


def test_arguments_reach_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, recipe = tiny.write(tmp_path / "model"), tmp_path / "r.yaml"
    evil = EVIL.replace("\ud800", "")
    recipe.write_text(json.dumps({"target_version": evil, evil: 1}))
    for run, words in (
        (main, ["plan", str(model), "--target-version", evil]),
        (main, ["plan", str(model), "--config", str(recipe)]),
        (main, [evil]),
        (main, ["plan", str(model), f"--{evil}"]),
        (main, ["verify", str(tmp_path / "x") + EVIL]),
        (convert_checkpoint.main, ["--model_dir", evil, "--dtype", evil, "--output_dir", "x"]),
        (convert_checkpoint.main, [f"--{evil}"]),
    ):
        assert run(words) != 0
        told = capsys.readouterr()
        assert harmless(told.out) and harmless(told.err) and told.err, words


def test_a_standard_output_that_cannot_encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, raw = tiny.write(tmp_path / "mödell"), io.BytesIO()
    for number, encoding in enumerate(("ascii", "latin-1", "cp437", "utf-8")):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
        out = os.fsdecode(bytes(tmp_path) + "/日本".encode() + b"\xff%d" % number)
        assert main(["convert", str(model), out]) == 0
        assert os.path.isdir(out)
    assert b": 1 file, " in raw.getvalue()


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_stop_nothing(closed: str, tmp_path: Path) -> None:
    model, out = tiny.write(tmp_path / "model"), tmp_path / "out"
    words = " ".join(f"'{word}'" for word in [*COMMAND, "convert", str(model), str(out)])
    done = subprocess.run(["sh", "-c", f"{words} {closed}"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert main(["verify", str(out)]) == 0  # nothing was written into a file that took the stream's number


def test_a_signal_in_the_first_moments_is_told_in_a_line(tmp_path: Path) -> None:
    """From the entry's first line on; what Python itself does before that is Python's."""
    code = (
        "import builtins, os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored, where the tests run in the background
        "from streamconv import __main__ as entry\n"
        "real, prepare, at, number, seen = builtins.__import__, entry._prepare, int(sys.argv[1]), int(sys.argv[2]), [0]\n"
        "def spy(*args, **more):\n"
        "    seen[0] += 1\n"
        "    if seen[0] == at: os.kill(os.getpid(), number)\n"
        "    return real(*args, **more)\n"
        "entry._prepare = lambda: (prepare(), setattr(builtins, '__import__', spy))\n"
        "sys.argv[1:] = ['plan', '/absent']\n"
        "entry.run()\n"
    )
    for at, number in ((1, signal.SIGINT), (2, signal.SIGTERM), (40, signal.SIGINT), (400, signal.SIGTERM), (900, signal.SIGINT)):
        done = subprocess.run([sys.executable, "-c", code, str(at), str(number)], capture_output=True, text=True, timeout=60)
        if done.returncode != 3:  # fewer imports than that
            assert done.returncode == 128 + number, done.stderr
            assert done.stderr == f"error: stopped by {signal.Signals(number).name}\n"


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    gone = ["/bin/sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh"]
    ran = subprocess.run([*gone, *COMMAND, "convert", "model", "out"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode in (2, 3) and ran.stderr.startswith("error: ") and len(ran.stderr.splitlines()) == 1
