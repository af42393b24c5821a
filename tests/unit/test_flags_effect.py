"""A flag that was typed does something, or the command says that it does not. What a recipe holds is never complained about."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
import numpy as np
import pytest

from streamconv import device
from streamconv.cli import official_flags
from streamconv.cli.conversion import convert, plan
from streamconv.cli.main import VERBS, cli, main
from streamconv.targets import TARGETS, target_class
from streamconv.targets.base import flag
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes import all_quants
from tests import tiny

RAW8 = ["--quant", "int8", "--encoding", "raw"]
HF = ["--to", "hf"]
AT80 = ["--quant", "int8", "--target-sm", "80"]

NOTHING: dict[str, tuple[list[str], str]] = {
    "samples": (["--samples", "8"], "--samples has no effect without --text"),
    "the default, typed": (["--samples", "512"], "--samples has no effect without --text"),
    "max-length": (["--max-length", "8"], "--max-length has no effect without --text"),
    "batch-size": (["--batch-size", "2"], "--batch-size has no effect without --text"),
    "smoothquant": ([*AT80, "--smoothquant", "0.8"], "--smoothquant has no effect with --quant int8, it is for smoothquant"),
    "per-channel": (["--per-channel"], "--per-channel has no effect with --quant none"),
    "per-token": ([*AT80, "--per-token"], "--per-token has no effect with --quant int8"),
    "group-size": ([*AT80, "--group-size", "64"], "--group-size has no effect with --quant int8, it is for int4_awq, int4_gptq, int8_gptq"),
    "group-size, none": (["--group-size", "64"], "--group-size has no effect with --quant none"),
    "embedding": (["--embedding-sharding-dim", "1"], "--embedding-sharding-dim has no effect without --use-parallel-embedding"),
    "encoding": (["--encoding", "raw"], "--encoding has no effect with --quant none, it is for int8, int4"),
    "encoding, awq": (["--quant", "int4_awq", "--encoding", "raw"], "--encoding has no effect with --quant int4_awq"),
    "meta": ([*RAW8, "--use-meta-fp8-rowwise-recipe"], "--use-meta-fp8-rowwise-recipe has no effect with --quant int8"),
    "moe-tp": (["--tp-size", "2", "--moe-tp-size", "2"], "--moe-tp-size has no effect, this model has no experts"),
    "moe-ep": (["--moe-ep-size", "2"], "--moe-ep-size has no effect, this model has no experts"),
    "method": ([*AT80, "--method", "rtn"], "--method has no effect with --quant int8, it is for int4_awq"),
    "hf, method": ([*HF, "--quant", "w8a16", "--method", "rtn"], "--method has no effect with --quant w8a16, it is for w4a16"),
    "hf, group-size": (
        [*HF, "--quant", "fp8_dynamic", "--group-size", "64"],
        "--group-size has no effect with --quant fp8_dynamic, it is for w4a16, w8a16",
    ),
    "hf, group-size, container": (
        [*HF, "--quant", "w8a16", "--format", "modelopt", "--group-size", "64"],
        "--group-size has no effect with --format modelopt, it is for compressed-tensors",
    ),
    "hf, group-size, none": ([*HF, "--group-size", "64"], "--group-size has no effect with --quant none"),
    "hf, arithmetic": (
        [*HF, "--quant", "fp8_block", "--arithmetic", "llm-compressor"],
        "--arithmetic has no effect with --format hf, it is for compressed-tensors",
    ),
    "hf, arithmetic, none": ([*HF, "--arithmetic", "llm-compressor"], "--arithmetic has no effect with --quant none"),
    "hf, ignore, none": ([*HF, "--ignore", "*.q_proj", "lm_head"], "--ignore has no effect with --quant none"),
    "hf, format, none": ([*HF, "--format", "modelopt"], "--format is for quantized weights: --quant none has none"),
    "hf, of the other target": ([*HF, "--tp-size", "2", "--per-token"], "--tp-size, --per-token: not for --to hf"),
    "of the other target": (["--arithmetic", "float32"], "--arithmetic: not for --to trtllm"),
}
CONVERT_ALONE = {"samples", "the default, typed", "max-length", "batch-size"}
RESOURCES = {
    "hub-keep": (["--hub-keep", "none"], "--hub-keep has no effect with a local model"),
    "device memory": (["--device", "cpu", "--device-memory-budget", "1GiB"], "--device-memory-budget has no effect with --device cpu"),
    "device loss": (["--device", "cpu", "--on-device-loss", "stop"], "--on-device-loss has no effect with --device cpu"),
    "of a Hugging Face directory": ([*HF, "--hub-keep", "none"], "--hub-keep has no effect with a local model"),
}


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


@pytest.mark.parametrize(("flags", "says"), RESOURCES.values(), ids=RESOURCES)
def test_resources_are_noted_and_the_conversion_runs(
    flags: list[str], says: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "model", "out", *flags, "-q"]) == 0
    assert f"note: {says}\n" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").exists()


def test_how_the_source_is_read_is_noted_too(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", "model", "out", "--read", "map", "--device", "cuda"])
    assert "note: --read has no effect with --device cuda\n" in capsys.readouterr().err


def test_resources_of_a_verify_without_a_source_are_noted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "model", "out", "-q"]) == 0
    assert main(["verify", "out", "--workers", "2", "--memory-budget", "1GiB"]) == 0
    told = capsys.readouterr().err
    assert "note: --workers has no effect without --source" in told and "note: --memory-budget has no effect without --source" in told
    assert main(["verify", "out", "--activation-ranges", "absent"]) == 2
    assert "--activation-ranges has no effect without --source" in capsys.readouterr().err


def test_several_words_after_ignore(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*HF, "--quant", "fp8_dynamic", "--ignore", "*.up_proj", "*.gate_proj", "lm_head"]
    assert main(["plan", "model", "out", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["ignore"] == ["*.up_proj", "*.gate_proj", "lm_head"]
    assert main(["plan", "model", "out", "word"]) == 2
    assert "one word too many: word" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--quant", "bogus"], "smoothquant"),
        (["--encoding", "bogus"], "processed"),
        (["--kv-cache", "bogus"], "fp8"),
        (["--target-sm", "81"], "120, 121"),
        (["--embedding-sharding-dim", "2", "--use-parallel-embedding"], "0, 1"),
        ([*HF, "--quant", "bogus"], "nvfp4a16"),
        ([*HF, "--format", "bogus"], "compressed-tensors"),
        ([*HF, "--arithmetic", "bogus"], "llm-compressor-cpu"),
        (["--to", "bogus"], "trtllm"),
    ],
)
def test_a_wrong_choice_names_the_choices(flags: list[str], names: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model", *flags]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and names in told and (flags[-1] in told or flags[1] in told)


def test_every_option_of_every_target_is_a_flag() -> None:
    """Of convert and plan, and those with NVIDIA's spelling of the drop-in command: nobody lists them by hand."""
    fields = {flag(field.name): field for key in TARGETS for field in dataclasses.fields(target_class(key))}
    for command in (convert, plan):
        assert set(fields) <= {name for param in command.params for name in param.opts}
    known = {name for action in official_flags._parser()._actions for name in action.option_strings}
    official = {name for field in dataclasses.fields(TensorRTLLM) for name in field.metadata["official"]}
    added = {f"--{field.name}" for field in dataclasses.fields(TensorRTLLM) if field.metadata["added"]}
    assert official | added <= known and official and added


def test_help_groups_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    told = capsys.readouterr().out
    headings = ["Options:", *(f"Options of --to {to}:" for to in ("trtllm and hf", "trtllm", "hf")), "Calibration:", "Resources:"]
    places = [told.index(f"\n{heading}\n") for heading in headings]
    assert places == sorted(places)
    for name, heading in (("--tp-size", 2), ("--ignore", 3), ("--quant ", 1), ("--text", 4), ("--workers", 5)):
        place = told.index(f"\n  {name}")
        assert places[heading] < place and (heading == 5 or place < places[heading + 1])


def test_all_of_them_at_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "model", "out", "--samples", "4", "--per-token", "--json"]) == 2
    message = json.loads(capsys.readouterr().out)["message"]
    assert "--samples has no effect" in message and "--per-token has no effect" in message


def test_device_memory_without_a_gpu(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "model", "--device-memory-budget", "1GiB", "--json"]
    monkeypatch.setattr(device, "visible", lambda: 1)
    assert main(flags) == 0 and "note" not in capsys.readouterr().err
    monkeypatch.setattr(device, "visible", lambda: 0)
    assert main(flags) == 0 and "on a machine without a GPU" in capsys.readouterr().err


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
    packed = {"model.layers.0.self_attn.q_proj.qweight": np.zeros((8, 64), np.int32)}
    tiny.write(model, tiny.tensors() | packed, settings)
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


@pytest.mark.parametrize("name", VERBS)
def test_every_flag_has_help(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None and command.name == name
    params = [param for param in command.params if isinstance(param, click.Option)]
    assert params and not [param.name for param in params if not param.help]


def test_every_format_flag_is_a_flag_of_convert() -> None:
    """The check goes by these names."""
    known = {flag for param in convert.params for flag in param.opts}
    assert {flag for quant in all_quants().values() for flag in quant.info.flags} <= known
