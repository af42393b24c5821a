"""`verify --source`: the source is encoded again, by the machinery of a conversion, and its bytes are compared with the output's.

Encoding is deterministic, so a checkpoint of ours holds exactly these bytes. Of another tool's, other bytes may be as good: there every
row that differs is decoded, and the error that its format may make decides, and what our own encoding of the same rows reaches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamconv import hub, memory
from streamconv.allocation import costs_of, estimate_memory, load_kernels, most_expensive
from streamconv.checkpoint.header_parse import Header
from streamconv.checkpoint.index import Index
from streamconv.checkpoint.shard import Shard
from streamconv.errors import BudgetError, DataError, RefusedError, StreamconvError, UsageError, VerifyError, printable
from streamconv.open_plan import open_and_plan
from streamconv.options import Resources
from streamconv.planning import memory_plan
from streamconv.planning.parts import cut
from streamconv.planning.plan import OutputFile, Plan
from streamconv.planning.reads import Reads
from streamconv.progress import Meter
from streamconv.run import manifest, source_record
from streamconv.run.compared import BUFFER, Compared
from streamconv.run.mapped import mapped
from streamconv.targets import checks_of, target_from_json, target_of
from streamconv.targets.base import Target
from streamconv.verification import decoded, judgement, measured
from streamconv.verification.verdict import TensorError, Verdict

_TORCH = 300 * memory.MIB
"""What decoding loads."""


def check(
    folder: Path,
    config_bytes: bytes,
    record: manifest.Manifest | None,
    ranges: str | None,
    source: str | Path,
    resources: Resources,
    verdict: Verdict,
    meter: Meter,
    part: tuple[int, int] | None = None,
) -> None:
    """Add what the source says of an output to a verdict.

    Args:
        record: its manifest, None for another tool's.
        ranges: the activation ranges file, where it is not the one that the manifest names.
        part: as of `verify`.

    Raises:
        StreamconvError: the source cannot be opened or planned, its ranges are not there, or the budget is too small.
    """
    place = hub.local_folder(source)
    config: dict[str, Any] = json.loads(config_bytes)
    kind = checks_of(record.target if record is not None else target_of(config).key)
    names = [*record.sizes] if record is not None else kind.tensor_files(folder, config, [])
    choices: Sequence[Target] = [_asked(record, folder)] if record is not None else kind.made_with(config, folder / names[0])
    if not choices:
        if part is not None:
            raise UsageError("--part: a directory without streamconv.json is compared as a whole")
        decoded.check(folder, config, place, resources, verdict, meter)
        return
    choices = [options.with_files(folder, place, ranges) for options in choices]
    files = [Shard(folder / name) for name in names]
    headers = [file.header() for file in files]
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.callback(file.close)
        index, plan = _planned(place, choices, headers, files, stack, record is None, resources.memory_budget)
        mine = cut(plan, part[1])[part[0]].of(plan) if part is not None else plan
        if plan.bytes_checked and resources.source_check:
            meter.begin("checking", plan.bytes_checked)
            source_record.check(index, meter.add, source_record.OfPart(plan).wanted(mine))
        if record is not None and plan.sources != record.sources:
            verdict.warnings.append(f"{printable(source)} is not made of the files that the manifest names; their bytes decide")
        if record is not None and plan.config != config_bytes:
            verdict.problems.append("config.json is not what this source gives")
        elif record is None:
            wrong, other = kind.config_differences(config, json.loads(plan.config))
            verdict.problems += wrong
            verdict.warnings += other
        odd = [file.name for file in plan.files if record is not None and not _begins(file, files)]
        plan, problems = placed(plan, headers)
        verdict.problems += problems + [f"{name}: the header is not what this source gives" for name in odd]
        if part is not None:
            plan = cut(plan, part[1])[part[0]].of(plan)
        if not problems:
            _compare(plan, index, files, headers, resources, verdict, meter, record is None)


def _planned(
    source: Path,
    choices: Sequence[Target],
    headers: Sequence[Header],
    files: Sequence[Shard],
    stack: contextlib.ExitStack,
    foreign: bool,
    budget: int | None,
) -> tuple[Index, Plan]:
    """The plan of the output; where config.json leaves the GPU generation open, the one whose layout decodes best."""
    plans: list[tuple[float, Index, Plan]] = []
    refused: StreamconvError | None = None
    for options in choices:
        try:
            index, plan = open_and_plan(source, options, budget)
        except RefusedError as error:  # a generation that this release does not know, or a source for something else
            if not foreign:
                raise
            refused = error
            continue
        stack.enter_context(contextlib.closing(index))
        plans.append((_likeness(index, plan, headers, files) if len(choices) > 1 else 0.0, index, plan))
    if not plans:
        why = refused.message if refused is not None else "config.json says too little"
        raise VerifyError(f"--source: no conversion of this source gives this checkpoint: {why}")
    _, index, plan = max(plans, key=lambda choice: choice[0])
    return index, plan


def _likeness(index: Index, plan: Plan, headers: Sequence[Header], files: Sequence[Shard]) -> float:
    """SNR of rows whose bytes depend on the layout, dB: the least of a matrix for each layout and width (64 inputs lie alike)."""
    plan, problems = placed(plan, headers)
    kinds: dict[object, int] = {}
    for number, matrix in enumerate(plan.matrices):
        if (layout := getattr(matrix.codec, "layout", None)) is not None:
            kinds.setdefault((layout, matrix.cols), number)
    if problems or not kinds:
        return -1e9
    from streamconv.run.order import ReductionResults

    rows = {number: [(0, 8)] for number in kinds.values()}
    errors = measured.measure(plan, index.shards, files, ReductionResults(()), rows, 1)
    return min(errors[number].snr() for number in kinds.values())


def placed(plan: Plan, headers: Sequence[Header]) -> tuple[Plan, list[str]]:
    """The plan with the places that the tensors have in these files, and what is there that it does not mean.

    Args:
        headers: of the files, in the plan's order.
    """
    problems: list[str] = []
    if len(headers) != len(plan.files):
        return plan, [f"{len(headers)} weight files, this source gives {len(plan.files)}"]
    for file, header in zip(plan.files, headers, strict=True):
        names = set[str]()
        for name, dtype, shape in file.tensors_of():
            names.add(name)
            entry = header.tensors.get(name)
            if entry is None:
                problems.append(f"{file.name}: {name} is missing, this source gives it")
            elif (entry.dtype.name, entry.shape) != (dtype, shape):
                there, given = f"{entry.dtype} {list(entry.shape)}", f"{dtype} {list(shape)}"
                problems.append(f"{file.name}: {name}: {there}, this source gives {given}")
        problems += [f"{file.name}: {printable(name)} is not what this source gives" for name in header.tensors if name not in names]
    if problems:
        return plan, problems
    matrices = plan.matrices.moved(lambda file, tensor: headers[file].tensors[tensor].begin)
    constants = tuple(dataclasses.replace(entry, offset=headers[entry.file].tensors[entry.tensor].begin) for entry in plan.constants)
    return dataclasses.replace(plan, matrices=matrices, constants=constants), []


def _begins(file: OutputFile, files: Sequence[Shard]) -> bool:
    """A file begins with this header."""
    shard = next((shard for shard in files if shard.path.name == file.name), None)
    if shard is None or shard.size < len(file.header):
        return False
    with shard.window(0, len(file.header)) as head:
        return bytes(head) == file.header


def _compare(
    plan: Plan,
    index: Index,
    files: Sequence[Shard],
    headers: Sequence[Header],
    resources: Resources,
    verdict: Verdict,
    meter: Meter,
    foreign: bool,
) -> None:
    from streamconv.run.output_state import OutputState
    from streamconv.run.pool import Pool

    reads = Reads([plan])
    costs = [dataclasses.replace(cost, fixed=cost.fixed + BUFFER) for cost in costs_of(reads)]
    estimate_memory(reads, resources, costs)  # a budget that is far too small is refused before anything is loaded
    load_kernels(reads)
    sink = Compared(plan, files, headers)
    state = OutputState(plan, sink)
    try:
        with mapped(resources.read, reads, any(cost.kernel for cost in costs)) as windows:
            allocated = memory_plan.allocate(resources.memory_budget, resources.workers, memory.resident(), most_expensive(reads, costs))
            meter.begin("comparing", plan.bytes_read, memory_budget=allocated.budget)
            Pool(reads, [state], index.shards, allocated, costs, resources.tile_rows, meter.tile, mapped=windows).run()
    except DataError as refused:
        verdict.problems.append(f"this source gives no checkpoint: {refused}")
        return
    for shard in (*index.shards, *plan.beside, *files):
        shard.check_unchanged()
    encoded = sum(len(matrix.places) for matrix in plan.matrices) + len(plan.constants)
    verdict.encoded = encoded - len(sink.differences)
    room = allocated.budget - memory.resident() - memory_plan.MARGIN - (0 if "torch" in sys.modules else _TORCH)
    errors: dict[int, measured.Error] = {}
    if room >= measured.smallest(plan):
        errors = measured.measure(
            plan, index.shards, files, state.results, judgement.rows_to_decode(plan, sink, foreign), min(room, 64 * memory.MIB)
        )
    else:
        need = -(-(allocated.budget - room + measured.smallest(plan)) // memory.MIB)
        if foreign and sink.differences:
            raise BudgetError(f"decoding what differs takes a memory budget of {need}MiB", hint=f"--memory-budget {need}MiB")
        verdict.warnings.append(f"error and SNR are not shown: decoding takes a memory budget of {need}MiB")
    for number, error in errors.items():
        matrix = plan.matrices[number]
        file, name = plan.files[matrix.file].name, matrix.places[0].tensor
        verdict.errors.append(TensorError(file, name, error.rows, error.largest, error.relative(), error.snr()))
    judgement.judge(plan, headers, sink, errors, verdict, foreign)


def _asked(record: manifest.Manifest, folder: Path) -> Target:
    """The options that a manifest tells of."""
    try:
        return target_from_json(record.target, record.asked)
    except UsageError as error:
        raise VerifyError(f"{printable(folder / manifest.NAME)} is not a streamconv manifest: {error.message}") from None
