"""Who a process is, from what launchers put into its environment; and the jobs that `submit` prints."""

from __future__ import annotations

import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from streamconv.cli.main import main
from streamconv.errors import UsageError
from streamconv.launchers import Place, begin, part_of, place

ARRAY = {"SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_MAX": "16", "SLURM_ARRAY_TASK_STEP": "2"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, None),
        (ARRAY, Place("Slurm array", 2, 4)),
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "1"}, Place("Slurm array", 2, 4)),  # one task, started again
        ({"SLURM_ARRAY_TASK_ID": "3"}, Place("Slurm array", 3, None)),
        (STEP, Place("srun", 2, 3)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, None),  # the script of a job of three nodes
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "3"} | STEP, Place("Slurm array", 5, 12)),
        (ARRAY | STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place("Slurm array", 2, 4)),
        ({"JOB_COMPLETION_INDEX": "7"}, Place("Kubernetes", 7, None)),
        ({"JOB_COMPLETION_INDEX": "7", "STREAMCONV_COUNT": "16"}, Place("Kubernetes", 7, 16)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None),  # a training shell
        ({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, Place("torchrun", 1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "5"}, Place("Open MPI", 1, 5)),
    ],
)
def test_environments(environment: dict[str, str], wanted: Place | None) -> None:
    assert place(environment) == wanted


def test_parts() -> None:
    assert part_of("3/16", {}) == (3, 16)
    assert part_of("auto/16", ARRAY) == (2, 16)
    assert begin(ARRAY) == 0.5 and begin({}) == 0.0 and begin({"JOB_COMPLETION_INDEX": "7"}) == 0.0
    for wrong in ("16/16", "3", "/4", "a/4", "auto/2", "-1/4", "1/0", "auto/x"):
        with pytest.raises(UsageError):
            part_of(wrong, ARRAY)
    with pytest.raises(UsageError, match="no launcher says"):
        part_of("auto/4", {})
    with pytest.raises(UsageError, match="is no number"):
        place({"JOB_COMPLETION_INDEX": "x"})


def _printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", *words]) == 0
    return capsys.readouterr().out


def test_a_script_for_slurm(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tmp_path / "a model"
    model.mkdir()
    text = _printed(capsys, "slurm", "--nodes", "16", "--sbatch=--partition=cpu", "--", "convert", str(model), "out", "--quant", "int8")
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    lines = text.splitlines()
    assert "#SBATCH --array=0-15" in lines and "#SBATCH --partition=cpu" in lines
    words = f"-m streamconv convert '{model}' {Path('out').resolve()} --quant int8 --parts 64 --workers 4 --memory-budget 3584MiB"
    assert words in lines[-1]
    assert lines[-2] == f"cd {Path.cwd()} || exit 6" and "afterok" not in text
    several = _printed(capsys, "slurm", "--nodes", "2", "--", "convert", str(model), "--output", "hf:out:quant=mxfp4", "--output", "hf:two")
    assert "--output hf:out:quant=mxfp4 --output hf:two --parts 8" in several
    many = _printed(capsys, "slurm", "--nodes", "5000", "--", "convert", "org/name", "out", "--workers=2")
    assert "#SBATCH --array=0-999" in many and "--parts 4096" in many and "convert org/name" in many and "--workers 4" not in many


def test_a_job_for_kubernetes(capsys: pytest.CaptureFixture[str]) -> None:
    text = _printed(capsys, "k8s", "--nodes", "4", "--image", "i", "--claim", "c", "--", "convert", "/work/in", "/work/out")
    job = yaml.safe_load(text)
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][:6] == ["streamconv", "convert", "/work/in", "/work/out", "--parts", "16"]
    for version in ("1.31", "1.33", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["slurm", "--nodes", "2", "--", "plan", "in"], "plan is not done in parts"),
        (["slurm", "--nodes", "2", "--", "convert", "in", "out", "--parts", "3"], "are for the script to say"),
        (["k8s", "--nodes", "2", "--", "convert", "in", "out"], "needs --image and --claim"),
        (["slurm", "--nodes", "2", "--", "convert", "in", "out", "--qunat", "int8"], "No such option"),
        (["slurm", "--nodes", "2", "--", "convert", "in"], "no OUT is named"),
    ],
)
def test_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *words]) == 2
    assert says in capsys.readouterr().err
