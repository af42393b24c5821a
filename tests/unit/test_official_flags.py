"""Every flag of NVIDIA's scripts: it does its work, or is refused or noted with a reason. None is forgotten."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from streamconv.cli import official_flags
from streamconv.cli.convert_checkpoint import main
from streamconv.cli.official_flags import OfficialRequest, parse
from streamconv.errors import UsageError
from tests import tiny


def _words(text: str) -> set[str]:
    return set(text.split())


LLAMA = _words("""
model_dir meta_ckpt_dir output_dir tp_size pp_size cp_size moe_tp_size moe_ep_size dtype workers use_parallel_embedding
embedding_sharding_dim use_embedding_sharing remove_duplicated_kv_heads load_by_shard load_model_on_cpu save_config_only log_level
vocab_size n_positions n_layer n_head n_kv_head n_embd inter_size multiple_of ffn_dim_multiplier rms_norm_eps hidden_act rotary_base
moe_num_experts moe_top_k moe_renorm_mode use_weight_only weight_only_precision disable_weight_only_quant_plugin group_size
quant_ckpt_path smoothquant per_channel per_token per_group int8_kv_cache fp8_kv_cache calib_dataset calib_size calib_max_seq_length
use_fp8 use_fp8_rowwise use_meta_fp8_rowwise_recipe use_qserve use_nvfp4
""")
GEMMA = _words("ckpt_type output_model_dir world_size use_weight_only_with_precision enable_fp8")
OURS = _words("""
memory_budget device target_sm target_version activation_ranges encoding force no_lock rope_tables allow_nonfinite method codes
""")


@dataclass(frozen=True)
class Does:
    """A flag reaches the engine.

    Attributes:
        where: attribute path in the request.
        also: flags that are needed beside it.
    """

    argv: str
    where: str
    value: Any
    also: str = ""


@dataclass(frozen=True)
class Refused:
    """The command stops with status 2 or 4 and these words."""

    argv: str
    words: str


@dataclass(frozen=True)
class Noted:
    """The command goes on, and says why the flag changes nothing."""

    argv: str
    words: str


def _sizes(**values: Any) -> dict[str, Does]:
    return {name: Does(f"--{name} {value}", f"sizes.{name}", value) for name, value in values.items()}


TABLE: dict[str, Does | Refused | Noted] = {
    "model_dir": Does("--model_dir other", "model_dir", "other"),
    "meta_ckpt_dir": Refused("--meta_ckpt_dir m", "exclude each other"),
    "output_dir": Does("--output_dir o", "output_dir", "o"),
    "tp_size": Does("--tp_size 2", "options.tp_size", 2),
    "pp_size": Does("--pp_size 2", "options.pp_size", 2),
    "cp_size": Does("--cp_size 2", "options.cp_size", 2),
    "moe_tp_size": Does("--moe_tp_size 2", "options.moe_tp_size", 2),
    "moe_ep_size": Does("--moe_ep_size 2", "options.moe_ep_size", 2),
    "dtype": Does("--dtype bfloat16", "options.dtype", "bfloat16"),
    "workers": Does("--workers 3", "workers", 3),
    "use_parallel_embedding": Does("--use_parallel_embedding", "options.use_parallel_embedding", True),
    "embedding_sharding_dim": Does("--embedding_sharding_dim 1", "options.embedding_sharding_dim", 1),
    "use_embedding_sharing": Does("--use_embedding_sharing", "options.use_embedding_sharing", True),
    "remove_duplicated_kv_heads": Does("--remove_duplicated_kv_heads", "options.remove_duplicated_kv_heads", True),
    "load_by_shard": Noted("--load_by_shard", "always streamed"),
    "load_model_on_cpu": Noted("--load_model_on_cpu", "never loaded"),
    "save_config_only": Does("--save_config_only", "save_config_only", True),
    "log_level": Does("--log_level Error", "quiet", True),
    "use_weight_only": Does("--use_weight_only", "options.quant", "int8"),
    "weight_only_precision": Does("--weight_only_precision int4", "options.quant", "int4", "--use_weight_only"),
    "disable_weight_only_quant_plugin": Does("--disable_weight_only_quant_plugin", "options.disable_weight_only_quant_plugin", True),
    "group_size": Does("--group_size 64", "options.group_size", 64),
    "quant_ckpt_path": Does("--quant_ckpt_path q", "quant_ckpt_path", "q"),
    "smoothquant": Does("--smoothquant 0.8", "options.smoothquant", 0.8),
    "per_channel": Does("--per_channel", "options.per_channel", True),
    "per_token": Does("--per_token", "options.per_token", True),
    "per_group": Noted("--per_group", "without --use_qserve"),
    "int8_kv_cache": Does("--int8_kv_cache", "options.kv_cache", "int8"),
    "fp8_kv_cache": Does("--fp8_kv_cache", "options.kv_cache", "fp8"),
    "calib_dataset": Does("--calib_dataset t.txt", "calibration", {"text": "t.txt", "samples": 512, "max_length": 512}),
    "calib_size": Does("--calib_size 8", "calibration", {"text": "ccdv/cnn_dailymail", "samples": 8, "max_length": 512}),
    "calib_max_seq_length": Does(
        "--calib_max_seq_length 9", "calibration", {"text": "ccdv/cnn_dailymail", "samples": 512, "max_length": 9}
    ),
    "use_fp8": Does("--use_fp8", "options.quant", "fp8"),
    "enable_fp8": Does("--enable_fp8", "options.quant", "fp8"),
    "use_fp8_rowwise": Does("--use_fp8_rowwise", "options.quant", "fp8_rowwise"),
    "use_meta_fp8_rowwise_recipe": Does("--use_meta_fp8_rowwise_recipe", "options.use_meta_fp8_rowwise_recipe", True),
    "use_qserve": Refused("--use_qserve", "DeepCompressor"),
    "use_nvfp4": Refused("--use_nvfp4", "NVFP4 needs activation ranges"),
    "ckpt_type": Refused("--ckpt_type jax", "--ckpt_type jax is not supported"),
    "output_model_dir": Does("--output_model_dir o", "output_dir", "o"),
    "world_size": Does("--world_size 4", "options.tp_size", 4),
    "use_weight_only_with_precision": Does("--use_weight_only_with_precision int4", "options.quant", "int4"),
    "memory_budget": Does("--memory_budget 1GiB", "memory_budget", "1GiB"),
    "device": Does("--device cpu", "device", "cpu"),
    "target_sm": Does("--target_sm 90", "options.target_sm", 90),
    "target_version": Does("--target_version 0.16", "options.target_version", "0.16"),
    "activation_ranges": Does("--activation_ranges r", "options.activation_ranges", "r"),
    "encoding": Does("--encoding raw", "options.encoding", "raw"),
    "force": Does("--force", "force", True),
    "no_lock": Does("--no_lock", "no_lock", True),
    "rope_tables": Does("--rope_tables", "options.rope_tables", True),
    "method": Does("--method mse", "options.method", "mse"),
    "codes": Does("--codes c", "options.codes", "c"),
    "allow_nonfinite": Does("--allow_nonfinite", "options.allow_nonfinite", True),
} | _sizes(
    vocab_size=100,
    n_positions=99,
    n_layer=3,
    n_head=8,
    n_kv_head=4,
    n_embd=64,
    inter_size=96,
    multiple_of=32,
    ffn_dim_multiplier=1.3,
    rms_norm_eps=1e-05,
    hidden_act="swiglu",
    rotary_base=500000.0,
    moe_num_experts=8,
    moe_top_k=2,
    moe_renorm_mode=0,
)


def _value(request: OfficialRequest, path: str) -> Any:
    found: Any = request
    for name in path.split("."):
        found = getattr(found, name)
    return found


def test_the_table_is_complete() -> None:
    known = {name.removeprefix("--") for action in official_flags._parser()._actions for name in action.option_strings if "--" in name}
    assert set(TABLE) == LLAMA | GEMMA | OURS
    assert known - {"help"} == set(TABLE)


@pytest.mark.parametrize("name", [name for name, what in TABLE.items() if isinstance(what, Does)])
@pytest.mark.parametrize("spelling", ["_", "-"])
def test_it_does_its_work(name: str, spelling: str) -> None:
    what = TABLE[name]
    assert isinstance(what, Does)
    base = [] if name == "model_dir" else ["--model_dir", "m"]
    before, argv = parse([*base, *what.also.split()]), what.argv.split()
    argv[0] = argv[0].replace("_", spelling)
    assert _value(before, what.where) != what.value, "the default already: the test would prove nothing"
    assert _value(parse([*base, *what.also.split(), *argv]), what.where) == what.value


@pytest.mark.parametrize("name", [name for name, what in TABLE.items() if isinstance(what, Refused)])
def test_it_is_refused_with_a_reason(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what = TABLE[name]
    assert isinstance(what, Refused)
    model = tiny.write(tmp_path / "model")
    status = main(["--model_dir", str(model), "--output_dir", str(tmp_path / "out"), *what.argv.split()])
    assert status in (2, 4) and what.words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name, what in TABLE.items() if isinstance(what, Noted)])
def test_it_is_noted_and_changes_nothing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what = TABLE[name]
    assert isinstance(what, Noted)
    base, more = parse(["--model_dir", "m"]), parse(["--model_dir", "m", *what.argv.split()])
    assert base.options == more.options and not base.notes and what.words in more.notes[0]
    model = tiny.write(tmp_path / "model")
    assert main(["--model_dir", str(model), "--output_dir", str(tmp_path / "out"), *what.argv.split()]) == 0
    assert what.words in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--use_fp8", "--enable_fp8"])
@pytest.mark.parametrize("more", [[], ["--save_config_only"]])
def test_fp8_of_an_unquantized_model_needs_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, more: list[str]) -> None:
    """NVIDIA's script measures nothing for it and writes scales that are of no use."""
    model = tiny.write(tmp_path / "model")
    assert main(["--model_dir", str(model), "--output_dir", str(tmp_path / "out"), flag, *more]) == 4
    told = capsys.readouterr().err
    assert "only other tools make these" in told and "--activation_ranges FILE" in told and "--text FILE" in told
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fp8_with_ranges_is_made(tmp_path: Path) -> None:
    model, ranges = tiny.write(tmp_path / "model"), tmp_path / "ranges.safetensors"
    vectors = {}
    for name, value in tiny.tensors().items():
        if "_proj" in name:
            module = name.removesuffix(".weight")
            vectors |= {f"{module}.x": np.ones(value.shape[1], np.float32), f"{module}.y": np.ones(value.shape[0], np.float32)}
    save_file(vectors, ranges)
    out = tmp_path / "out"
    assert main(["--model_dir", str(model), "--output_dir", str(out), "--use_fp8", "--activation_ranges", str(ranges)]) == 0
    assert json.loads((out / "config.json").read_text())["quantization"]["quant_algo"] == "FP8"


def test_every_flag_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert not [action.option_strings for action in official_flags._parser()._actions if not action.help]
    assert main(["--help"]) == 0 and "--model_dir" in capsys.readouterr().out


def test_without_any_flag_it_is_the_config_of_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NVIDIA's script does, into the folder of that name."""
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert [path.name for path in (tmp_path / "tllm_checkpoint").iterdir()] == ["config.json"]


def test_size_flags_never_override_a_source() -> None:
    request = parse(["--model_dir", "m", "--n_layer", "3", "--hidden_act", "gelu"])
    assert request.notes == ("--n_layer, --hidden_act: no effect with --model_dir, whose config decides",)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--model_dir m --meta_ckpt_dir n", "exclude each other"),
        ("--model_dir m --int8_kv_cache --fp8_kv_cache", "exclude each other"),
        ("--model_dir m --tp_size two", "invalid int value"),
        ("--model_dir m --log_level loud", "invalid choice"),
        ("--model_dir m --no_such_flag", "unrecognized arguments"),
        ("--model_dir m --tp 2", "unrecognized arguments"),
    ],
)
def test_bad_command_lines(argv: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse(argv.split())


@pytest.mark.parametrize(
    ("flags", "quant"),
    [
        ("--use_weight_only --use_fp8 --smoothquant 0.5", "int8"),
        ("--use_fp8 --use_nvfp4 --smoothquant 0.5", "fp8"),
        ("--use_nvfp4 --smoothquant 0.5", "nvfp4"),
        ("--smoothquant 0.5 --use_fp8_rowwise", "smoothquant"),
        ("--use_fp8_rowwise --use_qserve", "fp8_rowwise"),
        ("--use_qserve", "qserve"),
        ("--weight_only_precision int4", "none"),
    ],
)
def test_precedence(flags: str, quant: str) -> None:
    assert parse(["--model_dir", "m", *flags.split()]).options.quant == quant


# ---- without a checkpoint


def _fabricate(out: Path, *flags: str) -> dict[str, Any]:
    assert main(["--output_dir", str(out), *flags]) == 0
    assert [path.name for path in out.iterdir()] == ["config.json"]
    made: dict[str, Any] = json.loads((out / "config.json").read_text())
    return made


def test_fabricated_from_the_defaults(tmp_path: Path) -> None:
    made = _fabricate(tmp_path / "out", "--target_version", "0.16")
    wanted = {
        "architecture": "LlamaForCausalLM",
        "dtype": "float16",
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "norm_epsilon": 1e-06,
        "hidden_act": "silu",
        "rotary_base": 10000.0,
        "multiple_of": None,
        "ffn_dim_multiplier": None,
        "quant_ckpt_path": None,
        "load_model_on_cpu": False,
    }
    assert {key: made[key] for key in wanted} == wanted
    assert made["moe"]["num_experts"] == made["moe"]["top_k"] == 0


@pytest.mark.parametrize(
    ("flags", "path", "value"),
    [
        ("--n_kv_head 8", "num_key_value_heads", 8),
        ("--n_positions 99 --n_layer 4 --pp_size 2", "num_hidden_layers", 4),
        ("--rotary_base 5e5", "rotary_base", 500000.0),
        ("--multiple_of 256 --ffn_dim_multiplier 1.3", "ffn_dim_multiplier", 1.3),
        ("--moe_num_experts 8", "moe.top_k", 1),
        ("--moe_num_experts 8 --moe_top_k 2 --moe_renorm_mode 2", "moe.normalization_mode", 2),
        ("--tp_size 2 --pp_size 2", "mapping.world_size", 4),
        ("--use_weight_only --weight_only_precision int4", "quantization.quant_algo", "W4A16"),
        ("--use_weight_only --weight_only_precision int4_gptq --group_size 64", "quantization.group_size", 64),
        ("--use_weight_only --weight_only_precision int4_gptq", "quantization.has_zero_point", True),
        ("--smoothquant 0.8 --per_token", "quantization.quant_algo", "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN"),
        ("--use_fp8", "quantization.quant_algo", "FP8"),
        ("--use_nvfp4", "quantization.quant_algo", "NVFP4"),
        ("--use_qserve", "quantization.quant_algo", "W4A8_QSERVE_PER_CHANNEL"),
        ("--use_qserve --per_group", "quantization.quant_algo", "W4A8_QSERVE_PER_GROUP"),
        ("--use_fp8_rowwise", "quantization.clamp_val", [-1200.0, 1200.0]),
        ("--int8_kv_cache", "quantization.kv_cache_quant_algo", "INT8"),
        ("--load_model_on_cpu", "load_model_on_cpu", True),
        ("--dtype bfloat16", "dtype", "bfloat16"),
        ("--use_parallel_embedding --tp_size 2", "use_parallel_embedding", True),
        ("--use_embedding_sharing --target_version 0.16", "share_embedding_table", True),
    ],
)
def test_fabricated_by_flag(tmp_path: Path, flags: str, path: str, value: Any) -> None:
    found: Any = _fabricate(tmp_path / "out", *flags.split())
    for key in path.split("."):
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tp_size 3", "--tp-size 3 does not divide num_attention_heads 32"),
        ("--n_embd 100", "not a multiple of --n_head 32"),
        ("--n_layer 0", "--n_layer 0 is not a positive number"),
        ("--moe_top_k 2", "goes with --moe_num_experts"),
        ("--target_version 0.9", "--target_version 0.9 is not known"),
    ],
)
def test_fabricated_sizes_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, words: str) -> None:
    assert main(["--output_dir", str(tmp_path / "out"), *flags.split()]) in (2, 4)
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---- --save_config_only


@pytest.mark.parametrize("flags", [["--tp_size", "2"], ["--use_weight_only", "--dtype", "bfloat16", "--target_version", "0.16"]])
def test_save_config_only_is_the_config_of_the_conversion(tmp_path: Path, flags: list[str]) -> None:
    model, whole, alone = tiny.write(tmp_path / "model"), tmp_path / "whole", tmp_path / "alone"
    sm = ["--target_sm", "80"] if "--use_weight_only" in flags else []
    assert main(["--model_dir", str(model), "--output_dir", str(whole), *flags, *sm]) == 0
    assert main(["--model_dir", str(model), "--output_dir", str(alone), *flags, "--save_config_only"]) == 0
    assert [path.name for path in alone.iterdir()] == ["config.json"]
    assert (alone / "config.json").read_bytes() == (whole / "config.json").read_bytes()


def test_save_config_only_destroys_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tiny.write(tmp_path / "model"), tmp_path / "out"
    command = ["--model_dir", str(model), "--save_config_only"]
    out.mkdir()
    (out / "rank0.safetensors").write_bytes(b"mine")
    assert main([*command, "--output_dir", str(out)]) == 6
    assert "--force replaces it" in capsys.readouterr().err
    assert main([*command, "--output_dir", str(model)]) == 6
    assert main([*command, "--output_dir", str(out), "--force"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
