"""Workers of a real Slurm: killed, on nodes that die, on nodes that are cut off; the others do their parts, and one publishes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streamconv import api
from streamconv.cli.main import main
from streamconv.errors import StreamconvError
from streamconv.options import Resources
from streamconv.run.claims import Claims
from streamconv.targets.trtllm.options import TensorRTLLM
from tests.crash.world import snapshot, write_model
from tests.e2e import slurm

pytestmark = pytest.mark.skipif(slurm.missing() is not None, reason=slurm.missing() or "")

_HELD = """import os, time
from streamconv.cli import main
from streamconv.run import pool, recorder
do, first = pool.Pool._do, os.environ["SLURM_ARRAY_TASK_ID"] == "1"
def until(name):
    while not os.path.exists(os.path.join({root!r}, name)):
        time.sleep(0.01)
def held(self, *args):
    if not first:
        until("begun")
    do(self, *args)
    if first:
        open(os.path.join({root!r}, "begun"), "w").close()
        until("go")
pool.Pool._do = held
recorder.BATCH_SECONDS = 0.05
main.run()
"""
"""Task 1 is in the middle of a part until somebody says "go", and the others do nothing before it is there."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    made = slurm.Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        made.wait_up()
        yield made
    finally:
        made.down()


class Work:
    """One conversion, and the job that does it."""

    def __init__(self, cluster: slurm.Slurm, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.cluster, self.root, self.out, held = cluster, root, root / "out", root / "held.py"
        model = write_model(root / "model", hidden=256, layers=3)
        api.convert(model, root / "right", TensorRTLLM(tp_size=2), Resources(device="cpu", memory_budget=4 << 30))
        self.right = snapshot(root / "right")
        held.write_text(_HELD.format(root=str(root)))
        words = ["--", "convert", str(model), str(self.out), "--tp-size", "2", "--device", "cpu", "--workers", "1", "--wait", "60"]
        assert main(["submit", "slurm", "--nodes", "4", "--cpus", "1", "--memory", "1GiB", "--parts", "12", *words]) == 0
        script = capsys.readouterr().out.replace("-m streamconv", str(held))
        self.script = script.replace("exec ", "export STREAMCONV_TILE_ROWS=32\nexec ")
        assert str(held) in self.script

    def start(self) -> str:
        """The job, once its task 1 has written something of a part."""
        job = self.cluster.submit(self.script)
        _until(lambda: (self.root / "begun").exists() and self._at_work(job), "task 1 is at work")
        return job

    def go(self) -> None:
        """Task 1 goes on."""
        (self.root / "go").touch()

    def _at_work(self, job: str) -> bool:
        mine = self.cluster.processes(job, 1)
        claims = Claims.of(self.out)
        if claims is None:
            return False
        try:
            held = [part for part in range(claims.count) if any(f"process {pid} " in (claims.held(part) or "") for pid in mine)]
            return any((claims.base.path / f"{part}.journal").exists() for part in held)
        except StreamconvError:
            return False
        finally:
            claims.leave()

    def ends(self) -> None:
        """Published, with the bytes of a single run."""
        _until(self.out.exists, "the output is published")
        assert snapshot(self.out) == self.right


def _until(there: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 100
    while not there():
        assert time.monotonic() < until, f"not in time: {what}"
        time.sleep(0.05)


@pytest.fixture
def work(cluster: slurm.Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Work:
    return Work(cluster, tmp_path, capsys)


def test_an_array(cluster: slurm.Slurm, work: Work) -> None:
    job = work.start()
    work.go()
    work.ends()
    _until(lambda: {state for state, _ in cluster.tasks(job).values()} == {"COMPLETED"}, "all tasks end with 0")
    again = cluster.submit(work.script, "--array=2")  # a task that is started once more finds nothing to do
    _until(lambda: cluster.tasks(again).get(2, ("",))[0] == "COMPLETED", "the late task ends with 0")
    assert snapshot(work.out) == work.right


def test_a_task_is_killed(cluster: slurm.Slurm, work: Work) -> None:
    job = work.start()
    slurm.kill(cluster.processes(job, 1))
    work.ends()
    _until(lambda: cluster.tasks(job)[1][0] == "FAILED", "nobody starts it again")


def test_a_node_dies(cluster: slurm.Slurm, work: Work) -> None:
    job = work.start()
    node, mine = cluster.tasks(job)[1][1], cluster.processes(job, 1)
    slurm.kill([cluster.daemons[node].pid, *slurm.parents(mine), *mine])
    work.ends()
    assert cluster.tasks(job)[1][0] != "COMPLETED", "published without the task that died, and without a second start of it"
    cluster.run("scancel", job)
    cluster.restart(node)
    cluster.wait_up()


def test_a_node_is_cut_off_and_its_task_lives(cluster: slurm.Slurm, work: Work) -> None:
    """The same index is started elsewhere while the first is at work: two writers that mean the same part."""
    job = work.start()
    node, mine = cluster.tasks(job)[1][1], cluster.processes(job, 1)
    slurm.kill([cluster.daemons[node].pid])
    slurm.kill(mine, signal.SIGSTOP)
    other = cluster.submit(work.script, "--array=1", f"--exclude={node}")
    time.sleep(1)
    work.go()
    slurm.kill(mine, signal.SIGCONT)
    work.ends()
    _until(lambda: not cluster.processes(job, 1), "the cut off task ends")
    assert snapshot(work.out) == work.right
    cluster.run("scancel", job, other)
    cluster.restart(node)
    cluster.wait_up()
