"""The closing lines of a conversion."""

from __future__ import annotations

from math import isinf

from streamconv.cli import output
from streamconv.memory import show_size
from streamconv.reports import Report


def show(report: Report, as_json: bool, quiet: bool) -> None:
    """Print them; warnings in any case."""
    for warning in report.warnings:
        output.note(f"warning: {warning}")
    if quiet or as_json:
        return
    several = len(report.outputs) > 1
    if report.parts is not None:
        for each in report.outputs if several else ():
            did = f"part{'s' * (len(each.parts) != 1)} {', '.join(map(str, each.parts))}" if each.parts else "no part"
            after = "complete" if each.published else f"other parts are missing, see `streamconv status {each.out}`"
            output.line(f"{each.out}: {did} done here; {after}")
        done = f"part{'s' * (len(report.parts) != 1)} {', '.join(map(str, report.parts))}" if report.parts else "no part"
        done = f"{len(report.parts)} parts" if several else done
        whole = "all outputs are complete" if several else "the output is complete"
        after = whole if report.published else "other parts are missing, see `streamconv status`"
        output.line(
            f"{report.out}: {done} done here, {show_size(report.bytes_read)} read in {report.seconds:.1f} s, peak memory "
            f"{show_size(report.peak_memory)} of {show_size(report.budget)}"
            + (f", {report.resumed} tiles of an earlier run were kept" if report.resumed else "")
            + f"; {after}"
        )
        return
    if several:
        for each in report.outputs:
            files = f"{each.files} file{'s' * (each.files != 1)}, {each.tensors} tensors"
            kept = f"; {each.resumed} tiles of an earlier run were kept" if each.resumed else ""
            what = "finished by an earlier run, skipped" if each.finished else f"{files}, {show_size(each.bytes_written)} written{kept}"
            output.line(f"{each.out}: {what}")
    whole = f"{len(report.outputs)} outputs" if several else report.out
    output.line(
        f"{whole}: {report.files} file{'s' * (report.files != 1)}, {report.tensors} tensors, "
        f"{show_size(report.bytes_written)} written, {show_size(report.bytes_read)} read in {report.seconds:.1f} s; "
        f"peak memory {show_size(report.peak_memory)} of {show_size(report.budget)} with {report.workers} workers"
        + (f"; {report.resumed} tiles of an earlier run were kept" if report.resumed else "")
    )
    if errors := [error for written in report.outputs for error in written.errors]:
        worst = min(errors, key=lambda error: error.snr_db)
        inexact = sum(not isinf(error.snr_db) for error in errors)
        told = f", the worst {worst.name} with an SNR of {worst.snr_db:.1f} dB" if inexact else ""
        output.line(f"{len(errors)} matrices were decoded as they were written, {len(errors) - inexact} are exact{told}")
    if report.estimate is not None and not report.resumed:
        output.line(f"time: {report.estimate.off(report.seconds)}")
    if report.profile:
        mapped = f"; {show_size(report.bytes_mapped)} of the source mapped, {show_size(report.bytes_read - report.bytes_mapped)} copied"
        output.line("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in report.profile.items()) + mapped)
