"""A flag that was typed does something, or the command says that it does not. What a recipe holds is never complained about."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from streamconv import device
from streamconv.cli.main import cli, convert, main
from streamconv.quants import all_quants
from tests import tiny

RAW8 = ["--quant", "int8", "--encoding", "raw"]
AT80 = ["--quant", "int8", "--target-sm", "80"]

NOTHING: dict[str, tuple[list[str], str]] = {
    "samples": (["--samples", "8"], "--samples has no effect without --text"),
    "the default, typed": (["--samples", "512"], "--samples has no effect without --text"),
    "max-length": (["--max-length", "8"], "--max-length has no effect without --text"),
    "batch-size": (["--batch-size", "2"], "--batch-size has no effect without --text"),
    "hub-keep": (["--hub-keep", "none"], "--hub-keep has no effect with a local model"),
    "smoothquant": ([*AT80, "--smoothquant", "0.8"], "--smoothquant has no effect with --quant int8, it is for smoothquant"),
    "per-channel": (["--per-channel"], "--per-channel has no effect with --quant none"),
    "per-token": ([*AT80, "--per-token"], "--per-token has no effect with --quant int8"),
    "group-size": ([*AT80, "--group-size", "64"], "--group-size has no effect with --quant int8, it is for int4_awq, int4_gptq, int8_gptq"),
    "group-size, none": (["--group-size", "64"], "--group-size has no effect with --quant none"),
    "embedding": (["--embedding-sharding-dim", "1"], "--embedding-sharding-dim has no effect without --use-parallel-embedding"),
    "encoding": (["--encoding", "raw"], "--encoding has no effect with --quant none, it is for int8, int4"),
    "encoding, awq": (["--quant", "int4_awq", "--encoding", "raw"], "--encoding has no effect with --quant int4_awq"),
    "meta": ([*RAW8, "--use-meta-fp8-rowwise-recipe"], "--use-meta-fp8-rowwise-recipe has no effect with --quant int8"),
    "device memory": (["--device", "cpu", "--device-memory-budget", "1GiB"], "--device-memory-budget has no effect with --device cpu"),
    "device loss": (["--device", "cpu", "--on-device-loss", "stop"], "--on-device-loss has no effect with --device cpu"),
    "read": (["--read", "map", "--device", "cuda"], "--read has no effect with --device cuda"),
    "moe-tp": (["--tp-size", "2", "--moe-tp-size", "2"], "--moe-tp-size has no effect, this model has no experts"),
    "moe-ep": (["--moe-ep-size", "2"], "--moe-ep-size has no effect, this model has no experts"),
}
CONVERT_ALONE = {"samples", "the default, typed", "max-length", "batch-size", "hub-keep", "device loss", "read"}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tiny.write(tmp_path / "model")


@pytest.mark.parametrize(
    ("command", "case"), [("convert", case) for case in NOTHING] + [("plan", case) for case in NOTHING if case not in CONVERT_ALONE]
)
def test_it_is_said(command: str, case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, says = NOTHING[case]
    assert main([command, "model", "out", *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {says}") and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_all_of_them_at_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "model", "out", "--samples", "4", "--per-token", "--json"]) == 2
    message = json.loads(capsys.readouterr().out)["message"]
    assert "--samples has no effect" in message and "--per-token has no effect" in message


def test_device_memory_without_a_gpu(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "model", "--device-memory-budget", "1GiB", "--json"]
    monkeypatch.setattr(device, "visible", lambda: 1)
    assert main(flags) == 0
    monkeypatch.setattr(device, "visible", lambda: 0)
    assert main(flags) == 2 and "on a machine without a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--use-parallel-embedding", "--embedding-sharding-dim", "1", "--tp-size", "2"],
        RAW8,
        ["--quant", "fp8_rowwise", "--use-meta-fp8-rowwise-recipe"],
        ["--target-sm", "80", "--dtype", "bfloat16", "--device", "cpu"],
    ],
)
def test_flags_that_work_are_taken(model: Path, flags: list[str]) -> None:
    assert main(["plan", "model", *flags, "--json"]) == 0


@pytest.mark.parametrize("quant", all_quants())
def test_a_format_takes_its_own_flags(quant: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever else is wrong with the call."""
    values = {"--target-sm": ["80"], "--group-size": ["64"], "--activation-ranges": ["absent"], "--smoothquant": ["0.8"]}
    values |= {"--encoding": ["processed"], "--dtype": ["float16"]}
    flags = [part for flag in all_quants()[quant].info.flags for part in (flag, *values.get(flag, []))]
    main(["plan", "model", "--quant", quant, *flags])
    assert "no effect" not in capsys.readouterr().err


def test_the_flags_of_a_source_that_is_quantized_already(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--quant is left out there: the source says it, and --group-size may go with it."""
    settings = tiny.config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64})
    (model / "config.json").write_text(json.dumps(settings))
    main(["plan", "model", "--target-sm", "80", "--group-size", "64"])
    assert "no effect" not in capsys.readouterr().err
    assert main(["plan", "model", "--target-sm", "80", "--per-token"]) == 2
    assert "--per-token has no effect with --quant int4_gptq" in capsys.readouterr().err


def test_a_recipe_may_hold_what_has_no_effect(model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        'samples = 8\nhub-keep = "none"\nsmoothquant = 0.8\nper-token = true\ngroup-size = 64\nembedding-sharding-dim = 1\n'
        'moe-tp-size = 1\nencoding = "raw"\ndevice = "cpu"\ndevice-memory-budget = "1GiB"\n'
    )
    assert main(["convert", "model", "out", "--config", "r.toml", "-q"]) == 0


def test_experts_that_do_not_fit_name_only_what_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Recipes and NVIDIA's command get as far as this on any model."""
    from streamconv.cli.convert_checkpoint import main as official

    model = str(tiny.write(tmp_path / "model"))
    assert official(["--model_dir", model, "--output_dir", str(tmp_path / "out"), "--moe_tp_size", "2"]) == 4
    told = capsys.readouterr().err
    assert "--moe-tp-size 2 does not divide --tp-size 1" in told and "--moe-ep-size" not in told


# ---- numbers and help


def test_workers_have_an_upper_bound(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model", "--workers", "1024", "--json"]) == 0
    for command in (["plan", "model"], ["convert", "model", "out"]):
        assert main([*command, "--workers", "100000"]) == 2
        assert "--workers 100000: at most 1024" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.commands)
def test_every_flag_has_help(name: str) -> None:
    params = [param for param in cli.commands[name].params if isinstance(param, click.Option)]
    assert params and not [param.name for param in params if not param.help]


def test_every_format_flag_is_a_flag_of_convert() -> None:
    """The check goes by these names."""
    known = {flag for param in convert.params for flag in param.opts}
    assert {flag for quant in all_quants().values() for flag in quant.info.flags} <= known
