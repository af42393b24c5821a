"""What a user can ask of a TensorRT-LLM checkpoint: one place for every choice that decides its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from streamconv.checkpoint.index import Index
from streamconv.options import TARGET_SMS, TARGET_VERSIONS, Version
from streamconv.planning.plan import Plan
from streamconv.targets.base import Target, option


@dataclass(frozen=True, kw_only=True)
class TensorRTLLM(Target):
    """Options of a TensorRT-LLM checkpoint; every field decides bytes."""

    key: ClassVar[str] = "trtllm"
    summary: ClassVar[str] = "a TensorRT-LLM checkpoint: config.json and one rank file for each GPU (trtllm-build)"

    tp_size: int = option(1, "tensor parallel size", least=1)
    pp_size: int = option(1, "pipeline parallel size", least=1)
    cp_size: int = option(1, "context parallel size", least=1)
    moe_tp_size: int = option(-1, "tensor parallel size of the experts; -1: what moe_ep_size leaves of tp_size")
    moe_ep_size: int = option(-1, "expert parallel size; -1: 1")
    dtype: str = option("auto", "float type of what is not quantized", choices=("auto", "float16", "bfloat16", "float32"))
    quant: str = option("none", "a key of the quants: see `streamconv list quants`")
    kv_cache: str | None = option(None, "type of the KV cache", choices=("int8", "fp8"), typed=str)
    group_size: int = option(128, "input channels that share a scale, where a format has groups")
    target_sm: int | None = option(None, "compute capability that processed layouts are for", choices=TARGET_SMS, typed=int)
    target_version: Version = option("1.2", "TensorRT-LLM release line", choices=TARGET_VERSIONS)
    encoding: Literal["processed", "raw"] = option(
        "processed", "bytes laid out for target_sm, or left to trtllm-build", choices=("processed", "raw")
    )
    use_parallel_embedding: bool = option(False, "cut the embedding over the ranks")
    embedding_sharding_dim: int = option(0, "0: rows of the embedding are cut, 1: columns", choices=(0, 1))
    use_embedding_sharing: bool = option(False, "leave lm_head out where it is the embedding (0.16)")
    remove_duplicated_kv_heads: bool = option(False, "the source stores every KV head twice")
    disable_weight_only_quant_plugin: bool = option(False, "recorded in config.json")
    use_meta_fp8_rowwise_recipe: bool = option(False, "leave out the layers that Meta's recipe leaves out")
    smoothquant: float = option(0.5, "the alpha of SmoothQuant")
    activation_ranges: str | None = option(None, "file of a calibration run", typed=str)
    per_channel: bool = option(False, "SmoothQuant: one weight scale for each output channel")
    per_token: bool = option(False, "SmoothQuant: one activation scale for each token")
    rope_tables: bool = option(False, "also write the three rotary tables that NVIDIA's converter leaves")
    max_position_embeddings: int | None = option(None, "overrides the source's value", typed=int)

    def plan(self, index: Index) -> Plan:
        from streamconv.targets.trtllm.target import make_plan

        return make_plan(index, self)

    @property
    def headline(self) -> str:
        return f"TensorRT-LLM {self.target_version}, tp {self.tp_size} x pp {self.pp_size}"

    @property
    def files_read(self) -> tuple[Path, ...]:
        return () if self.activation_ranges is None else (Path(self.activation_ranges),)

    def fingerprint(self) -> dict[str, object]:
        return {key: value for key, value in self.to_json().items() if key != "activation_ranges"}

    def needs_ranges(self) -> str | None:
        """The flag that cannot do without activation ranges, None if there is none."""
        if self.quant in ("smoothquant", "fp8"):
            return f"--quant {self.quant}"
        return "--kv-cache int8" if self.kv_cache == "int8" else None

    def uses_ranges(self) -> bool:
        """Whether ranges change the output: the FP8 KV cache can do without (its factors are then 1)."""
        return self.needs_ranges() is not None or self.kv_cache == "fp8"
