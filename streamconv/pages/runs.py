"""What the page of a conversion, a check and a calibration says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from streamconv.checkpoint.dtypes import DTYPES
from streamconv.errors import count
from streamconv.memory import show_size
from streamconv.memory_trace import Sample
from streamconv.natural import natural
from streamconv.pages import tensors, timeline
from streamconv.pages.page import Page, Section, Table, machine
from streamconv.planning.memory_plan import processors
from streamconv.verification.verdict import Verdict

if TYPE_CHECKING:
    from streamconv.planning.plan import Plan
    from streamconv.reports import Report, Written

_PHASES = {"read": "reading the source", "compute": "encoding", "hash": "hashing and waiting for the rows before", "write": "writing"}
_AROUND = {"load": "planning and loading", "create": "creating the files", "tiles": "all tiles", "sync": "final sync"}


class Planned(NamedTuple):
    """What a page needs of the plan of an output, which is too large to be kept while it is run.

    Attributes:
        before, after: bytes of source and output, by kind of module.
        decisions: module -> how it is stored and why.
    """

    headline: str
    family: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    decisions: Mapping[str, str]
    notes: Sequence[str]


def planned(plan: Plan) -> Planned:
    """The facts of a plan."""
    before, after = dict[str, int](), dict[str, int]()
    for span in plan.spans:
        if span.reduce is None:
            kind = tensors.kind(span.source.name)
            before[kind] = before.get(kind, 0) + (span.stop - span.start) * span.stored_row_bytes
    for file in plan.files:
        for name, dtype, shape in file.tensors_of():
            kind = tensors.kind(name)
            after[kind] = after.get(kind, 0) + prod(shape) * DTYPES[dtype].itemsize
    quant = f"{plan.target.to_json().get('quant', 'none')}, " if plan.target.key == "trtllm" else ""
    headline = f"{plan.target.headline}, {quant}{plan.dtype.torch}"
    return Planned(headline, plan.family, before, after, dict(plan.decisions), plan.notes)


def conversion(
    model: str, report: Report, plans: Sequence[Planned], recipe: str, samples: Sequence[Sample], command: str, least: float | None = None
) -> Page:
    """The page of a conversion.

    Args:
        recipe: TOML that gives the same conversion.
        least: --min-snr, dB.
    """
    facts = [
        ("source", model),
        ("output", report.out),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", f"{show_size(report.peak_memory)} of {show_size(report.budget)}"),
        ("read", show_size(report.bytes_read)),
        ("written", f"{show_size(report.bytes_written)} in {count(report.files, 'file')}, {report.tensors} tensors"),
        ("workers", f"{report.workers} on {report.device or 'the CPU'}, {report.tiles} tiles"),
    ]
    if report.resumed:
        facts.append(("resumed", f"{report.resumed} tiles of an earlier run"))
    if report.estimate is not None:
        facts.append(("estimated before", str(report.estimate)))
        if not report.resumed:
            facts.append(("and it took", report.estimate.off(report.seconds)))
    facts[2:2] = [("family", plans[0].family)] if plans else []
    if len(plans) == 1:
        facts[3:3] = [("format", plans[0].headline)]
    sections = [*timeline.sections(samples), *_bound(report, samples)]
    if len(report.outputs) > 1:
        sections.append(_outputs(report, plans))
    for number, plan in enumerate(plans):
        written = report.outputs[number] if report.outputs else None
        suffix = f" of {written.out}" if written is not None and len(plans) > 1 else ""
        sections += [replace(section, heading=section.heading + suffix) for section in _output(plan, written, least)]
    return Page(
        f"Conversion of {model}", f"{model} was converted to {report.out}.", facts, sections + _settings(command, recipe), report.warnings
    )


def _outputs(report: Report, plans: Sequence[Planned]) -> Section:
    """Several outputs side by side."""
    states = ("written", "finished before")
    rows = [
        (one.out, plan.headline, states[one.finished], str(one.tensors), show_size(one.bytes_written))
        for one, plan in zip(report.outputs, plans, strict=True)
    ]
    text = "All of them were made from one read of the source."
    return Section("Outputs", text, "", Table(("output", "format", "state", "tensors", "size"), rows, frozenset({2, 3, 4})))


def _output(plan: Planned, written: Written | None, least: float | None) -> list[Section]:
    """What a page says of one output."""
    sections = list[Section]()
    if written is not None:
        sections += tensors.errors(written.errors, least, "All rows were compared, tile by tile, before they were written.")
        sections += [tensors.losses(written.losses)] if written.losses is not None else []
    sections.append(tensors.sizes(plan.before, plan.after))
    rows = sorted(plan.decisions.items(), key=lambda pair: natural(pair[0]))
    text = "How each kind of module is stored; where it is not quantized, why. " + " ".join(f"{note}." for note in plan.notes)
    return [*sections, Section("What became of each module", text, "", Table(("module", "stored as"), rows))]


def _bound(report: Report, samples: Sequence[Sample]) -> list[Section]:
    """Where the time went, and what a faster run would need more of."""
    if not report.profile:
        return []
    phases = {phase: report.profile[phase] for phase in _PHASES if phase in report.profile}
    tiles, sync = report.profile.get("tiles", 0.0), report.profile.get("sync", 0.0)
    during = [sample for sample in samples if sample.phase == "converting"]
    cores, text, longest = processors(), "", max(phases, key=lambda phase: phases[phase], default="")
    if len(during) > 1 and during[-1].time > during[0].time:
        busy = (during[-1].cpu - during[0].cpu) / (during[-1].time - during[0].time)
        text = f"While tiles were converted {busy:.1f} of {cores} processors were busy. "
        if report.seconds < 1:
            text += "The run is too short to say what bound it."
        elif sync > tiles:
            text += "The final sync took longest: the disk that is written to bound the run."
        elif busy >= 0.8 * cores:
            text += "The processors bound the run."
        elif longest in ("read", "write"):
            text += f"The disk that is {'read from' if longest == 'read' else 'written to'} bound the run."
        else:
            text += "No processor and no single phase was at its limit: workers waited for each other, or other programs used the machine."
    rows = [(_PHASES[phase], f"{seconds:.2f} s", f"{seconds / tiles:.0%}" if tiles else "") for phase, seconds in phases.items()]
    rows += [(name, f"{report.profile[key]:.2f} s", "") for key, name in _AROUND.items() if key in report.profile]
    mapped = show_size(report.bytes_mapped)
    text += f" {mapped} of the source were encoded from a mapping, without a copy." if report.bytes_mapped else ""
    table = Table(("an average worker", "time", "of all tiles"), rows, frozenset({1, 2}))
    return [Section("Where the time went", text, "", table)]


def verification(out: str, source: str | None, verdict: Verdict, samples: Sequence[Sample], command: str) -> Page:
    """The page of `verify`."""
    checked = verdict.hashed or verdict.encoded
    state = "good" if checked else "good in its structure; no value was checked"
    if verdict.problems:
        state = f"not good: {len(verdict.problems)} problems"
    facts = [
        ("output", out),
        ("source", source or "not given"),
        ("files, tensors", f"{verdict.files}, {verdict.tensors}"),
        ("hashes equal to the manifest's", str(verdict.hashed)),
        ("equal to the source encoded again", str(verdict.encoded) if source else "not asked"),
        ("time", f"{samples[-1].time:.1f} s"),
    ]
    if verdict.reader:
        facts.append(("TensorRT-LLM's reader", verdict.reader))
    sections = list[Section]()
    if verdict.problems:
        sections.append(Section("Problems", "", "", Table(("problem",), [(problem,) for problem in verdict.problems])))
    sections += tensors.errors(verdict.errors, None, "Compared were the first rows of each matrix, and those that differ.")
    sections += timeline.sections(samples)
    return Page(f"Check of {out}", f"{out} is {state}.", facts, sections + _settings(command, ""), verdict.warnings)


def calibration(
    model: str, measured: Mapping[str, Any], amax: Iterable[tuple[str, float]], text: str, samples: Sequence[Sample], command: str
) -> Page:
    """The page of `calibrate`. `amax`: largest absolute input of each module, in any order."""
    facts = [
        ("model", model),
        ("text", text),
        ("ranges", str(measured["out"])),
        ("samples, tokens", f"{measured['samples']}, {measured['tokens']}"),
        ("layers, ranges", f"{measured['layers']}, {measured['tensors']}"),
        ("time", f"{measured['seconds']:.1f} s on {measured['device']}"),
        ("peak memory", show_size(measured["peak_memory"])),
    ]
    sections = [*timeline.sections(samples), *tensors.ranges(amax), *_settings(command, "")]
    summary = f"Activation ranges of {model} were measured on {measured['samples']} samples of {text}."
    return Page(f"Calibration of {model}", summary, facts, sections)


def largest_inputs(ranges: str) -> Iterator[tuple[str, float]]:
    """(module, largest absolute input) of a file of activation ranges."""
    from streamconv.checkpoint.activation_ranges import Ranges
    from streamconv.checkpoint.header import read_header

    stored = Ranges(ranges)
    for name in read_header(ranges).tensors:
        if name.endswith(".x"):
            yield name[:-2], float(stored.vector(name).max())


def _settings(command: str, recipe: str) -> list[Section]:
    """Command, recipe and machine, at the end of each page."""
    sections = [Section("Command", code=command)]
    if recipe:
        sections.append(Section("Recipe", "The same conversion from a file: streamconv convert --config FILE.", code=recipe))
    return [*sections, machine()]
