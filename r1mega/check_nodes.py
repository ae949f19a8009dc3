"""`r1mega check-nodes`: are the machines of a job fit for it, and equal? Before the first step, or in an sbatch prolog.

Each rank measures itself (`measure`), all hear of all, and `problems` says what is wrong with whom: against fixed limits, and
against the median of the job. Under torchrun and srun with one process a GPU; on a CPU by gloo; alone without either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from r1mega import platform
from r1mega.observe.environment import describe_environment
from r1mega.platform import groups
from r1mega.platform.launcher import adopt_launcher_environment, raise_open_files

GPU_QUERY = ("memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total", "clocks.max.sm")
WHY_SLOW = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""One bit field: its name, and the one older drivers know. nvidia-smi refuses a whole query for an unknown name."""
THROTTLED = 0x8 | 0x40 | 0x80
"""Bits of WHY_SLOW: hardware slowdown, thermal, power brake."""
SHARED_MEMORY_BYTES = 2**30
"""Least free of /dev/shm: NCCL's buffers between the processes of a machine, vLLM's, and torch's."""
SECONDS_APART = 2.0
"""Clocks of machines may differ by so much: checkpoints, locks and logs are ordered by them."""
SLOW, SLOW_ON_CPU = 0.85, 0.5
"""A speed below this share of the median is slow, without --slow. CPUs are shared with whatever else runs."""
PROBE_SECONDS = 1.0
ALL_REDUCE_BYTES = 64 * 2**20
TAKEN_MIB = 2048
"""Of a GPU's memory, at most, or 5 %, before a job's work begins: CUDA's context and NCCL's buffers of this process."""
DISK_PROBE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """What nvidia-smi says of a device; MiB, MHz. ecc_errors: uncorrected, since the last reset. None: not told."""

    memory_mib: int | None = None
    used_mib: int | None = None
    ecc_errors: int | None = None
    max_clock_mhz: int | None = None
    throttle_reasons: int | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What a rank found. Speeds are None where they were not measured (one rank has nobody to exchange with)."""

    rank: int
    host: str
    local_size: int
    program: dict[str, str]
    gpu_count: int
    gpu: Gpu | None
    clock: float
    open_files: int
    shared_memory_bytes: int
    disk_error: str | None
    disk_free_bytes: int
    matmul_tflops: float = 0.0
    copy_gb: float = 0.0
    pair_gb: dict[int, float] = field(default_factory=dict)
    whole_gb: float | None = None
    wrong_sums: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"


def measure(run_dir: Path | None) -> Facts:
    """This rank's facts; a collective call. run_dir: where the run will write."""
    here = platform.current()
    before = gpu(here.device)  # what this rank takes itself comes later; neighbours have GPUs of their own
    dist.barrier()
    clock = time.time()  # all within the barrier's milliseconds
    disk_error, free = try_disk(run_dir) if run_dir is not None else (None, 0)
    facts = Facts(
        dist.get_rank(), socket.gethostname(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")), program(),
        torch.cuda.device_count() if here.name == "cuda" else 0, before, clock,
        raise_open_files(), shutil.disk_usage("/dev/shm").free, disk_error, free,
    )  # fmt: skip
    facts = with_speeds(facts)
    after = gpu(here.device)  # still warm: clocks slow down under load
    if before is not None and after is not None:
        after = dataclasses.replace(after, used_mib=before.used_mib)
    return dataclasses.replace(facts, gpu=after)


def with_speeds(facts: Facts) -> Facts:
    """`facts` with this rank's speeds, the better of those it has and of new ones; a collective call."""
    rank, world = dist.get_rank(), dist.get_world_size()
    here = platform.current()
    dist.barrier()  # so that speeds are taken at the same time: also what neighbours share is seen
    product, copy = matmul_tflops(here.device), copy_gb(here.device)
    torch.cuda.empty_cache()  # room for NCCL
    pairs, wrong = dict(facts.pair_gb), list(facts.wrong_sums)
    numel = ALL_REDUCE_BYTES // 4
    for distance in _distances(world):
        other, group = _pair(rank, world, distance)
        dist.barrier()
        if group is not None and other is not None:
            speed, right = all_reduce_gb(here.device, numel, group, rank + 1 + other + 1)
            pairs[other] = max(speed, pairs.get(other, 0.0))
            wrong += [] if right else [f"with rank {other}"]
    whole = facts.whole_gb
    if world > 1:
        dist.barrier()
        speed, right = all_reduce_gb(here.device, numel, dist.group.WORLD, world * (world + 1) // 2)
        whole = max(speed, whole or 0.0)
        wrong += [] if right else ["of all ranks"]
    return dataclasses.replace(
        facts, matmul_tflops=max(product, facts.matmul_tflops), copy_gb=max(copy, facts.copy_gb), pair_gb=pairs,
        whole_gb=whole, wrong_sums=tuple(dict.fromkeys(wrong)),
    )  # fmt: skip


def problems(ranks: Sequence[Facts], *, free_bytes: int = 0) -> Iterator[str]:
    """What is wrong besides speeds, a line each. free_bytes: wanted for run_dir."""
    usual = {name: Counter(facts.program.get(name) for facts in ranks).most_common(1)[0][0] for name in _names(ranks)}
    gpu_count = statistics.mode(facts.gpu_count for facts in ranks)
    gpus = [facts.gpu for facts in ranks if facts.gpu is not None]
    memory = statistics.median([gpu.memory_mib for gpu in gpus if gpu.memory_mib is not None] or [0])
    top_clock = max([gpu.max_clock_mhz for gpu in gpus if gpu.max_clock_mhz is not None] or [0])
    clock = statistics.median(facts.clock for facts in ranks)
    open_files = max(1024, 4 * len(ranks))  # sockets of three world-sized gloo groups and smaller ones
    for facts in ranks:
        for name, version in usual.items():
            if (found := facts.program.get(name)) != version:
                yield f"{facts.name}: {name} is {found or 'missing'}, elsewhere {version or 'missing'}; install the same on all"
        if facts.gpu_count != gpu_count:
            yield (
                f"{facts.name}: sees {facts.gpu_count} GPUs, others {gpu_count}; look at nvidia-smi -L and CUDA_VISIBLE_DEVICES there, "
                "ask for as many on each machine (--gpus-per-node), or leave the machine out"
            )
        if facts.gpu is not None:
            yield from _gpu_problems(facts.name, facts.gpu, memory, top_clock)
        if abs(facts.clock - clock) > SECONDS_APART:
            yield f"{facts.name}: its clock is {facts.clock - clock:+.1f} s off the median; start chrony or ntpd there"
        if facts.open_files < open_files:
            yield (
                f"{facts.name}: {facts.open_files} open files allowed, {open_files} wanted; raise the hard limit there "
                "(/etc/security/limits.conf; under Slurm LimitNOFILE of slurmd's unit)"
            )
        if facts.shared_memory_bytes < SHARED_MEMORY_BYTES:
            free = f"{facts.shared_memory_bytes / 2**20:.0f} MiB free"
            yield f"{facts.name}: /dev/shm has {free}; remove what fills it, or give the container --shm-size or --ipc=host"
        if facts.disk_error is not None:
            yield f"{facts.name}: run_dir: {facts.disk_error}; mend or mount that disk there, or choose another run_dir"
        elif facts.disk_free_bytes < free_bytes:
            yield (
                f"{facts.name}: run_dir has {facts.disk_free_bytes / 1e9:.1f} GB free, {free_bytes / 1e9:.1f} wanted; remove something, "
                "or choose another run_dir"
            )
        for which in facts.wrong_sums:
            yield (
                f"{facts.name}: the all-reduce {which} gave a wrong sum; leave the machine out (of a pair the one that every wrong sum "
                "has part in)"
            )


def _gpu_problems(name: str, gpu: Gpu, memory: float, top_clock: int) -> Iterator[str]:
    if gpu == Gpu():
        yield f"{name}: nvidia-smi tells nothing of its GPU: ECC, clocks and throttling are unchecked; run it there"
    if gpu.memory_mib is not None and gpu.memory_mib < 0.98 * memory:
        yield (
            f"{name}: its GPU has {gpu.memory_mib} MiB, the median {memory:.0f}; ask for machines of one kind (--constraint), or leave "
            "it out"
        )
    if gpu.used_mib is not None and gpu.used_mib > max(0.05 * (gpu.memory_mib or 0), TAKEN_MIB):
        yield f"{name}: {gpu.used_mib} MiB of its GPU are taken before anything began; end what holds them (nvidia-smi)"
    if gpu.ecc_errors:
        yield f"{name}: {gpu.ecc_errors} uncorrected ECC errors; reset the GPU, or leave the machine out"
    if gpu.max_clock_mhz is not None and gpu.max_clock_mhz < 0.95 * top_clock:
        yield (
            f"{name}: its GPU's clock may reach {gpu.max_clock_mhz} MHz, others' {top_clock}; nvidia-smi -rgc gives it back, or leave the "
            "machine out"
        )
    if gpu.throttle_reasons is not None and gpu.throttle_reasons & THROTTLED:
        yield (
            f"{name}: its GPU is slowed down by hardware, heat or power (reasons {gpu.throttle_reasons:#x}); see nvidia-smi -q -d "
            "PERFORMANCE, or leave the machine out"
        )


def slow_ranks(ranks: Sequence[Facts], slow: float) -> Iterator[str]:
    """A line for each speed below this share of the job's median."""
    speeds: dict[str, tuple[str, Callable[[Facts], float | None]]] = {
        "matrix product": ("TFLOP/s", lambda facts: facts.matmul_tflops),
        "copy in memory": ("GB/s", lambda facts: facts.copy_gb),
        "all-reduce of all": ("GB/s", lambda facts: facts.whole_gb),
    }
    for what, (unit, speed) in speeds.items():
        known = {facts.name: value for facts in ranks if (value := speed(facts)) is not None}
        median = statistics.median(known.values()) if known else 0.0
        for name, value in known.items():
            if value < slow * median:
                yield f"{name}: {what} {value:.3g} {unit}, the median {median:.3g}"
    for distance in _distances(len(ranks)):  # pairs of one distance share a kind of link
        pairs = {(f.rank, other): gb for f in ranks for other, gb in f.pair_gb.items() if other - f.rank == distance}
        median = statistics.median(pairs.values()) if pairs else 0.0
        for (rank, other), value in pairs.items():
            if value < slow * median:
                yield f"ranks {rank} and {other}: all-reduce {value:.3g} GB/s, the median {median:.3g} of such pairs"


def run_check(run_dir: Path | None, *, slow: float | None, free_gb: float) -> int:
    """Check this job's machines; rank 0 says what it found. 0: fit; 1: not. On every rank.

    slow: None: SLOW on GPUs; SLOW_ON_CPU on CPUs, and what is slow there is a note and does not make the job unfit.
    """
    adopt_launcher_environment()
    groups.init_distributed()
    try:
        own = measure(run_dir)
        ranks = _all(own)
        on_cpu = not any(facts.gpu_count for facts in ranks)
        share = slow if slow is not None else SLOW_ON_CPU if on_cpu else SLOW
        if any(slow_ranks(ranks, share)):  # all ranks see the same, so all measure again
            ranks = _all(with_speeds(own))
        found, late = list(problems(ranks, free_bytes=int(free_gb * 1e9))), list(slow_ranks(ranks, share))
        if slow is not None or not on_cpu:
            found, late = found + late, []
        if dist.get_rank() == 0:
            say(ranks, found, late)
        return 1 if found else 0
    finally:
        groups.destroy()


def _all(own: Facts) -> list[Facts]:
    ranks: list[Facts] = [None] * dist.get_world_size()  # type: ignore[list-item]  # filled by the next line
    dist.all_gather_object(ranks, own)
    return ranks


def say(ranks: Sequence[Facts], found: Sequence[str], notes: Sequence[str] = ()) -> None:
    """On the terminal: the job's figures, then what is wrong, and what is only to be known."""
    for what, values in {
        "matrix product, TFLOP/s": [facts.matmul_tflops for facts in ranks],
        "copy in memory, GB/s": [facts.copy_gb for facts in ranks],
        "all-reduce of a pair, GB/s": [value for facts in ranks for value in facts.pair_gb.values()],
        "all-reduce of all, GB/s": [facts.whole_gb for facts in ranks if facts.whole_gb is not None],
    }.items():
        if values:
            print(f"{what}: median {statistics.median(values):.3g}, least {min(values):.3g}")
    for line in (*found, *(f"note: {note}" for note in notes)):
        print(line)
    machines = len({facts.host for facts in ranks})
    print(f"{len(ranks)} ranks on {machines} machines: {f'{len(found)} problems' if found else 'fit'}", flush=True)


# ---------------------------------------------------------------------- what a rank measures


def program() -> dict[str, str]:
    """Versions that all must share, by name; the commit of this program among them, and how gloo connects."""
    described = describe_environment()
    own = {"r1mega": described["r1mega"], "commit of r1mega": described["git_commit"] or "unknown"}
    gloo = {"TORCH_GLOO_LAZY_INIT": os.environ.get("TORCH_GLOO_LAZY_INIT", "unset")}
    return described["packages"] | own | {"python": described["python"]} | gloo


def gpu(device: torch.device) -> Gpu | None:
    """None on a CPU. By the device's UUID: CUDA_VISIBLE_DEVICES changes numbers."""
    if device.type != "cuda":
        return None
    return ask_nvidia_smi(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def ask_nvidia_smi(uuid: str) -> Gpu:
    """Gpu() where it says nothing: it is not there, or fails, or does not know the device (a part of one: MIG)."""
    for why_slow in WHY_SLOW:
        query = f"--query-gpu={','.join((*GPU_QUERY, why_slow))}"
        command = ["nvidia-smi", f"--id={uuid}", query, "--format=csv,noheader,nounits"]
        try:
            return read_gpu(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)
        except (OSError, subprocess.SubprocessError):
            continue
    return Gpu()


def read_gpu(text: str) -> Gpu:
    """The line of CSV among what nvidia-smi prints (it warns there too); what a device does not tell is [N/A]."""
    lines = [line.split(",") for line in text.splitlines()]
    return next((Gpu(*map(_number, line)) for line in lines if len(line) == len(GPU_QUERY) + 1), Gpu())


def _number(text: str) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None


def matmul_tflops(device: torch.device) -> float:
    """Of square matrices: bfloat16 on a GPU, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _seconds(device, lambda: a @ a) / 1e12


def copy_gb(device: torch.device) -> float:
    """GB/s read and written within the device's memory."""
    source = torch.zeros((2**30 if device.type == "cuda" else 2**25) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(device, lambda: target.copy_(source)) / 1e9


def all_reduce_gb(
    device: torch.device, numel: int, group: dist.ProcessGroup | None, expected: int
) -> tuple[float, bool]:
    """(GB/s of the tensor, whether the sum of rank + 1 over the group's ranks is right)."""
    own = torch.full((numel,), float(dist.get_rank() + 1), device=device)
    total = own.clone()
    dist.all_reduce(total, group=group)
    right = bool((total == expected).all())
    return own.nbytes / _seconds(device, lambda: dist.all_reduce(total, group=group), group) / 1e9, right


def try_disk(run_dir: Path) -> tuple[str | None, int]:
    """(what is wrong, bytes free) where run_dir is or will be: a file is written, synced, read and removed there."""
    place = next(path for path in (run_dir, *run_dir.absolute().parents) if path.is_dir())
    probe = place / f".check-nodes-{dist.get_rank()}"
    data = os.urandom(DISK_PROBE_BYTES)
    try:
        with open(probe, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        same = probe.read_bytes() == data
        return None if same else f"{place} gave back other bytes than were written", shutil.disk_usage(place).free
    except OSError as error:
        return f"{place}: {error.strerror}", 0
    finally:
        with contextlib.suppress(OSError):  # never made, or told above
            probe.unlink()


def _seconds(device: torch.device, work: Callable[[], object], group: dist.ProcessGroup | None = None) -> float:
    """The least of all that PROBE_SECONDS have room for, of five at least: what else runs there only adds to it.

    The first is not counted. group: of the ranks that `work` needs; they end together.
    """
    taken: list[float] = []
    end = time.perf_counter() + PROBE_SECONDS
    more = True
    while more:
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begun)
        more = len(taken) < 6 or time.perf_counter() < end
        if group is not None:
            vote = torch.tensor(float(more), device=device)
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=group)
            more = bool(vote.item())
    return min(taken[1:])


def _distances(world: int) -> list[int]:
    """Of pairs: neighbours (one machine's links), and ranks half the job apart (between machines)."""
    return sorted({1, world // 2}) if world > 1 else []


def _pair(rank: int, world: int, distance: int) -> tuple[int | None, dist.ProcessGroup | None]:
    """(the rank at this distance, the group of both); None for one that is left over. Only the two make it."""
    low = rank if (rank // distance) % 2 == 0 else rank - distance
    if low + distance >= world:
        return None, None
    group = dist.new_group([low, low + distance], use_local_synchronization=True)
    return (low + distance if rank == low else low), group


def _names(ranks: Sequence[Facts]) -> list[str]:
    return sorted({name for facts in ranks for name in facts.program})
