"""Parts as tasks of Ray, for those who have a Ray cluster on one shared file system: `convert --engine ray --parts N`.

A task does one part, of every output, as `--part K/N` does. One that is lost with its node is given to another, where it goes on from its
journal; one that fails by itself is not tried again, for a full disk stays full. Runs inside the cluster: ray:// needs the same Python and
Ray on both sides.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamconv.api import convert, convert_all
from streamconv.errors import StreamconvError, UsageError
from streamconv.options import Resources
from streamconv.progress import Meter
from streamconv.reports import Report, Written
from streamconv.targets.base import Output

RETRIES = 3
"""How often a part is given to another worker after its own was lost."""


def _part(source: str, outputs: Sequence[Output], resources: Resources, force: bool, several: bool) -> Report | StreamconvError:
    """A task: one part; its error is told and not raised, so that it keeps its type."""
    try:
        if several:
            return convert_all(source, outputs, resources, force=force)
        return convert(source, outputs[0].out, outputs[0].target, resources, force=force)
    except StreamconvError as error:
        return error


def convert_on_ray(
    address: str | None,
    source: str | Path,
    outputs: Sequence[Output],
    resources: Resources,
    *,
    force: bool,
    meter: Meter,
    several: bool = False,
) -> Report:
    """Do all parts on a cluster; gives the figures of its tasks together.

    Args:
        address: of the cluster; None takes the one that this process is in, or begins one here.
        resources: of a task; `parts` says how many there are, `workers` how many processors each takes (1 unless given).
        several: as `convert_all` does it; otherwise as `convert`.

    Raises:
        UsageError: Ray is not installed, or no parts were asked for. Else the first error of any task.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray: Ray is not installed", hint="pip install 'streamconv[ray]'") from None
    if resources.parts is None or resources.part is not None:
        raise UsageError("--engine ray needs --parts N", hint="four for each worker, for example")
    began = time.monotonic()
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    here = os.path.realpath(source) if os.path.lexists(source) else str(source)
    task: Any = ray.remote(max_retries=RETRIES, retry_exceptions=False, num_cpus=resources.workers or 1)(_part)
    each = [dataclasses.replace(resources, part=part, workers=resources.workers or 1) for part in range(resources.parts)]
    named = [dataclasses.replace(output, out=os.path.realpath(output.out)) for output in outputs]
    left = [task.remote(here, named, one, force, several) for one in each]
    meter.begin("converting", len(left), unit="parts")
    reports = list[Report]()
    while left:
        (ready, *_), left = ray.wait(left, num_returns=1)
        try:
            report = ray.get(ready)
        except ray.exceptions.RayError as error:
            line = -1 if isinstance(error, ray.exceptions.RayTaskError) else 0  # the last one of a traceback
            raise StreamconvError(f"Ray: {str(error).splitlines()[line]}", hint="run the same command again to resume") from error
        if isinstance(report, StreamconvError):
            raise report
        reports.append(report)
        meter.add(1)
    meter.end()
    together = tuple(_together([report.outputs[at] for report in reports], output.out) for at, output in enumerate(outputs))
    sums = {name: sum(getattr(report, name) for report in reports) for name in ("bytes_read", "bytes_mapped", "tiles", "resumed")}
    warnings = tuple(dict.fromkeys(warning for report in reports for warning in report.warnings))
    return dataclasses.replace(
        reports[0],
        out=", ".join(output.out for output in outputs),
        outputs=together,
        parts=tuple(part for one in together for part in one.parts or ()),
        published=all(one.published for one in together),
        warnings=warnings,
        seconds=time.monotonic() - began,
        peak_memory=max(report.peak_memory for report in reports),
        **sums,
    )


def _together(reports: Sequence[Written], out: str) -> Written:
    """What all tasks did of an output."""
    parts, published = tuple(sorted(part for one in reports for part in one.parts or ())), any(one.published for one in reports)
    warnings = tuple(dict.fromkeys(warning for one in reports for warning in one.warnings))
    return dataclasses.replace(
        reports[0],
        out=out,
        parts=parts,
        published=published,
        finished=published and not parts,
        warnings=warnings,
        errors=tuple(error for one in reports for error in one.errors),
        resumed=sum(one.resumed for one in reports),
    )
