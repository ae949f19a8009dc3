"""A real Slurm of one's own on this machine: munged, slurmctld and several slurmd with fake GPUs, in a directory of theirs.

Nothing of a Slurm that is installed here is touched: own configuration (SLURM_CONF), own key, socket and ports.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
GPUS = 8

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=20
KillWait=30
MpiDefault=none
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN"


def why_not() -> str | None:
    """What keeps a Slurm from running here, None when nothing does. Installs Debian's packages where this user may."""
    if os.geteuid() != 0:
        return "needs root to start slurmd"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        _install()
        missing = [name for name in missing if shutil.which(name) is None]
        if missing:
            return f"no {', '.join(missing)} (Debian packages slurm-wlm and munge)"
    return None


def _install() -> None:
    if shutil.which("apt-get") is None:
        return
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        subprocess.run(["apt-get", "-q", *arguments], capture_output=True, timeout=300, check=False,
                       env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cluster:
    """directory: configuration, state and logs of the daemons. slurmds: those that run, by the machine that they are."""

    directory: Path
    slurmds: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.directory / "slurm.conf")}

    def run(self, *command: object, **more: str) -> str:
        """A Slurm command's output; AssertionError with its message when it fails."""
        done = subprocess.run(
            [str(part) for part in command], env=self.environment | more, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` tells."""
        return dict(
            part.split("=", 1) for part in self.run("scontrol", "show", "job", "-o", number).split() if "=" in part
        )

    def wait(self, number: str, seconds: float = 900) -> dict[str, str]:
        """The job when it is over."""
        limit = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"):
            assert time.monotonic() < limit, f"job {number} is {job['JobState']} ({job['Reason']}) after {seconds} s"
            time.sleep(0.3)
        return job

    def start_slurmd(self, node: str) -> None:
        with open(self.directory / "daemons.log", "ab") as log:
            command = ["slurmd", "-D", "-N", node]
            self.slurmds[node] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    @contextlib.contextmanager
    def without_slurmd(self, node: str) -> Iterator[None]:
        """Killed while the block runs, with what it had started, as when the machine is off; afterwards the machine is back."""
        self.slurmds[node].kill()
        self.slurmds[node].wait()
        tasks, stepds = self._stopped(node)
        # children first: where a parent goes, SIGHUP would wake them
        for pid in [*sorted(tasks, reverse=True), *stepds]:
            _send(pid, signal.SIGKILL)
        try:
            yield
        finally:
            self.start_slurmd(node)
            nodes = len(self.slurmds)
            _wait_for(lambda: _nodes(self, "idle,alloc,mix,comp") == nodes, self.directory, 60)

    def _stopped(self, node: str) -> tuple[set[int], set[int]]:
        """The machine's tasks, and what has started them, once all stand still: one that sees another die would tell, which a machine
        that is off does not. (srun's second process cancels the step.)
        """
        stopped: set[int] = set()
        while True:
            tasks = set(self._tasks_of(node))
            stepds = _stepds_of(tasks)
            if tasks | stepds <= stopped:
                return tasks, stepds
            for pid in (tasks | stepds) - stopped:
                _send(pid, signal.SIGSTOP)
            stopped |= tasks | stepds

    def _tasks_of(self, node: str) -> Iterator[int]:
        """Processes of that machine's jobs: what tells them from those of the others, and of other clusters here, is their environment."""
        ours = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()}
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if ours <= set((directory / "environ").read_bytes().split(b"\0")):
                    yield int(directory.name)

    def cancel_all(self) -> None:
        """And wait until the jobs are over: daemons that end before leave their processes behind."""
        numbers = self.run("squeue", "-h", "-o", "%A").split()
        for number in numbers:
            self.run("scancel", number)
        for number in numbers:
            self.wait(number)


@contextlib.contextmanager
def start(directory: Path, num_nodes: int) -> Iterator[Cluster]:
    """The cluster while the block runs; its daemons are ended afterwards."""
    _configure(directory, num_nodes)
    cluster = Cluster(directory)
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={directory}/munge/key", f"--socket={directory}/munge/socket",
         f"--pid-file={directory}/munge/pid", f"--log-file={directory}/munge/log", f"--seed-file={directory}/munge/seed"],
        ["slurmctld", "-D"],
    ]  # fmt: skip
    running = []
    try:
        with open(directory / "daemons.log", "wb") as log:
            for command in daemons:
                running.append(subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log))
                if command[0] == "munged":
                    _wait_for(lambda: (directory / "munge" / "socket").exists(), directory)
        for i in range(num_nodes):
            cluster.start_slurmd(f"n{i}")
        _wait_for(lambda: _nodes(cluster, "idle") == num_nodes, directory)
        yield cluster
        cluster.cancel_all()
    finally:
        running += cluster.slurmds.values()
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
        for process in reversed(running):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _configure(directory: Path, num_nodes: int) -> None:
    for name in ("state", "munge"):
        (directory / name).mkdir(parents=True)
    key = directory / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    for gpu in range(GPUS):
        (directory / f"gpu{gpu}").touch()
    host = socket.gethostname().split(".")[0]
    first, *ports = _free_ports(num_nodes + 1)
    nodes = "\n".join(NODE.format(i=i, host=host, port=port, gpus=GPUS) for i, port in enumerate(ports))
    (directory / "slurm.conf").write_text(CONFIG.format(host=host, port=first, directory=directory, nodes=nodes))
    gres = [f"NodeName=n{i} Name=gpu File={directory}/gpu[0-{GPUS - 1}]\n" for i in range(num_nodes)]
    (directory / "gres.conf").write_text("".join(gres))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _stepds_of(tasks: Iterable[int]) -> set[int]:
    """What has started them."""
    found = set()
    for task in tasks:
        with contextlib.suppress(OSError):
            parent = int(Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()[1])
            if Path(f"/proc/{parent}/comm").read_text().strip() == "slurmstepd":
                found.add(parent)
    return found


def _nodes(cluster: Cluster, states: str) -> int:
    """How many are in one of them."""
    done = subprocess.run(
        ["sinfo", "-h", "-p", "main", "-t", states, "-o", "%D"], env=cluster.environment, capture_output=True, text=True
    )
    return sum(map(int, done.stdout.split()))


def _wait_for(condition, directory: Path, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(
            f"{log}:\n{log.read_text()[-1500:]}" for log in sorted(directory.rglob("*log")) if log.is_file()
        )
        assert time.monotonic() < limit, f"Slurm did not come up in {seconds} s\n{logs}"
        time.sleep(0.2)
