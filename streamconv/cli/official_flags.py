"""NVIDIA's command line, flag by flag, and what each asks of us.

The flags of both release lines and of the Llama, Qwen, Phi and Gemma scripts are known; `_` and `-` are the same.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import Field, dataclass, fields
from typing import Any, NoReturn

from streamconv.cli import output
from streamconv.errors import UsageError
from streamconv.targets.base import choices_of
from streamconv.targets.trtllm.options import TensorRTLLM

_LEVELS = ("internal_error", "error", "warning", "info", "verbose", "debug", "trace")
_NATIVE = re.compile(r"--([a-z-]+)")
_FORMATS = {"use_fp8": "fp8", "enable_fp8": "fp8", "use_nvfp4": "nvfp4", "smoothquant": "smoothquant"}
_FORMATS |= {"use_fp8_rowwise": "fp8_rowwise", "use_qserve": "qserve"}
"""Flag -> format, the first counts; those of weights alone come before them."""
_PRECISIONS = ("int8", "int4", "int8_gptq", "int4_gptq", "int4_awq")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The size flags: each names a field of config.json, with the official default."""

    vocab_size: int = 32000
    n_positions: int = 2048
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int | None = None
    n_embd: int = 4096
    inter_size: int = 11008
    multiple_of: int | None = None
    ffn_dim_multiplier: float | None = None
    rms_norm_eps: float = 1e-06
    hidden_act: str = "silu"
    rotary_base: float = 10000.0
    moe_num_experts: int = 0
    moe_top_k: int = 0
    moe_renorm_mode: int = 1


class OfficialRequest(argparse.Namespace):
    """A parsed official command line: its flags, and what they mean together.

    Attributes:
        calibration: arguments for `calibrate`, should ranges be needed and not given.
        notes: flags that were given and change nothing, each with the reason.
        options: of the target; each that was typed is an attribute of its own, too.
        quiet: --log_level asks for warnings at most.
        sizes: the size flags; used when neither input folder is given.
    """

    calibration: dict[str, Any]
    device: str
    force: bool
    load_model_on_cpu: bool
    memory_budget: str | None
    meta_ckpt_dir: str | None
    model_dir: str | None
    no_lock: bool
    notes: tuple[str, ...]
    options: TensorRTLLM
    output_dir: str
    per_group: bool
    quant_ckpt_path: str | None
    quiet: bool
    save_config_only: bool
    sizes: Sizes


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint="streamconv-convert-checkpoint --help")

    def print_help(self, file: Any = None) -> None:
        output.block(self.format_help().rstrip("\n").split("\n"))  # argparse's own swallows a write that fails


def _parser() -> _Parser:
    parser = _Parser(prog="streamconv-convert-checkpoint", allow_abbrev=False, description="NVIDIA's flags, streamed.")

    def add(name: str, what: str, *others: str, **settings: Any) -> None:
        parser.add_argument("--" + name, *others, help=what, **settings)

    def flag(name: str, what: str) -> None:
        add(name, what, action="store_true")

    source = parser.add_argument_group("input and output")
    source.add_argument("--model_dir", help="Hugging Face folder, or org/name on the Hub")
    source.add_argument("--meta_ckpt_dir", help="Meta's folder: consolidated.*.pth and params.json")
    source.add_argument("--quant_ckpt_path", help="the quantized weights, for int4_gptq, int8_gptq and int4_awq")
    source.add_argument("--output_dir", "--output_model_dir", default="tllm_checkpoint", help="folder to write (%(default)s)")
    checkpoint = parser.add_argument_group("the checkpoint")
    for field in fields(TensorRTLLM):
        _add_option(checkpoint, field, field.metadata["official"])
    add("ckpt_type", "Gemma script; only hf", choices=["jax", "keras", "torch", "hf"], default="hf")
    add("workers", "threads", type=int, default=1)
    flag("load_by_shard", "no effect, weights are always streamed")
    flag("load_model_on_cpu", "no effect, the model is never loaded")
    flag("save_config_only", "write config.json and no weights")
    add("log_level", "error and warning: no progress", choices=_LEVELS, type=str.lower, default="info")
    for size in fields(Sizes):
        kind = str if size.type == "str" else float if str(size.type).startswith("float") else int
        add(size.name, "only without --model_dir and --meta_ckpt_dir, when config.json is all there is to write", type=kind)
    flag("use_weight_only", "quantize weights alone, see --weight_only_precision")
    add("weight_only_precision", "the format of --use_weight_only", choices=_PRECISIONS, default="int8")
    add("use_weight_only_with_precision", "Gemma script: both in one", choices=_PRECISIONS)
    flag("per_group", "config.json alone: QServe with scales for groups")
    flag("int8_kv_cache", "INT8 KV cache; measured on --calib_dataset")
    flag("fp8_kv_cache", "FP8 KV cache")
    add(
        "calib_dataset", "calibration text: a .txt or .jsonl file, a folder of them, or a data set on the Hub", default="ccdv/cnn_dailymail"
    )
    add("calib_size", "calibration samples", type=int, default=512)
    add("calib_max_seq_length", "tokens of a calibration sample", type=int, default=512)
    flag("use_fp8", "FP8; needs --activation_ranges")
    flag("enable_fp8", "Gemma script: --use_fp8")
    flag("use_fp8_rowwise", "FP8, one scale for each output channel and token")
    flag("use_qserve", "config.json alone: DeepCompressor makes the weights")
    flag("use_nvfp4", "config.json alone: ModelOpt makes the weights")
    ours = parser.add_argument_group("ours")
    ours.add_argument("--memory_budget", help="ceiling of this process's memory, e.g. 2GiB")
    ours.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0 or cuda:0,cuda:1")
    for field in fields(TensorRTLLM):
        _add_option(ours, field, (f"--{field.name}",) if field.metadata["added"] else ())
    ours.add_argument("--force", action="store_true", help="replace an existing output folder")
    ours.add_argument("--no_lock", action="store_true", help="write even where the file system cannot lock a file or sync a folder")
    return parser


def _add_option(group: argparse._ArgumentGroup, field: Field[Any], spelled: tuple[str, ...]) -> None:
    """The flag of an option of the target, absent from the parsed arguments unless it is typed."""
    if not spelled:
        return
    facts, choices = field.metadata, choices_of(field)
    text = _NATIVE.sub(lambda name: "--" + name[1].replace("-", "_"), facts["help"])
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
    if facts["type"] is bool:
        group.add_argument(*spelled, action="store_true", **settings)
    else:
        shown = facts["metavar"] or (f"{{{','.join(map(str, choices))}}}" if choices else None)
        group.add_argument(*spelled, type=facts["type"], metavar=shown, **settings)


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, mark, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + mark + value


def parse(argv: list[str]) -> OfficialRequest:
    """Read an official command line. Raises UsageError: an unknown flag, a bad value, or flags that contradict each other."""
    args = _parser().parse_args([_underscored(argument) for argument in argv], OfficialRequest())
    if args.model_dir and args.meta_ckpt_dir:
        raise UsageError("--model_dir and --meta_ckpt_dir exclude each other")
    if args.ckpt_type != "hf":
        raise UsageError(f"--ckpt_type {args.ckpt_type} is not supported", hint="only Hugging Face checkpoints are")
    if args.int8_kv_cache and args.fp8_kv_cache:
        raise UsageError("--int8_kv_cache and --fp8_kv_cache exclude each other")
    typed = {field.name: getattr(args, field.name) for field in fields(TensorRTLLM) if hasattr(args, field.name)}
    kv_cache = "int8" if args.int8_kv_cache else "fp8" if args.fp8_kv_cache else None
    args.options = TensorRTLLM(**typed, quant=_quant(args), kv_cache=kv_cache)
    args.options.check_values(lambda name: f"--{name}")
    sizes = {size.name: getattr(args, size.name) for size in fields(Sizes) if getattr(args, size.name) is not None}
    args.sizes, args.notes = Sizes(**sizes), tuple(_notes(args, [*sizes]))
    args.quiet = _LEVELS.index(args.log_level) <= _LEVELS.index("warning")
    args.calibration = {"text": args.calib_dataset, "samples": args.calib_size, "max_length": args.calib_max_seq_length}
    return args


def _notes(args: argparse.Namespace, sizes: list[str]) -> list[str]:
    """Flags that the official script takes and that change nothing: it says nothing, we do."""
    source = "--model_dir" if args.model_dir else "--meta_ckpt_dir" if args.meta_ckpt_dir else None
    names = ", ".join(f"--{name}" for name in sizes)
    notes = {
        f"{names}: no effect with {source}, whose config decides": sizes and source,
        "--load_by_shard: no effect, weights are always streamed": args.load_by_shard,
        "--load_model_on_cpu: no effect, the model is never loaded": args.load_model_on_cpu and source,
        "--per_group: no effect without --use_qserve": args.per_group and not args.use_qserve,
        "--save_config_only: without a checkpoint config.json is all there is to write": args.save_config_only and not source,
    }
    return [note for note, said in notes.items() if said]


def _quant(args: argparse.Namespace) -> str:
    """The format of the first flag in the official precedence that was given; `smoothquant` is absent otherwise."""
    if args.use_weight_only_with_precision:
        return str(args.use_weight_only_with_precision)
    if args.use_weight_only:
        return str(args.weight_only_precision)
    return next((quant for name, quant in _FORMATS.items() if getattr(args, name, False) is not False), "none")
