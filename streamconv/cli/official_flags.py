"""NVIDIA's command line, flag by flag (checkpoint spec §8), and what each asks of us.

The flags of both release lines and of the Llama, Qwen, Phi and Gemma scripts are known; `_` and `-` are the same.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from streamconv.cli.fabricate import Sizes
from streamconv.errors import UsageError
from streamconv.options import Options

_LEVELS = ("internal_error", "error", "warning", "info", "verbose", "debug", "trace")
_PRECISIONS = ("int8", "int4", "int8_gptq", "int4_gptq", "int4_awq")


@dataclass(frozen=True, slots=True)
class OfficialRequest:
    """A parsed official command line.

    Attributes:
        quiet: --log_level asks for warnings at most.
        calibration: arguments for `calibrate`, should ranges be needed and not given.
        sizes: the size flags; used when neither input folder is given.
        notes: flags that were given and change nothing, each with the reason.
    """

    model_dir: str | None
    meta_ckpt_dir: str | None
    output_dir: str
    options: Options
    memory_budget: str | None
    workers: int
    device: str
    force: bool
    quiet: bool
    save_config_only: bool
    load_model_on_cpu: bool
    per_group: bool
    quant_ckpt_path: str | None
    calibration: dict[str, Any]
    sizes: Sizes
    notes: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint="streamconv-convert-checkpoint --help")


def _parser() -> _Parser:
    parser = _Parser(prog="streamconv-convert-checkpoint", allow_abbrev=False, description="NVIDIA's flags, streamed.")

    def add(name: str, *others: str, **settings: Any) -> None:
        parser.add_argument("--" + name, *others, **settings)

    def flag(*names: str) -> None:
        for name in names:
            add(name, action="store_true")

    source = parser.add_argument_group("input and output")
    for name in ("model_dir", "meta_ckpt_dir", "quant_ckpt_path"):
        source.add_argument("--" + name)
    source.add_argument("--output_dir", "--output_model_dir", default="tllm_checkpoint")
    add("ckpt_type", choices=["jax", "keras", "torch", "hf"], default="hf", help="Gemma script; only hf")
    add("tp_size", "--world_size", type=int, default=1)
    for name, default in (("pp_size", 1), ("cp_size", 1), ("moe_tp_size", -1), ("moe_ep_size", -1), ("workers", 1)):
        add(name, type=int, default=default)
    add("dtype", choices=["auto", "float16", "bfloat16", "float32"], default="auto")
    flag("use_parallel_embedding", "use_embedding_sharing", "remove_duplicated_kv_heads", "load_by_shard")
    flag("load_model_on_cpu", "save_config_only", "disable_weight_only_quant_plugin")
    add("embedding_sharding_dim", type=int, choices=[0, 1], default=0)
    add("log_level", choices=_LEVELS, type=str.lower, default="info", help="error and warning: no progress")
    for size in fields(Sizes):
        kind = str if size.type == "str" else float if str(size.type).startswith("float") else int
        add(size.name, type=kind, help="only without --model_dir and --meta_ckpt_dir, when config.json is all there is to write")
    flag("use_weight_only", "per_channel", "per_token", "per_group", "int8_kv_cache", "fp8_kv_cache")
    add("weight_only_precision", choices=_PRECISIONS, default="int8")
    add("use_weight_only_with_precision", choices=_PRECISIONS, help="Gemma script")
    add("group_size", type=int, default=128)
    add("smoothquant", "-sq", type=float)
    add("calib_dataset", default="ccdv/cnn_dailymail")
    add("calib_size", type=int, default=512)
    add("calib_max_seq_length", type=int, default=512)
    flag("use_fp8", "enable_fp8", "use_fp8_rowwise", "use_meta_fp8_rowwise_recipe", "use_qserve", "use_nvfp4")
    ours = parser.add_argument_group("ours")
    ours.add_argument("--memory_budget")
    ours.add_argument("--device", default="auto")
    ours.add_argument("--target_sm", type=int)
    ours.add_argument("--target_version", default="1.2")
    ours.add_argument("--activation_ranges")
    ours.add_argument("--encoding", choices=["processed", "raw"], default="processed")
    ours.add_argument("--force", action="store_true")
    ours.add_argument("--rope_tables", action="store_true")
    ours.add_argument("--allow_nonfinite", action="store_true")
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
    options = Options(
        tp_size=args.tp_size,
        pp_size=args.pp_size,
        cp_size=args.cp_size,
        moe_tp_size=args.moe_tp_size,
        moe_ep_size=args.moe_ep_size,
        dtype=args.dtype,
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
        quiet=_LEVELS.index(args.log_level) <= _LEVELS.index("warning"),
        save_config_only=args.save_config_only,
        load_model_on_cpu=args.load_model_on_cpu,
        per_group=args.per_group,
        quant_ckpt_path=args.quant_ckpt_path,
        calibration={"text": args.calib_dataset, "samples": args.calib_size, "max_length": args.calib_max_seq_length},
        sizes=Sizes(**given),
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
