"""`streamconv submit`: the job of a cluster that does one conversion in parts. Printed, and never submitted."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

import click

from streamconv.cli import output
from streamconv.errors import UsageError, printable

PARTS_EACH = 4
"""Parts for each worker, so that a slow one, or one that died, is made up for by the others."""
MOST_TASKS = 1000
"""Of a Slurm array: MaxArraySize is 1001 unless an administrator has changed it."""
_LOST = (2, 3, 4, 5, 7, 8)
"""Exit statuses that another attempt gives again; 6 and 9 may pass."""


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("where", type=click.Choice(["slurm", "k8s"]))
@click.option("--nodes", type=click.IntRange(1), required=True, help="Workers to start.")
@click.option("--parts", type=click.IntRange(1), help=f"Parts of the work; {PARTS_EACH} for each worker unless given.")
@click.option("--cpus", type=click.IntRange(1), default=4, show_default=True, help="Processors of a worker.")
@click.option("--memory", default="4GiB", show_default=True, help="Memory of a worker; an eighth of it is left free.")
@click.option("--name", default="streamconv", show_default=True, help="Of the job.")
@click.option("--sbatch", multiple=True, metavar="FLAG", help="slurm: a further #SBATCH line, --partition=cpu for example; repeatable.")
@click.option("--image", help="k8s: container image with streamconv.")
@click.option("--claim", help="k8s: PersistentVolumeClaim (ReadWriteMany) that MODEL and OUT are on.")
@click.option("--mount", default="/work", show_default=True, help="k8s: where the claim is mounted; MODEL and OUT are below it.")
@click.argument("command", nargs=-1, required=True, metavar="-- convert MODEL OUT ...")
def submit(
    where: str,
    nodes: int,
    parts: int | None,
    cpus: int,
    memory: str,
    name: str,
    sbatch: tuple[str, ...],
    image: str | None,
    claim: str | None,
    mount: str,
    command: tuple[str, ...],
) -> int:
    """Print a job script of Slurm, or a Job of Kubernetes, that does a conversion on many nodes.

    Any worker may die, or be started again: the others do its parts, and the last one publishes.
    """
    from streamconv.memory import parse_size
    from streamconv.planning.parts import MOST

    size = parse_size(memory)
    count = parts or min(PARTS_EACH * nodes, MOST)
    words = _worker(command, where == "slurm", count, cpus, size - size // 8)
    if where == "slurm":
        output.block(slurm(words, nodes, cpus, size, name, sbatch))
        return 0
    if not image or not claim:
        raise UsageError("k8s needs --image and --claim")
    import yaml

    job = kubernetes(["streamconv", *words], nodes, cpus, size, name, image, claim, mount)
    output.block(yaml.safe_dump(job, sort_keys=False, width=1000).rstrip("\n").split("\n"))
    return 0


def _worker(command: tuple[str, ...], here: bool, parts: int, cpus: int, budget: int) -> list[str]:
    """The words of a worker's command, which `convert` accepts.

    Args:
        here: paths are those of this machine, and are made absolute.

    Raises:
        UsageError: it is no conversion, or convert would refuse its flags.
    """
    from streamconv.cli.conversion import convert

    first, *words = command
    if first != "convert":
        raise UsageError(f"{printable(first)} is not done in parts", hint="streamconv submit slurm --nodes 16 -- convert MODEL OUT ...")
    context = convert.make_context("convert", [*words], resilient_parsing=False)
    values: dict[str, Any] = context.params
    if values["parts"] or values["part"]:
        raise UsageError("--parts and --part are for the script to say", hint="streamconv submit slurm --parts 64 ... -- convert ...")
    if values["text"]:
        raise UsageError("--text is not for a job in parts: what is measured is measured once", hint="measure first, see `convert --help`")
    if values["out"] is None and not values["output"]:
        raise UsageError("no OUT is named", hint="streamconv submit slurm --nodes 16 -- convert MODEL OUT ...")
    if here:
        for key in ("model", "out"):
            given = str(values[key])
            if values[key] is not None and given in words and (key == "out" or os.path.lexists(given)):
                words[words.index(given)] = os.path.abspath(given)
    typed = {word.partition("=")[0] for word in words}
    added = ["--parts", str(parts)]
    added += [] if "--workers" in typed else ["--workers", str(cpus)]
    added += [] if "--memory-budget" in typed else ["--memory-budget", f"{budget >> 20}MiB"]
    return ["convert", *words, *added]


def slurm(words: list[str], nodes: int, cpus: int, memory: int, name: str, more: tuple[str, ...]) -> list[str]:
    """A script for sbatch.

    Args:
        memory: bytes of a worker.
        more: further flags of sbatch.
    """
    tasks = min(nodes, MOST_TASKS)
    flags = [f"--job-name={name}", f"--array=0-{tasks - 1}", "--nodes=1 --ntasks=1", f"--cpus-per-task={cpus}", f"--mem={memory >> 20}M"]
    flags += ["--requeue", "--open-mode=append", "--signal=B:TERM@60", *more]
    few = f"# {nodes} nodes were asked for; an array has {MOST_TASKS} tasks at most (MaxArraySize). Submit it again for more."
    return [
        "#!/bin/bash",
        *(f"#SBATCH {flag}" for flag in flags),
        "# Every task takes parts until none is left, and the last one publishes: no other job has to wait for this one.",
        "# A task that died needs no second start: the others do its part. To start more: sbatch this again, with any --array.",
        *([few] if tasks < nodes else []),
        f"cd {shlex.quote(os.getcwd())} || exit 6",  # what a flag or a recipe names lies where it was typed
        "exec " + shlex.join([sys.executable, "-m", "streamconv", *words]),
    ]


def kubernetes(words: list[str], nodes: int, cpus: int, memory: int, name: str, image: str, claim: str, mount: str) -> dict[str, Any]:
    """An Indexed Job, for Kubernetes 1.31 and later: `backoffLimitPerIndex` and `podReplacementPolicy` keep one index from using up
    the retries of all, and from running twice."""
    quantities = {"cpu": str(cpus), "memory": str(memory)}
    container = {
        "name": "worker",
        "image": image,
        "command": words,
        "env": [{"name": "STREAMCONV_COUNT", "value": str(nodes)}],
        "resources": {"requests": quantities, "limits": {"memory": str(memory)}},
        "volumeMounts": [{"name": "work", "mountPath": mount}],
    }
    wrong = {"action": "FailJob", "onExitCodes": {"containerName": "worker", "operator": "In", "values": list(_LOST)}}
    moved = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimitPerIndex": 3,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": [moved, wrong]},
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "containers": [container],
                    "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": claim}}],
                }
            },
        },
    }
