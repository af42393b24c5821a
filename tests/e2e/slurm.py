"""A real Slurm on loopback: a controller and four nodes of one processor, for any user, without systemd, cgroups or munge."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "sinfo", "scontrol", "scancel")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_CONFIG = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/ctld.pid
SlurmdPidFile={root}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,bf_continue
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=5
KillWait=1
MinJobAge=600
NodeName=n[1-{nodes}] NodeAddr=127.0.0.1 NodeHostname={host} Port=[{first}-{last}] CPUs=1 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"{absent[0]} is not installed: apt-get install --no-install-recommends slurm-wlm"
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return "this machine's name has no address, which slurmctld needs"
    return None


def _free_ports(count: int) -> int:
    """The first of so many neighbouring ports that nobody listens on."""
    for first in range(17000 + os.getpid() % 500 * 20, 60000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError("no free ports")


class Slurm:
    """A cluster that is up until `down`.

    Args:
        root: a folder of its own.
    """

    def __init__(self, root: Path, nodes: int = 4) -> None:
        self.root, self.nodes = root, nodes
        for name in ("state", "spool", "cg/systemd"):
            (root / name).mkdir(parents=True)
        port, host = _free_ports(nodes + 1), socket.gethostname().split(".")[0]
        facts = {"root": root, "user": getpass.getuser(), "host": host, "nodes": nodes}
        (root / "slurm.conf").write_text(_CONFIG.format(port=port, first=port + 1, last=port + nodes, **facts))
        # slurmd looks for a cgroup tree even where nothing uses it
        (root / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={root}/cg\n")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment |= {"SLURM_CONF": str(root / "slurm.conf"), "PATH": PATH}
        self.daemons = {"ctld": self._start("ctld", "slurmctld", "-D")}
        for number in range(1, nodes + 1):
            (root / f"spool/n{number}").mkdir()
            self.daemons[f"n{number}"] = self._start(f"n{number}", "slurmd", "-D", "-N", f"n{number}")

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with open(self.root / f"{name}.log", "wb") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def run(self, *command: str, text: str | None = None) -> str:
        done = subprocess.run(command, env=self.environment, input=text, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise RuntimeError(f"{command[0]}: {done.stderr.strip()}")
        return done.stdout.strip()

    def wait_up(self, seconds: float = 100) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(RuntimeError):
                if len(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) == self.nodes:
                    return
            time.sleep(0.05)
        raise RuntimeError("; ".join(f"{path.name}: {path.read_text()[-500:]}" for path in self.root.glob("*.log")))

    def submit(self, script: str, *flags: str) -> str:
        """Gives the number of the job."""
        return self.run("sbatch", "--parsable", f"--chdir={self.root}", f"--output={self.root}/job-%A-%a.out", *flags, text=script)

    def tasks(self, job: str) -> dict[int, tuple[str, str]]:
        """Index -> state and node of the tasks that were started."""
        rows = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%K %T %N").splitlines()
        return {int(row.split()[0]): (row.split()[1], [*row.split(), ""][2]) for row in rows if row.split()[0].isdigit()}

    def processes(self, job: str, index: int) -> list[int]:
        """Processes of a task, its daemon left out, by what Slurm puts into their environment."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                held = dict(pair.split(b"=", 1) for pair in (entry / "environ").read_bytes().split(b"\0") if b"=" in pair)
                mine = held.get(b"SLURM_ARRAY_JOB_ID") == job.encode() and held.get(b"SLURM_ARRAY_TASK_ID") == str(index).encode()
                if mine and held.get(b"SLURM_CONF") == self.environment["SLURM_CONF"].encode():
                    found.append(int(entry.name))
        return found

    def restart(self, node: str) -> None:
        """A node whose daemon was killed comes back."""
        self.daemons[node].wait()
        self.daemons[node] = self._start(node, "slurmd", "-D", "-N", node)

    def down(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.run("scancel", "-f", "-u", getpass.getuser())
            until = time.monotonic() + 5
            while self.run("squeue", "-h") and time.monotonic() < until:
                time.sleep(0.05)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def parents(processes: list[int]) -> list[int]:
    """The daemons of the steps that processes belong to."""
    found = []
    for process in processes:
        with contextlib.suppress(OSError, IndexError):
            parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
            if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
                found.append(parent)
    return found


def kill(processes: list[int], number: signal.Signals = signal.SIGKILL) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
