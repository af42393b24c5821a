"""What a user can ask for. One place for every choice that decides output bytes, and for those that do not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

Version = Literal["0.16", "1.0", "1.2"]
TARGET_VERSIONS: tuple[Version, ...] = ("0.16", "1.0", "1.2")
"""Release lines; 1.0 is 1.2 less the keys of config.json that only later readers know."""
TARGET_SMS = (70, 72, 75, 80, 86, 87, 89, 90, 100, 103, 120, 121)

Read = Literal["auto", "map", "pread"]


@dataclass(frozen=True, slots=True)
class Options:
    """Every choice that decides output bytes. It is recorded in the manifest and is part of the fingerprint.

    Attributes:
        tp_size, pp_size, cp_size: tensor, pipeline and context parallel sizes.
        moe_tp_size, moe_ep_size: split of tp_size over experts; -1 is resolved by checkpoint spec §2.3.
        dtype: "auto", "float16", "bfloat16" or "float32" (§2.7).
        quant: a key of the quants registry ("none", "int8", "int4", ...).
        kv_cache: None, "int8" or "fp8".
        target_sm: compute capability the processed layouts are for (quantization spec §3.3), None if not stated.
        target_version: TensorRT-LLM release line the checkpoint is for.
        encoding: "processed" (bytes laid out for target_sm) or "raw" (quantization spec §2.5 R).
        rope_tables: also write the three rotary tables of checkpoint spec §1.7.
        allow_nonfinite: quantize matrices that hold NaN or infinity instead of stopping.
        smoothquant: the alpha of SmoothQuant, used by quant "smoothquant" only.
        activation_ranges: file of a calibration run, for quant "smoothquant" and "fp8" and kv_cache "int8" and "fp8".
        max_position_embeddings: overrides the value taken from the source, None keeps it.
    """

    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    moe_tp_size: int = -1
    moe_ep_size: int = -1
    dtype: str = "auto"
    quant: str = "none"
    kv_cache: str | None = None
    group_size: int = 128
    target_sm: int | None = None
    target_version: Version = "1.2"
    encoding: Literal["processed", "raw"] = "processed"
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0
    use_embedding_sharing: bool = False
    remove_duplicated_kv_heads: bool = False
    disable_weight_only_quant_plugin: bool = False
    use_meta_fp8_rowwise_recipe: bool = False
    smoothquant: float = 0.5
    activation_ranges: str | None = None
    per_channel: bool = False
    per_token: bool = False
    rope_tables: bool = False
    allow_nonfinite: bool = False
    max_position_embeddings: int | None = None

    def needs_ranges(self) -> str | None:
        """The flag that cannot do without activation ranges, None if there is none."""
        if self.quant in ("smoothquant", "fp8"):
            return f"--quant {self.quant}"
        return "--kv-cache int8" if self.kv_cache == "int8" else None

    def uses_ranges(self) -> bool:
        """Whether ranges change the output: the FP8 KV cache can do without (its factors are then 1)."""
        return self.needs_ranges() is not None or self.kv_cache == "fp8"

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Resources:
    """Choices that never change a byte of the output.

    Attributes:
        memory_budget: ceiling of the process's peak resident set in bytes; None derives it from free memory.
        workers: worker threads; None derives them from processors and budget.
        device: "auto", "cpu", "cuda", "cuda:0", ...
        device_memory_budget: bytes of each device that may be used; None: what is free less a reserve, at most 2 GiB.
        on_device_loss: "cpu" finishes on the CPU when a device is lost; "stop" stops, and the same call goes on later.
        tile_rows: upper bound on the source rows of a tile (tests force small tiles with it).
        disk_reserve: bytes of free disk to leave untouched.
        no_lock: go on where the output's file system has no locks, or cannot sync a folder; the manifest says so (one entry more).
        hub_keep: "all" keeps the shards of a Hub model in the cache; "none" removes each that was downloaded once it was read.
        read: "pread" copies the source's rows into the arena, "map" maps them where it can (see stages/mapped.py), "auto" maps what the
            page cache holds, on the CPU.
    """

    memory_budget: int | None = None
    workers: int | None = None
    device: str = "auto"
    device_memory_budget: int | None = None
    on_device_loss: Literal["cpu", "stop"] = "cpu"
    tile_rows: int | None = None
    disk_reserve: int = 0
    hub_keep: str = "all"
    read: Read = "auto"
    no_lock: bool = False
