"""Runs the steps: what each needs, whether it still fits, a process of its own with a time limit, and what it found.

Needs nothing but Python, so that it also runs where torch does not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
import uuid
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from r1mega.gpu_check.findings import Context, Findings
from r1mega.gpu_check.steps import Step

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ROOT / "tools" / "gpu_check.py"
Status = Literal["passed", "slow", "failed", "skipped", "not run"]
TAIL = 80
"""Lines of a failed step's output that are kept."""
LAUNCHED = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID",
    "SLURM_PROCID",
)  # fmt: skip
"""Without them no launcher is seen (config/launched.py)."""
MARK = "R1MEGA_GPU_CHECK"
"""Environment variable by which a step's processes are known: ranks have process groups of their own."""
SECONDS_TO_DIE = 20
"""A process that the driver does not let go of stays longer than that; it is named, and the next step starts."""


@dataclass(slots=True)
class Result:
    """status: 'slow' is right but below a goal; 'skipped' lacks something, 'not run' no longer fitted: neither proves
    anything. reason: of every status but 'passed'. cpu_seconds: of its processes; few in many seconds: the machine was
    busy, or it waited. tail: the end of a failed step's output."""

    name: str
    proves: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    traceback: str = ""
    tail: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """steps: in order; device: 'cuda' or 'cpu'; work: for files between steps and their logs; packages: folders put
    before all others on the steps' import path; deadline: time.monotonic() after which nothing starts, or None;
    patience: factor of the steps' limits."""

    steps: Sequence[Step]
    device: Literal["cuda", "cpu"]
    work: Path
    packages: tuple[Path, ...] = ()
    deadline: float | None = None
    patience: float = 1.0


def run_all(plan: Plan, tell: Callable[[Result], None]) -> list[Result]:
    """Every step's result, in order, each told as it comes."""
    results: dict[str, Result] = {}
    for step in plan.steps:
        result = _run_or_not(step, plan, results)
        results[step.name] = result
        tell(result)
    return list(results.values())


def _run_or_not(step: Step, plan: Plan, results: dict[str, Result]) -> Result:
    missing = _what_is_missing(step, results)
    if missing:
        return Result(step.name, step.proves, "skipped", missing)
    limit = step.limit * plan.patience
    if plan.deadline is not None:
        left = plan.deadline - time.monotonic()
        if left < step.seconds:
            reason = f"takes about {step.seconds} s, {max(0, int(left))} s were left of --minutes"
            return Result(step.name, step.proves, "not run", reason)
        limit = min(limit, left)
    return _run(step, plan, results, limit)


def _what_is_missing(step: Step, results: dict[str, Result]) -> str:
    """What the machine lacks, or else the step before that did not pass."""
    if step.needs:
        environment = results.get("environment")
        abilities = environment.figures.get("abilities") if environment else None
        if abilities is None:
            return "step environment found nothing out"
        lacking = [abilities.get(need, f"{need} was not looked for") for need in step.needs]
        if any(lacking):
            return "; ".join(reason for reason in lacking if reason)
    for name in step.uses:
        if name not in results:
            return f"step {name} was left out"
        if results[name].status not in ("passed", "slow"):
            return f"step {name} was {results[name].status}"
    return ""


def _run(step: Step, plan: Plan, results: dict[str, Result], limit: float) -> Result:
    """The step in its process. Whatever ends the process, there is a Result."""
    found, log = plan.work / f"{step.name}.json", plan.work / f"{step.name}.log"
    found.unlink(missing_ok=True)
    needs = sorted({need for planned in plan.steps for need in planned.needs})
    earlier = {result.name: result.figures for result in results.values()}
    (plan.work / "context.json").write_text(json.dumps({"earlier": earlier, "needs": needs}))
    device = "cpu" if step.on_cpu else plan.device
    command = [sys.executable, str(COMMAND), "--step", step.function, "--device", device, "--work", str(plan.work),
               "--json", str(found)]  # fmt: skip
    mark = uuid.uuid4().hex
    start, used = time.monotonic(), _cpu_seconds()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
            env=step_environment(plan, device) | {MARK: mark}, start_new_session=True,
        )  # fmt: skip
        try:
            ended = _how_it_ended(process.wait(limit))
        except subprocess.TimeoutExpired:
            ended = f"it was ended after {limit:.0f} s"
            _ask_where(mark)
        finally:
            left = _end(process, mark)
    if left:
        ended = "; ".join(filter(None, [ended, f"processes {', '.join(map(str, left))} cannot be killed"]))
    result = _read(step, found, ended)
    result.seconds, result.cpu_seconds = round(time.monotonic() - start, 1), round(_cpu_seconds() - used, 1)
    if result.status == "failed":
        result.tail = log.read_text(errors="replace").splitlines()[-TAIL:]
    return result


def _cpu_seconds() -> float:
    """Of all processes that this one has waited for, and those that they have."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _how_it_ended(code: int) -> str:
    """'' for an end that its result explains."""
    if code < 0:
        return f"its process ended by {signal.Signals(-code).name}"
    return "" if code in (0, 1) else f"its process ended with exit code {code}"


def _read(step: Step, found: Path, ended: str) -> Result:
    try:
        record = json.loads(found.read_text())
    except (OSError, ValueError):
        return Result(step.name, step.proves, "failed", "; ".join(filter(None, [ended, "its process left no result"])))
    result = Result(
        step.name,
        step.proves,
        "passed",
        figures=record["figures"],
        notes=record["notes"],
        traceback=record["traceback"],
    )
    problems = [*([ended] if ended else []), *([record["error"]] if record["error"] else []), *record["failures"]]
    if problems:
        result.status, result.reason = "failed", "; ".join(problems)
    elif record["short"]:
        result.status, result.reason = "slow", "; ".join(record["short"])
    return result


def _marked(mark: str) -> list[int]:
    """Processes, zombies apart, that were started with this mark in their environment."""
    line, found = f"{MARK}={mark}".encode(), []
    for place in Path("/proc").glob("[0-9]*/environ"):
        try:
            if line in place.read_bytes().split(b"\0"):
                found.append(int(place.parent.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return sorted(found)


def _ask_where(mark: str) -> None:
    """Every process of the step that calls `show_stacks` writes where it is into the log."""
    for pid in _marked(mark):
        _signal(os.kill, pid, signal.SIGUSR1)
    time.sleep(1)


def show_stacks() -> None:
    """This process writes its Python stack to stderr when it crashes, and on SIGUSR1."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)


def _end(process: subprocess.Popen, mark: str) -> list[int]:
    """The step's process, its group, and all that it started. Returns the processes that stay nevertheless."""
    _signal(os.killpg, process.pid, signal.SIGKILL)
    until = time.monotonic() + SECONDS_TO_DIE
    while True:
        left = sorted({*_marked(mark), *([process.pid] if process.poll() is None else [])})
        if not left or time.monotonic() > until:
            return left
        for pid in left:
            _signal(os.kill, pid, signal.SIGKILL)
        time.sleep(0.05)


def _signal(send: Callable[[int, int], None], pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(pid, number)


def step_environment(plan: Plan, device: str) -> dict[str, str]:
    """Environment variables of a step: this tree, then the packages that were brought along, before all else."""
    inherited = os.environ.get("PYTHONPATH")
    path = [str(ROOT), str(ROOT / "kernels"), *map(str, plan.packages), *([inherited] if inherited else [])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    for name in list(environment):  # a step is no rank of what started this: torchrun, srun, mpirun
        if name in LAUNCHED or name.startswith(("OMPI_COMM_WORLD_", "PMI_")):
            del environment[name]
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers starts slower than it compiles
    if device == "cuda":
        environment["NVIDIA_TF32_OVERRIDE"] = (
            "0"  # Transformer Engine asks cuBLAS for TF32 in float32 products; torch does not
        )
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def run_step(function: str, device: Literal["cuda", "cpu"], work: Path, result: Path) -> int:
    """In the step's own process: call its function and leave what it found in `result`. The exit code."""
    show_stacks()
    known = json.loads((work / "context.json").read_text())
    context = Context(device, work, known["earlier"], tuple(known["needs"]))
    findings, error, trace = Findings(), "", ""
    try:
        module, name = function.split(":")
        getattr(import_module(module), name)(context, findings)
    except Exception as problem:
        error, trace = f"{type(problem).__name__}: {str(problem)[:400]}", traceback.format_exc()[-6000:]
        traceback.print_exc()
    record = asdict(findings) | {"error": error, "traceback": trace}
    partial = result.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=1, default=str))
    partial.replace(result)
    return 1 if error or findings.failures else 0


def unpack(folders: Iterable[Path], into: Path) -> tuple[Path, ...]:
    """Folders to import from: `folders` themselves, and for each its wheels, unpacked. ValueError for
    no folder, no wheel."""
    found = []
    for index, folder in enumerate(folders):
        if not folder.is_dir():
            raise ValueError(f"--packages {folder}: no such folder")
        wheels = sorted(folder.glob("*.whl"))
        if wheels:
            target = into / f"packages{index}"
            for wheel in wheels:
                try:
                    with zipfile.ZipFile(wheel) as archive:
                        archive.extractall(target)
                except zipfile.BadZipFile as error:
                    raise ValueError(f"--packages: {wheel} is no wheel ({error}); fetch it again") from None
            found.append(target)
        found.append(folder.resolve())
    return tuple(found)
