"""What `plan` accepts, `convert` does within its budget; what `convert` ends with 0, `verify` accepts, with its source and without.

Random small models of every family, by any config.json, and what became of them (quantized directories, rank files), converted into one
or several outputs, in one go or in parts, killed and resumed. By hand: python -m tests.fuzz.accepted --count 2000 --seed 7
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

from streamconv import api, memory
from streamconv.allocation import costs_of, estimate_memory, load_kernels
from streamconv.errors import BudgetError, StreamconvError, UsageError
from streamconv.families import all_families
from streamconv.open_plan import open_and_plan_all
from streamconv.options import TARGET_SMS, TARGET_VERSIONS, Resources
from streamconv.planning.reads import Reads
from streamconv.run import manifest
from streamconv.targets.base import Output, Target
from streamconv.targets.hf.recipes import RECIPES as FORMATS
from streamconv.targets.hf.target import ARITHMETICS, KEEP, HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.targets.trtllm.recipes import all_quants
from streamconv.verification.check import verify
from tests.conformance.recipes import RECIPES as MODELS
from tests.conformance.sources import RUNS, make
from tests.crash.disks import Killing
from tests.fuzz.models import DTYPES, config_of, sizes_of, tensors_of

FAMILIES = {family.name: family for family in all_families() if family.architectures}
_QUANTIZED = [(quant, run) for quant, runs in RUNS.items() for run in runs if run.source != "float"]
_IGNORED = ("lm_head", "*.down_proj", "re:.*layers\\.0\\..*", "*.self_attn.*", "*.0.*")
_MEMORY = Path("/dev/shm")  # where a sync costs nothing


class Wrong(Exception):
    """The property does not hold."""


@dataclass(frozen=True)
class Source:
    """A model to convert.

    Attributes:
        ranges: a file of activation ranges of it.
        kind: for the count.
        fits: options of TensorRT-LLM that take over what another tool quantized.
    """

    folder: Path
    ranges: Path
    kind: str
    fits: Mapping[str, Any] = field(default_factory=dict)


def float_model(random: Random, place: Path) -> Source:
    family = random.choice([*FAMILIES.values()])
    sizes = sizes_of(random, family)
    told = config_of(random, family, sizes)
    made, ranges = tensors_of(random, family, sizes, told)
    model = place / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(told))
    names = sorted(made)
    cut = random.randrange(1, len(names)) if random.random() < 0.3 else len(names)
    shards = [shard for shard in (names[:cut], names[cut:]) if shard]
    files = ["model.safetensors"] if len(shards) == 1 else [f"model-{n + 1:05d}-of-00002.safetensors" for n in range(2)]
    for file, shard in zip(files, shards, strict=True):
        save_file({name: made[name] for name in shard}, model / file)
    if len(files) > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    save_file(ranges, place / "ranges.safetensors") if ranges else None
    return Source(model, place / "ranges.safetensors", family.name)


def quantized_model(random: Random, place: Path) -> Source:
    """By another tool: GPTQ, AutoAWQ, ModelOpt, FBGEMM."""
    quant, run = random.choice(_QUANTIZED)
    recipe = random.choice([recipe for recipe in MODELS if recipe.family in FAMILIES and not recipe.experts])
    made = make(recipe, FAMILIES[recipe.family], run, place / "model")
    return Source(made.folder, made.ranges, f"{recipe.family} {run.source}", {"quant": quant, **run.options})


def trtllm(random: Random, source: Source) -> TensorRTLLM:
    quants = [*all_quants()]
    options = TensorRTLLM(
        tp_size=random.choice((1, 1, 1, 2, 2, 4)),
        pp_size=random.choice((1, 1, 1, 1, 2)),
        cp_size=random.choice((1,) * 15 + (2,)),
        moe_ep_size=random.choice((-1, -1, 1, 2)),
        dtype=random.choice(("auto", "auto", *DTYPES)),
        quant=random.choice(("none", "none", "none", *quants)),
        kv_cache=random.choice((None, None, None, "fp8", "int8")) if source.ranges.exists() else None,
        group_size=random.choice((128, 128, 64, 32)),
        target_sm=random.choice((80, 80, 90, 90, *TARGET_SMS)),
        target_version=random.choice(("0.16", "1.2", "1.2", *TARGET_VERSIONS)),
        encoding=random.choice(("processed", "processed", "raw")),
        use_parallel_embedding=random.random() < 0.3,
        embedding_sharding_dim=random.choice((0, 1)),
        use_embedding_sharing=random.random() < 0.1,
        use_meta_fp8_rowwise_recipe=random.random() < 0.3,
        per_channel=random.random() < 0.5,
        per_token=random.random() < 0.5,
        rope_tables=random.random() < 0.2,
        max_position_embeddings=random.choice((None, None, None, 48)),
    )
    more: dict[str, Any] = {"method": random.choice((None, "rtn", "mse"))} if options.quant == "int4_awq" else {}
    more |= source.fits if random.random() < 0.8 else {}
    options = TensorRTLLM(**(options.to_json() | more))
    if source.ranges.exists() and (options.needs_ranges() is not None or (options.kv_cache == "fp8" and random.random() < 0.5)):
        more["activation_ranges"] = str(source.ranges)
    return TensorRTLLM(**(options.to_json() | more))


def rank_options(random: Random, source: Source) -> TensorRTLLM:
    """Few options of another rank layout: what is not passed stays the source's."""
    asked = {
        "tp_size": random.choice((1, 2, 4)), "pp_size": random.choice((1, 2)), "dtype": random.choice(DTYPES),
        "target_sm": random.choice((80, 90, 100)), "target_version": random.choice(TARGET_VERSIONS),
        "quant": random.choice(("none", "int8")),
    }  # fmt: skip
    return TensorRTLLM(**{key: asked[key] for key in random.sample([*asked], random.choice((0, 1, 1, 2)))})  # type: ignore[arg-type]


def hugging_face(random: Random, source: Source) -> HuggingFace:
    form = random.choice(FORMATS)
    quant, container = random.choice((("none", None), (KEEP, None), *[(form.quant, random.choice((None, form.container)))] * 4))
    more: dict[str, Any] = {"method": random.choice((None, "rtn", "mse"))} if form.methods and quant == form.quant else {}
    options = HuggingFace(
        quant=quant,
        format=container,
        group_size=random.choice((128, 64, 32, 16)),
        arithmetic=random.choice(("float32", "float32", *ARITHMETICS)),
        dtype=random.choice(("auto", "auto", "auto", *DTYPES)),
        ignore=tuple(random.sample(_IGNORED, random.choice((0, 0, 1, 2)))),
        only=random.choice(((), (), (), ("*.mlp.*", "*proj"))),
        kv_cache=random.choice((None, None, None, "fp8")) if source.ranges.exists() else None,
        max_shard_size=random.choice((None, None, 1 << 20)),
        **more,
    )
    ranges = {"activation_ranges": str(source.ranges)} if options.needs_ranges() is not None and source.ranges.exists() else {}
    return HuggingFace(**(options.to_json() | ranges))


def outputs_of(random: Random, source: Source, place: Path, seen: Counter[str]) -> list[Output]:
    """Up to three outputs, each of which `plan` accepts by itself."""
    made: list[Output] = []
    for number in range(random.choice((1, 1, 1, 2, 3))):
        for _ in range(4):
            ranks = trtllm if not source.kind.startswith("ranks") or random.random() < 0.3 else rank_options
            target: Target = random.choice((ranks, ranks, hugging_face))(random, source)
            try:
                api.open_and_plan(source.folder, target)[0].close()
            except StreamconvError as refused:
                seen["refused"] += 1
                seen["* " + re.sub(r"[0-9]+|'[^']*'", "#", refused.message)[:70]] += 1
            else:
                made.append(target.to(place / f"out{number}"))
                break
    return made


def smallest_budget(source: Path, outputs: Sequence[Output]) -> int:
    """The smallest --memory-budget that `plan` accepts, in bytes: the one that its hint names.

    Raises:
        StreamconvError: it accepts none.
        Wrong: the budget that it names is refused as well.
    """

    index, plans = open_and_plan_all(source, outputs)
    with contextlib.closing(index):
        load_kernels(Reads(plans))  # what a process of its own would load is counted there, and would count twice here

    def accept(budget: int) -> None:
        index, plans = open_and_plan_all(source, outputs, budget)
        with contextlib.closing(index):
            reads = Reads(plans)
            estimate_memory(reads, Resources(memory_budget=budget), costs_of(reads))

    try:
        accept(1 << 20)
    except BudgetError as error:
        named = int(re.findall(r"([0-9]+)MiB", error.hint or "")[0]) << 20
    try:
        accept(named)
    except BudgetError as error:
        raise Wrong(f"the budget of a hint is refused: {error}") from None
    return named


def convert(random: Random, source: Path, outputs: Sequence[Output], budget: int) -> str:
    """In one go or in parts, killed before any operation and resumed; tells how."""
    parts = random.choice((None, None, 2, 3))
    single = len(outputs) == 1 and random.random() < 0.5
    shares = [None] if parts is None else random.sample(range(parts), parts) if random.random() < 0.5 else [None]
    how = [f"{len(outputs)} outputs, parts {parts}: {shares}"]

    def run(part: int | None, disk: Killing | None) -> None:
        rows, workers = random.choice((None, 16, 40)), random.choice((1, 1, 2))
        asked = Resources(budget, workers, "cpu", tile_rows=rows, parts=parts, part=part, wait=5.0)
        if single and len(how) == 1:  # the other one also takes what was published before the kill
            api.convert(source, outputs[0].out, outputs[0].target, asked, disk=disk)
        else:
            api.convert_all(source, outputs, asked, disk=disk)

    def die() -> None:
        raise SystemExit  # which also ends a thread in silence

    for part in shares:
        for _ in range(random.choice((0, 0, 1, 2))):
            disk = Killing(random.choice((20, 60, 150)) + random.randrange(40), die)
            try:
                run(part, disk)
                break
            except SystemExit:
                how.append(f"part {part} killed at {disk.k}")
            finally:
                disk.bury()
        else:
            run(part, None)
    return "; ".join(how)


def check(out: Path, source: Path, target: Target) -> None:
    """Raises Wrong if `verify` finds something, or another tool's checkpoint of the same bytes would not pass."""
    workers = Resources(workers=1)
    for against in (None, source):
        problems = verify(out, against, resources=workers).problems
        if problems:
            raise Wrong(f"verify {'--source' if against else ''}: {problems[:3]}")
    kept = (out / manifest.NAME).read_bytes()
    (out / manifest.NAME).unlink()
    try:
        for against in (None, source):
            try:
                problems = verify(out, against, resources=workers, activation_ranges=getattr(target, "activation_ranges", None)).problems
            except UsageError as error:
                if "was made with activation ranges" not in error.message:
                    raise
                continue  # the source of these ranks was
            if problems:
                raise Wrong(f"verify without a manifest {'--source' if against else ''}: {problems[:3]}")
    finally:
        (out / manifest.NAME).write_bytes(kept)


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def step(random: Random, source: Source, place: Path, seen: Counter[str]) -> list[Output]:
    """One command on a source; gives the outputs, none if it is refused.

    Raises:
        Wrong: the property does not hold.
    """
    outputs = outputs_of(random, source, place, seen)
    if not outputs:
        return []
    told = f"{source.kind}: {[output.target for output in outputs]}"
    how = ""
    try:
        budget = smallest_budget(source.folder, outputs)
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set so far is forgotten
        how = convert(random, source.folder, outputs, budget)
        if (peak := memory.peak_resident()) > budget:
            raise Wrong(f"a peak of {peak / memory.MIB:.1f} MiB, the budget is {budget / memory.MIB:.1f}")
        for output in outputs:
            check(Path(output.out), source.folder, output.target)
            if how != "1 outputs, parts None: [None]":
                alone = place / "alone"
                api.convert(source.folder, alone, output.target, Resources(workers=1))
                if held(alone) != held(Path(output.out)):
                    raise Wrong(f"{output.out} has other bytes than a run in one go")
                shutil.rmtree(alone)
    except (Wrong, StreamconvError) as wrong:
        raise Wrong(f"{type(wrong).__name__}: {wrong}: {told}; {how}") from wrong
    seen["converted"] += len(outputs)
    for output in outputs:
        seen[f"{output.target.key} {getattr(output.target, 'quant', '')}"] += 1
    seen[source.kind] += 1
    return outputs


def one(random: Random, place: Path, seen: Counter[str]) -> None:
    """A model, converted, and what became of it converted again.

    Raises:
        Wrong: the property does not hold.
    """
    source = random.choice((float_model, float_model, quantized_model))(random, place)
    for number in range(random.choice((1, 1, 2, 2, 3))):
        (place / str(number)).mkdir()
        outputs = step(random, source, place / str(number), seen)
        if not outputs:
            return
        again = random.choice(outputs)
        kind = "ranks" if isinstance(again.target, TensorRTLLM) else "directory"
        source = Source(Path(again.out), source.ranges, f"{kind} {again.target.quant}")  # type: ignore[attr-defined]


def run(count: int, seed: int, seconds: float = 1e9, first: int = 0) -> tuple[Counter[str], list[str]]:
    """`count` models, or as many as go into the time; the same seed gives the same ones.

    Returns:
        conversions by source and target, with those refused, and what is wrong.
    """
    seen, wrong, end = Counter[str](), list[str](), time.monotonic() + seconds
    torch.set_num_threads(1)  # matrices are tiny
    for number in range(first, first + count):
        if time.monotonic() > end:
            break
        place = Path(tempfile.mkdtemp(prefix="accepted-", dir=_MEMORY if _MEMORY.is_dir() else None))
        seen["models"] += 1
        try:
            one(Random(f"{seed} {number}"), place, seen)
        except Wrong as problem:
            wrong.append(f"seed {seed} number {number}: {problem}")
        except Exception:
            wrong.append(f"seed {seed} number {number}: {traceback.format_exc()}")
        finally:
            shutil.rmtree(place)
    return seen, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--first", type=int, default=0, help="number of the first model")
    parser.add_argument("--seconds", type=float, default=1e9)
    asked = parser.parse_args()
    seen, wrong = run(asked.count, asked.seed, asked.seconds, asked.first)
    print("\n".join(f"{count:6} {what}" for what, count in sorted(seen.items())))
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
