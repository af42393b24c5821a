"""The tensors a checkpoint must hold, from its config.json alone: names, shapes and dtypes of every rank, as the loader works them out.

A description beside `RankLayout`, which writes and reads ranks: `plan` holds against it what that lays out, so that nothing is written
that the loader rejects, and `verify` needs it for folders of other tools, which may hold forms that are never written here (weights to be
quantized when they are loaded, numbers without dimensions, excluded modules, tensors that may be missing).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamconv.errors import CheckpointError, VerifyError, printable
from streamconv.families import Family, family_of
from streamconv.memory import check_room
from streamconv.planning.plan import OutputFile
from streamconv.targets.trtllm.expected_forms import SMOOTH, SPECS, Facts, ModuleSpec, TensorSpec
from streamconv.targets.trtllm.parallel import stage_layers

_TAKES = 1500
"""Bytes of memory for each tensor of a rank file: what is there, and what is wanted."""


@dataclass(slots=True)
class RankTensors:
    """What a rank file holds.

    Attributes:
        fixed: tensors with one way to be stored.
        modules: linear layers: weight name -> ways to store them; the dtype of the stored weight says which one is meant.
        unknown: prefixes of modules in a format whose tensors are not known here.
    """

    fixed: ModuleSpec = field(default_factory=dict)
    modules: dict[str, tuple[ModuleSpec, ...]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def problems(self, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[str]:
        """What is wrong with the tensors of a file.

        Args:
            tensors: name -> (dtype, shape).
        """
        specs = dict(self.fixed)
        for weight, forms in self.modules.items():
            dtype = tensors[weight][0] if weight in tensors else ""
            specs |= next((form for form in forms if dtype in form[weight].dtypes), forms[0])
        for name, spec in specs.items():
            if name not in tensors:
                if spec.required:
                    yield f"{name} is missing"
                continue
            dtype, shape = tensors[name]
            if spec.shape is not None and shape != spec.shape and (shape or math.prod(spec.shape) != 1):  # a number without dimensions
                yield f"{name} has shape {list(shape)}, expected {list(spec.shape)} from config.json"
            if dtype not in spec.dtypes:
                yield f"{name} has dtype {dtype}, expected {' or '.join(spec.dtypes)} from config.json"
        for name in tensors:
            if name not in specs and not name.startswith(self.unknown or "\0"):
                yield f"{name} is unexpected: config.json has no place for it"


def expected(config: Mapping[str, Any], files: Container[int] | None = None, tensors: int = 1 << 20) -> dict[int, RankTensors]:
    """The tensors of each rank file, by its number.

    Args:
        files: numbers of the files to do, None for all.
        tensors: how many there are at all.

    Raises:
        CheckpointError: the architecture is one whose tensors are not known here.
        VerifyError: config.json lacks a size, or holds one that cannot be.
    """
    facts = Facts(config)
    if facts.layers > tensors:  # a damaged number would take hours
        raise VerifyError(f"config.json: num_hidden_layers is {facts.layers}, and there are {tensors} tensors")
    family = family_of(str(config.get("architecture")))
    stages = stage_layers(facts.layers, facts.grid.pp_size, facts.version)
    ranks = {}
    for rank in facts.grid.ranks():
        if files is not None and rank.file not in files:
            continue
        rank_tensors = ranks[rank.file] = RankTensors()
        if rank.pp == 0:
            rank_tensors.fixed["transformer.vocab_embedding.weight"] = _embedding(facts)
        if rank.pp == facts.grid.pp_size - 1:
            rank_tensors.fixed["transformer.ln_f.weight"] = TensorSpec((facts.dtype,), (facts.hidden,))
            rank_tensors.fixed["lm_head.weight"] = _lm_head(facts)
        for number, layer in enumerate(stages[rank.pp]):
            _layer(facts, rank_tensors, f"transformer.layers.{number}.", layer, family)
        _rope_tables(facts, rank_tensors)
    return ranks


def rank_count(config: Mapping[str, Any]) -> int:
    """Rank files of a checkpoint.

    Raises:
        VerifyError: config.json lacks a size, or holds one that cannot be.
    """
    return len(Facts(config).grid.ranks())


def _embedding(facts: Facts) -> TensorSpec:
    tp = facts.grid.tp_size
    if tp == 1 or not facts.config.get("use_parallel_embedding"):
        shape = (facts.vocab, facts.hidden)
    elif facts.config.get("embedding_sharding_dim"):
        shape = (facts.vocab, facts.hidden // tp)
    else:
        shape = (-(-facts.vocab // tp), facts.hidden)
    return TensorSpec((facts.dtype,), shape)


def _lm_head(facts: Facts) -> TensorSpec:
    """It may be missing where the embedding of the same file takes its place."""
    rows = -(-facts.vocab // facts.grid.tp_size)
    tied = bool(facts.config.get("share_embedding_table") or facts.config.get("tie_word_embeddings"))
    shared = tied and facts.grid.pp_size == 1 and _embedding(facts).shape == (rows, facts.hidden)
    return TensorSpec((facts.dtype,), (rows, facts.hidden), required=not shared)


def _layer(facts: Facts, tensors: RankTensors, at: str, layer: int, family: Family) -> None:
    tp, hidden, size = facts.grid.tp_size, facts.hidden, facts.size
    plain = (facts.dtype,)
    heads = facts.heads // tp + 2 * ((facts.kv + tp - 1) // tp)
    bias = bool(facts.config.get("attn_bias"))

    def vector(name: str, length: int) -> None:
        tensors.fixed[at + name] = TensorSpec(plain, (length,))

    def linear(name: str, rows: int, cols: int, experts: int = 0) -> None:
        module, lead = at + name, (experts,) if experts else ()
        if not facts.quantized(module, layer):
            tensors.fixed[module + ".weight"] = TensorSpec(plain, (*lead, rows, cols))
        elif facts.algo in SPECS:
            forms = SPECS[facts.algo](facts, module, rows, cols, lead)
            tensors.modules[module + ".weight"] = tuple({f"{module}.{leaf}": tensor for leaf, tensor in form.items()} for form in forms)
        else:
            tensors.unknown += (module + ".",)

    norms = ["input_layernorm", "post_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] * bool(facts.config.get("inter_layernorms"))
    for norm in norms:
        vector(f"{norm}.weight", hidden)
    linear("attention.qkv", heads * size, hidden)
    linear("attention.dense", hidden, facts.heads // tp * size)
    if bias:
        vector("attention.qkv.bias", heads * size)
        if family.config_class != "qwen":
            vector("attention.dense.bias", hidden)
    if "q_norm" in family.tensors:
        vector("attention.q_layernorm.weight", size)
        vector("attention.k_layernorm.weight", size)
    fused, gated = "gate_up" in family.tensors, str(facts.config.get("hidden_act")) in ("swiglu", "geglu")
    if facts.experts:
        width = (facts.expert_width or facts.width) // facts.grid.moe_tp_size
        local = facts.experts // facts.grid.moe_ep_size
        tensors.fixed[at + "mlp.router.weight"] = TensorSpec(("F32",), (facts.experts, hidden))
        linear("mlp.fc", width * (2 if gated else 1), hidden, local)
        linear("mlp.proj", hidden, width, local)
    else:
        width = facts.width // tp
        linear("mlp.fc", width * (2 if fused and gated else 1), hidden)
        if not fused:
            linear("mlp.gate", width, hidden)
        linear("mlp.proj", hidden, width)
        if facts.config.get("mlp_bias"):
            vector("mlp.fc.bias", width)
            vector("mlp.gate.bias", width)
            vector("mlp.proj.bias", hidden)
    _small(facts, tensors, at, layer)


def _small(facts: Facts, tensors: RankTensors, at: str, layer: int) -> None:
    """Single numbers of a layer: the KV cache's factor, clamps, static activation scales."""
    if facts.quantization.get("kv_cache_quant_algo") in ("FP8", "INT8"):
        tensors.fixed[at + "attention.kv_cache_scaling_factor"] = TensorSpec(("F32",), (1,))
        for name in ("k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_rcp_scaling_factor"):
            tensors.fixed[f"{at}attention.{name}"] = TensorSpec(("F32",), (1,), required=False)
    if facts.algo == "FP8_PER_CHANNEL_PER_TOKEN":
        owners = ["post_layernorm", "mlp"]
        if facts.quantization.get("use_meta_recipe"):
            owners = owners if layer not in (0, facts.layers - 1) else []
        else:
            owners = [*owners, "input_layernorm", "attention"]
        for owner in owners:
            tensors.fixed[f"{at}{owner}.clamp_val"] = TensorSpec(("F32",), (2,), required=False)
    if facts.algo in SMOOTH:
        for norm in ("input_layernorm", "post_layernorm"):
            tensors.fixed[f"{at}{norm}.scale_to_int"] = TensorSpec(("F32",), (1,))
        if "PER_TOKEN" not in facts.algo:
            for owner in ("attention", "mlp"):
                tensors.fixed[f"{at}{owner}.quantization_scaling_factor"] = TensorSpec(("F32",), (1,))


def _rope_tables(facts: Facts, tensors: RankTensors) -> None:
    """Left behind by NVIDIA's converter; the loader takes them if their shape is right."""
    length, dim = facts.positions, facts.rotary or facts.size
    shapes = {
        "embed_positions": (1, length, dim),
        "rotary_inv_freq": (dim // 2,),
        "embed_positions_for_gpt_attention": (1, length * dim),
    }
    tables: Mapping[str, tuple[int, ...] | None] = shapes
    if facts.config.get("position_embedding_type") == "long_rope":
        tables = dict.fromkeys([*shapes, *_LONG_ROPE.split()])
    tensors.fixed |= {name: TensorSpec(("F32",), shape, required=False) for name, shape in tables.items()}


_LONG_ROPE = """
    embed_positions_short_factors embed_positions_short_factors_for_attention_plugin short_inv_freq long_rope_embed_positions
    embed_positions_long_factors embed_positions_long_factors_for_attention_plugin long_inv_freq long_rope_rotary_inv_freq
    long_rope_embed_positions_for_gpt_attention
"""


def first_problem(config: Mapping[str, Any], files: Sequence[OutputFile]) -> str | None:
    """What is wrong with planned files, in rank order, None if nothing is; one file at a time is looked at."""
    total = sum(file.tensors for file in files)
    for number, file in enumerate(files):
        check_room(_TAKES * file.tensors, "checking the rank files")
        kinds: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = {}  # each once: there are few
        tensors = {name: kinds.setdefault((dtype, shape), (dtype, shape)) for name, dtype, shape in file.tensors_of()}
        for problem in expected(config, {number}, total)[number].problems(tensors):
            return f"{file.name}: {problem}"
    return None


def check(config: Mapping[str, Any], files: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]) -> tuple[list[str], list[str]]:
    """Hold the tensors of the rank files against config.json.

    Args:
        files: "rankN.safetensors" -> tensor name -> (dtype, shape); files that are missing are left out.

    Returns:
        (problems, warnings).
    """
    try:
        numbers = {int(name[4:-12]): name for name in files}
        ranks = expected(config, numbers, sum(map(len, files.values())))
    except CheckpointError as error:
        return [], [f"{error.message}: its tensors are not checked one by one"]
    except VerifyError as error:
        return [error.message], []
    problems, unknown = [], False
    for number, tensors in ranks.items():
        name = numbers[number]
        unknown = unknown or bool(tensors.unknown)
        problems += [f"{name}: {problem}" for problem in tensors.problems(files[name])]
    algo = printable((config.get("quantization") or {}).get("quant_algo"))
    return problems, [f"quant_algo {algo}: the tensors of its linear layers are not checked"] if unknown else []
