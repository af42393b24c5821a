"""What a user can ask of a TensorRT-LLM checkpoint: one place for every choice that decides its bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from streamconv.options import METHODS, TARGET_SMS, TARGET_VERSIONS, Version
from streamconv.targets.base import FILE, Target, option

if TYPE_CHECKING:
    from streamconv.checkpoint.index import Index
    from streamconv.planning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class TensorRTLLM(Target):
    """Options of a TensorRT-LLM checkpoint; every field decides bytes."""

    key: ClassVar[str] = "trtllm"
    ranges_unused: ClassVar[str] = " is for --quant smoothquant and fp8 and for --kv-cache int8 and fp8 only"
    summary: ClassVar[str] = "a TensorRT-LLM checkpoint: config.json and one rank file for each GPU (trtllm-build)"

    tp_size: int = option(1, "tensor parallel size", least=1, official="--tp_size --world_size")
    pp_size: int = option(1, "pipeline parallel size", least=1, official="--pp_size")
    cp_size: int = option(1, "context parallel size (1.2 only)", least=1, official="--cp_size")
    moe_tp_size: int = option(-1, "tensor parallel size inside experts; -1: what --moe-ep-size leaves", official="--moe_tp_size")
    moe_ep_size: int = option(-1, "expert parallel size; -1: what --moe-tp-size leaves", official="--moe_ep_size")
    dtype: str = option(
        "auto",
        "type of what is not quantized; auto is the source's (float16 for float32)",
        choices=("auto", "float16", "bfloat16", "float32"),
        official="--dtype",
    )
    quant: str = option("none", "weight format, see `streamconv list quants`", metavar="NAME")
    kv_cache: str | None = option(None, "quantize the KV cache", choices=("fp8", "int8"), typed=str)
    group_size: int = option(128, "input channels that share a scale, in the formats with groups", official="--group_size")
    method: str | None = option(
        None,
        "how int4_awq finds the codes of a float model: rtn (amax / 8), mse (least squared error), with --text also clip, awq and gptq;"
        " default: rtn, with --text the best that fits",
        choices=METHODS,
        typed=str,
        added=True,
    )
    codes: str | None = option(
        None, "file of codes that --text found, for --method clip, awq and gptq", typed=str, metavar=FILE, added=True
    )
    target_sm: int | None = option(None, "GPU generation the bytes are for", choices=TARGET_SMS, typed=int, metavar="SM", added=True)
    target_version: Version = option("1.2", "TensorRT-LLM line; 1.0 is any 1.x", choices=TARGET_VERSIONS, added=True)
    encoding: Literal["processed", "raw"] = option(
        "processed",
        "how int8 and int4 are stored: laid out for --target-sm, or left for trtllm-build to quantize when it loads",
        choices=("processed", "raw"),
        added=True,
    )
    use_parallel_embedding: bool = option(False, "split the embedding over ranks", official="--use_parallel_embedding")
    embedding_sharding_dim: int = option(
        0,
        "what --use-parallel-embedding splits: the vocabulary (0) or the hidden size (1)",
        choices=(0, 1),
        official="--embedding_sharding_dim",
    )
    use_embedding_sharing: bool = option(False, "leave lm_head out where that is legal (0.16)", official="--use_embedding_sharing")
    remove_duplicated_kv_heads: bool = option(
        False, "the source holds every KV head twice: keep one of each pair", official="--remove_duplicated_kv_heads"
    )
    disable_weight_only_quant_plugin: bool = option(
        False, "recorded in config.json for the engine builder", official="--disable_weight_only_quant_plugin"
    )
    use_meta_fp8_rowwise_recipe: bool = option(
        False,
        "as Meta does in FP8 per row: attention and the first and last layer stay unquantized",
        official="--use_meta_fp8_rowwise_recipe",
    )
    smoothquant: float = option(0.5, "alpha of SmoothQuant", official="--smoothquant -sq")
    activation_ranges: str | None = option(
        None, "ranges that `streamconv calibrate` measured (smoothquant, fp8, KV cache)", typed=str, metavar=FILE, added=True
    )
    per_channel: bool = option(False, "SmoothQuant: a weight scale for each output channel", official="--per_channel")
    per_token: bool = option(False, "SmoothQuant: activation scales for each token, at run time", official="--per_token")
    rope_tables: bool = option(False, "also write the rotary tables that NVIDIA's converter leaves behind", added=True)
    max_position_embeddings: int | None = option(None, "override the source's value", typed=int, least=1)

    def plan(self, index: Index) -> Plan:
        from streamconv.targets.trtllm.target import make_plan

        return make_plan(index, self)

    def without_effect(self, given: Collection[str], source: Callable[[], Index]) -> Iterator[str]:
        from streamconv.targets.trtllm.effects import without_effect

        return without_effect(self, given, source)

    @classmethod
    def has_written(cls, config: Mapping[str, Any]) -> bool:
        return "mapping" in config

    @classmethod
    def opened(cls, folder: Path, as_stored: bool = False) -> Index | None:
        from streamconv.targets.trtllm import inherited

        if not inherited.is_rank_folder(folder):
            return None
        if as_stored:
            return inherited.stored_ranks(folder)
        from streamconv.targets.trtllm.rank_source import open_ranks

        return open_ranks(folder)

    def brings_ranges(self, source: Path) -> bool:
        from streamconv.targets.trtllm.import_rules import brings_scales

        return self.quant == "fp8" and brings_scales(source)

    @property
    def headline(self) -> str:
        return f"TensorRT-LLM {self.target_version}, tp {self.tp_size} x pp {self.pp_size}"

    def needs_ranges(self) -> str | None:
        if self.quant in ("smoothquant", "fp8"):
            return f"--quant {self.quant}"
        return "--kv-cache int8" if self.kv_cache == "int8" else None

    def uses_ranges(self) -> bool:
        return self.needs_ranges() is not None or self.kv_cache == "fp8"  # which can do without: its factors are then 1
