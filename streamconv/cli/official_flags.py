"""NVIDIA's command line, flag by flag (checkpoint spec §8), and what each asks of us.

The flags of both release lines and of the Llama, Qwen, Phi and Gemma scripts are known; `_` and `-` are the same.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from streamconv.cli import output
from streamconv.cli.config_from_flags import Sizes
from streamconv.errors import UsageError
from streamconv.targets.trtllm.options import TensorRTLLM

_LEVELS = ("internal_error", "error", "warning", "info", "verbose", "debug", "trace")
_PRECISIONS = ("int8", "int4", "int8_gptq", "int4_gptq", "int4_awq")


@dataclass(frozen=True, slots=True)
class OfficialRequest:
    """A parsed official command line.

    Attributes:
        quiet: --log_level asks for warnings at most.
        calibration: arguments for `calibrate`, should ranges be needed and not given.
        sizes: the size flags; used when neither input folder is given.
        states_dtype: --dtype was given.
        notes: flags that were given and change nothing, each with the reason.
    """

    model_dir: str | None
    meta_ckpt_dir: str | None
    output_dir: str
    options: TensorRTLLM
    memory_budget: str | None
    workers: int
    device: str
    force: bool
    no_lock: bool
    quiet: bool
    save_config_only: bool
    load_model_on_cpu: bool
    per_group: bool
    quant_ckpt_path: str | None
    calibration: dict[str, Any]
    sizes: Sizes
    states_dtype: bool
    notes: tuple[str, ...]


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
    add("ckpt_type", "Gemma script; only hf", choices=["jax", "keras", "torch", "hf"], default="hf")
    add("tp_size", "tensor parallel size", "--world_size", type=int, default=1)
    add("pp_size", "pipeline parallel size", type=int, default=1)
    add("cp_size", "context parallel size (1.2)", type=int, default=1)
    add("moe_tp_size", "tensor parallel size inside experts", type=int, default=-1)
    add("moe_ep_size", "expert parallel size", type=int, default=-1)
    add("workers", "threads", type=int, default=1)
    add("dtype", "type of what is not quantized", choices=["auto", "float16", "bfloat16", "float32"])
    flag("use_parallel_embedding", "split the embedding over ranks")
    add("embedding_sharding_dim", "split the vocabulary (0) or the hidden size (1)", type=int, choices=[0, 1], default=0)
    flag("use_embedding_sharing", "leave lm_head out where that is legal (0.16)")
    flag("remove_duplicated_kv_heads", "the source holds every KV head twice: keep one of each pair")
    flag("load_by_shard", "no effect, weights are always streamed")
    flag("load_model_on_cpu", "no effect, the model is never loaded")
    flag("save_config_only", "write config.json and no weights")
    flag("disable_weight_only_quant_plugin", "recorded in config.json for the engine builder")
    add("log_level", "error and warning: no progress", choices=_LEVELS, type=str.lower, default="info")
    for size in fields(Sizes):
        kind = str if size.type == "str" else float if str(size.type).startswith("float") else int
        add(size.name, "only without --model_dir and --meta_ckpt_dir, when config.json is all there is to write", type=kind)
    flag("use_weight_only", "quantize weights alone, see --weight_only_precision")
    add("weight_only_precision", "the format of --use_weight_only", choices=_PRECISIONS, default="int8")
    add("use_weight_only_with_precision", "Gemma script: both in one", choices=_PRECISIONS)
    add("group_size", "weights that share a scale (GPTQ, AWQ)", type=int, default=128)
    add("smoothquant", "SmoothQuant with this alpha", "-sq", type=float)
    flag("per_channel", "SmoothQuant: a weight scale for each output channel")
    flag("per_token", "SmoothQuant: activation scales for each token, at run time")
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
    flag("use_meta_fp8_rowwise_recipe", "--use_fp8_rowwise: attention and the first and last layer stay unquantized")
    flag("use_qserve", "config.json alone: DeepCompressor makes the weights")
    flag("use_nvfp4", "config.json alone: ModelOpt makes the weights")
    ours = parser.add_argument_group("ours")
    ours.add_argument("--memory_budget", help="ceiling of this process's memory, e.g. 2GiB")
    ours.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0 or cuda:0,cuda:1")
    ours.add_argument("--target_sm", type=int, help="GPU generation the bytes are for: 80, 86, 89, 90, ...")
    ours.add_argument("--target_version", default="1.2", help="TensorRT-LLM line: 0.16, 1.0 (any 1.x) or 1.2")
    ours.add_argument("--activation_ranges", help="ranges that `streamconv calibrate` measured")
    ours.add_argument(
        "--encoding",
        choices=["processed", "raw"],
        default="processed",
        help="int8 and int4: laid out for --target_sm, or left for trtllm-build to quantize",
    )
    ours.add_argument("--force", action="store_true", help="replace an existing output folder")
    ours.add_argument("--no_lock", action="store_true", help="go on where the file system cannot lock a file or sync a folder")
    ours.add_argument("--rope_tables", action="store_true", help="also write the rotary tables of NVIDIA's script")
    ours.add_argument("--allow_nonfinite", action="store_true", help="quantize NaN (as 0) and infinity (as the channel's maximum)")
    return parser


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, mark, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + mark + value


def parse(argv: list[str]) -> OfficialRequest:
    """Read an official command line.

    Raises:
        UsageError: an unknown flag, a bad value, or flags that contradict each other.
    """
    args = _parser().parse_args([_underscored(argument) for argument in argv])
    if args.model_dir and args.meta_ckpt_dir:
        raise UsageError("--model_dir and --meta_ckpt_dir exclude each other")
    if args.ckpt_type != "hf":
        raise UsageError(f"--ckpt_type {args.ckpt_type} is not supported", hint="only Hugging Face checkpoints are")
    if args.int8_kv_cache and args.fp8_kv_cache:
        raise UsageError("--int8_kv_cache and --fp8_kv_cache exclude each other")
    options = TensorRTLLM(
        tp_size=args.tp_size,
        pp_size=args.pp_size,
        cp_size=args.cp_size,
        moe_tp_size=args.moe_tp_size,
        moe_ep_size=args.moe_ep_size,
        dtype=args.dtype or "auto",
        quant=_quant(args),
        kv_cache="int8" if args.int8_kv_cache else "fp8" if args.fp8_kv_cache else None,
        group_size=args.group_size,
        target_sm=args.target_sm,
        target_version=args.target_version,
        encoding=args.encoding,
        use_parallel_embedding=args.use_parallel_embedding,
        embedding_sharding_dim=args.embedding_sharding_dim,
        use_embedding_sharing=args.use_embedding_sharing,
        remove_duplicated_kv_heads=args.remove_duplicated_kv_heads,
        disable_weight_only_quant_plugin=args.disable_weight_only_quant_plugin,
        use_meta_fp8_rowwise_recipe=args.use_meta_fp8_rowwise_recipe,
        smoothquant=args.smoothquant if args.smoothquant is not None else 0.5,
        activation_ranges=args.activation_ranges,
        per_channel=args.per_channel,
        per_token=args.per_token,
        rope_tables=args.rope_tables,
        allow_nonfinite=args.allow_nonfinite,
    )
    given = {size.name: getattr(args, size.name) for size in fields(Sizes) if getattr(args, size.name) is not None}
    return OfficialRequest(
        model_dir=args.model_dir,
        meta_ckpt_dir=args.meta_ckpt_dir,
        output_dir=args.output_dir,
        options=options,
        memory_budget=args.memory_budget,
        workers=args.workers,
        device=args.device,
        force=args.force,
        no_lock=args.no_lock,
        quiet=_LEVELS.index(args.log_level) <= _LEVELS.index("warning"),
        save_config_only=args.save_config_only,
        load_model_on_cpu=args.load_model_on_cpu,
        per_group=args.per_group,
        quant_ckpt_path=args.quant_ckpt_path,
        calibration={"text": args.calib_dataset, "samples": args.calib_size, "max_length": args.calib_max_seq_length},
        sizes=Sizes(**given),
        states_dtype=args.dtype is not None,
        notes=tuple(_notes(args, given)),
    )


def _notes(args: argparse.Namespace, given: dict[str, Any]) -> list[str]:
    """Flags that the official script takes and that change nothing: it says nothing, we do."""
    source = "--model_dir" if args.model_dir else "--meta_ckpt_dir" if args.meta_ckpt_dir else None
    notes = []
    if given and source:
        names = ", ".join(f"--{name}" for name in given)
        notes.append(f"{names}: no effect with {source}, whose config decides")
    if args.load_by_shard:
        notes.append("--load_by_shard: no effect, weights are always streamed")
    if args.load_model_on_cpu and source:
        notes.append("--load_model_on_cpu: no effect, the model is never loaded")
    if args.per_group and not args.use_qserve:
        notes.append("--per_group: no effect without --use_qserve")
    if args.save_config_only and not source:
        notes.append("--save_config_only: without a checkpoint config.json is all there is to write")
    return notes


def _quant(args: argparse.Namespace) -> str:
    """The official precedence: weight-only, fp8, nvfp4, smoothquant, fp8 rowwise, qserve."""
    if args.use_weight_only_with_precision:
        return str(args.use_weight_only_with_precision)
    if args.use_weight_only:
        return str(args.weight_only_precision)
    if args.use_fp8 or args.enable_fp8:
        return "fp8"
    if args.use_nvfp4:
        return "nvfp4"
    if args.smoothquant is not None:
        return "smoothquant"
    if args.use_fp8_rowwise:
        return "fp8_rowwise"
    if args.use_qserve:
        return "qserve"
    return "none"
