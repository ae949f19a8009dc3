"""One way to see the job, whoever started it: torchrun's variables, also under srun and mpirun."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from typing import NoReturn

from r1mega.config.launched import launched_place
from r1mega.errors import PlatformError
from r1mega.platform.signals import SIGNALS

OPEN_FILES = 65536
"""Enough for any job; of a limit of a billion, what closes all descriptors one by one after a fork takes long."""

LAZY_FROM = 128
"""Ranks from which gloo connects two of them when they first talk, not all of them in each group at its start."""


def adopt_launcher_environment() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the launcher's own, unless they are set.

    Under Slurm the master is the step's first host; its port follows from the job id, so that two jobs on one host do
    not meet. Raises PlatformError under mpirun over several hosts when nobody said which is the first.
    """
    raise_open_files()
    place = launched_place()
    if place is not None and place.size >= LAZY_FROM:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if place is None or place.launcher == "torchrun" or place.size == 1:
        return
    os.environ |= {"RANK": str(place.rank), "LOCAL_RANK": str(place.local_rank), "WORLD_SIZE": str(place.size)}
    if place.local_size is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(place.local_size)
    if place.launcher == "Slurm":
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
        return
    if "MASTER_ADDR" not in os.environ and place.local_size != place.size:
        raise PlatformError(
            f"rank {place.rank}: mpirun started {place.size} processes on several hosts; "
            "say where rank 0 is: mpirun -x MASTER_ADDR=host -x MASTER_PORT=29500 ... (-genv with MPICH)"
        )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


def raise_open_files() -> int:
    """As many as this user may have, up to OPEN_FILES; how many are allowed then. A rank has a socket for each other rank in each of several gloo groups:
    some 1,900 at 512 ranks by count, and the usual soft limit is 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY  # -1, in Python
    have, may = (sys.maxsize if limit == endless else limit for limit in (soft, hard))
    wanted = min(may, max(have, OPEN_FILES))
    if wanted > have:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def reserve_port() -> int:
    """A port of this machine that nobody listens on, and that nobody else gets before this process listens there itself,
    be it after a `restart`: a socket stays bound to it (and is never closed)."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store's own: two may bind, one may listen
    holder.bind(("", 0))
    holder.set_inheritable(True)
    port = holder.getsockname()[1]
    holder.detach()
    return port


def prepare_restart(port: int) -> None:
    """port: reserved on rank 0's machine. The ranks will meet there, and no more at the launcher's own store, which knows their
    first meeting only."""
    os.environ["MASTER_PORT"] = str(port)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)


def restart() -> NoReturn:
    """Run this process's command anew in its place: a fresh process to every library and to the GPU, the same one (its pid,
    its variables, its open standard streams) to whoever started it. A request to stop that comes meanwhile waits for the
    handlers of the new one.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _first_host(node_list: str) -> str:
    """'node[03-05,9]' -> 'node03', by Slurm's own tool."""
    return subprocess.run(
        ["scontrol", "show", "hostnames", node_list], check=True, capture_output=True, text=True
    ).stdout.split()[0]
