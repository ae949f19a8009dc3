"""What tools/soak.py does to a run, and how it follows what becomes of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SECONDS_TO_START, SECONDS_TO_SEE = 600.0, 300.0
ASKED = "stop requested"
Start = Callable[[Sequence[str], Path], "subprocess.Popen[bytes]"]
"""Starts `r1mega ARGUMENTS` with its output in that file, behind what is there."""


@dataclass(frozen=True, slots=True)
class Fault:
    """inflict: on a run that goes on; gives the pattern of the line by which it is seen, "" where the end of the command is all that
    there is to see, None where nothing is. codes: what the command may end with; empty: it goes on. told: what the next start
    says of it, the seconds counted from there.
    """

    name: str
    text: str
    inflict: Callable[[Soak], str | None]
    codes: tuple[int, ...] = ()
    several_ranks: bool = False
    told: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """after: seconds from the fault until it was seen; back: until a step came that had not been before. lost: steps done anew."""

    fault: Fault
    step: int
    seen: str
    after: float
    code: int | None
    by: str
    lost: int
    back: float

    def row(self) -> str:
        after = "" if not self.seen else f"{self.after:.1f}"
        code = "" if self.code is None else str(self.code)
        cells = (self.fault.text, str(self.step), self.seen, after, code, self.by, str(self.lost), f"{self.back:.0f}")
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


HEAD = (
    "| fault | in step | seen by | after s | exit code | started again by | steps done anew | a new step after s |\n"
    "|---|---|---|---|---|---|---|---|"
)


class SoakError(Exception):
    """A fault that was not survived, or not seen."""


@dataclass(slots=True)
class Soak:
    """One run in `directory`/run, its command, and what it has said so far."""

    directory: Path
    arguments: Sequence[str]
    start_run: Start
    random: random.Random
    ranks: int = 2
    outcomes: list[Outcome] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    lines: list[tuple[float, str]] = field(default_factory=list)
    _read: int = 0

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def log(self) -> Path:
        return self.directory / "run.log"

    # ------------------------------------------------------------------ what the run shows

    def step(self) -> int:
        """The last that metrics.jsonl has whole."""
        lines = metrics(self.run_dir)
        return int(lines[-1]["step"]) if lines else 0

    def starts(self) -> list[dict[str, int]]:
        path = self.run_dir / "environment.json"
        return json.loads(path.read_text())["starts"] if path.exists() else []

    def look(self) -> None:
        """Take in what was said since."""
        if not self.log.exists():
            return
        with open(self.log, "rb") as file:
            file.seek(self._read)
            new = file.read().rpartition(b"\n")
        self._read += len(new[0]) + len(new[1])
        now = time.monotonic()
        self.lines += [(now, line.decode(errors="replace")) for line in new[0].splitlines()]

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        limit = time.monotonic() + seconds
        while True:
            self.look()
            if condition():
                return
            if time.monotonic() > limit:
                said = "\n".join(line for _, line in self.lines[-20:])
                raise SoakError(f"{what}: not within {seconds:.0f} s; the run's last words:\n{said}")
            time.sleep(0.02)

    def said(self, pattern: str, since: int) -> tuple[float, str] | None:
        """When, and the line."""
        return next(((at, line) for at, line in self.lines[since:] if re.search(pattern, line)), None)

    def pid_of(self, rank: int) -> int:
        """Of a rank below the command; SoakError where the last that it wrote is no longer, so that no other process is hurt."""
        pid = json.loads((self.run_dir / f"watch/rank_{rank}.json").read_bytes())["pid"]
        if self.process is None or self.ended() or pid not in [*descendants(self.process.pid), self.process.pid]:
            raise SoakError(f"rank {rank}: process {pid} is not one of this run")
        return int(pid)

    def any_rank(self) -> int:
        return self.random.randrange(self.ranks)

    # ------------------------------------------------------------------ starting, ending

    def start(self, *more: str) -> None:
        self.process = self.start_run([*self.arguments, f"run_dir={self.run_dir}", *more], self.log)

    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def signal(self, number: int) -> None:
        """To the command, if it has not ended: its number may be another's after that."""
        if self.process is not None and self.process.poll() is None:
            send(self.process.pid, number)

    def kill(self) -> None:
        """The command and all below it, as when the machine goes. Only what this program started and has not ended."""
        if self.process is None or self.process.poll() is not None:
            return
        for pid in [*descendants(self.process.pid), self.process.pid]:
            send(pid, signal.SIGKILL)
        self.process.wait()

    def goes_on(self, step: int, what: str) -> None:
        """Wait for a step after that one, starting again what ended as it may."""
        self.until(lambda: self.step() > step or self.ended(), SECONDS_TO_START, what)
        if self.ended() and self.step() <= step:
            code = self.process.returncode if self.process else None
            raise SoakError(f"{what}: exit code {code}\n" + "\n".join(line for _, line in self.lines[-20:]))

    # ------------------------------------------------------------------ a fault

    def end_of(self, fault: Fault, num_lines: int, before: int, num_starts: int) -> tuple[int | None, str, float, int]:
        """(the exit code, who starts it again, when, the last step that it had done), once it has been started again."""
        if not fault.codes:
            return None, "", time.monotonic(), before
        again = r"starting again in"
        self.until(
            lambda: self.ended() or self.said(again, num_lines) is not None, SECONDS_TO_SEE, f"{fault.name}: the end"
        )
        code, by, reached = None, "itself", max(before, self.step())
        if self.ended():
            assert self.process is not None
            code = exit_code(self.process.returncode)
            by = "a person" if code in FOR_A_PERSON else "the scheduler"
            if code not in fault.codes:
                raise SoakError(f"{fault.name} at step {before}: exit code {code}, not {fault.codes}")
            self.start()
        started = time.monotonic()
        self.until(lambda: len(self.starts()) > num_starts or self.ended(), SECONDS_TO_START, f"{fault.name}: a start")
        return code, by, started, reached

    def suffer(self, fault: Fault) -> Outcome:
        """Inflict it, see it, and wait until the run has gone further than it had. Raises SoakError where it does not."""
        assert self.process is not None
        before, num_starts, num_lines = self.step(), len(self.starts()), len(self.lines)
        began = time.monotonic()
        pattern = fault.inflict(self)
        seen = (began, "")
        if pattern is not None:
            self.until(
                lambda: self.said(pattern, num_lines) is not None if pattern else self.ended(),
                SECONDS_TO_SEE, f"{fault.name} at step {before}: `{pattern}` to be said",
            )  # fmt: skip
            seen = (pattern and self.said(pattern, num_lines)) or (time.monotonic(), "the end of the command")
        code, by, started, reached = self.end_of(fault, num_lines, before, num_starts)
        self.goes_on(reached, f"{fault.name} at step {before}: a step after {reached}")
        back = time.monotonic() - began
        if fault.told:
            if (found := self.said(fault.told, num_lines)) is None:
                raise SoakError(f"{fault.name} at step {before}: the next start did not say `{fault.told}`")
            began, seen = started, found
        starts = self.starts()
        if (len(starts) > num_starts) != bool(fault.codes):
            raise SoakError(f"{fault.name} at step {before}: {len(starts) - num_starts} new starts")
        lost = max(0, reached - starts[-1]["step"]) if len(starts) > num_starts else 0
        outcome = Outcome(fault, before, short(seen[1]), seen[0] - began, code, by, lost, back)
        self.outcomes.append(outcome)
        print(outcome.row(), flush=True)
        return outcome


def metrics(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def exit_code(code: int) -> int:
    return 128 - code if code < 0 else code


def short(line: str) -> str:
    """Without the times, places and process numbers of one run."""
    line = re.sub(r"/\S*/", "", line)
    return re.sub(r"\(pid \d+[^)]*\)|^\S*\d\d:\d\d:\d\d\S* *", "", line).strip()[:110]


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Processes below that one, the deepest first."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [below for child in children for below in [*descendants(child), child]]


# ---------------------------------------------------------------------- the faults


def kill_rank(soak: Soak) -> str:
    rank = soak.any_rank()
    send(soak.pid_of(rank), signal.SIGKILL)
    return rf"rank {rank} of {soak.ranks} .*ended first: SIGKILL" if soak.ranks > 1 else ""


def stop_rank(soak: Soak) -> str:
    rank = soak.any_rank()
    send(soak.pid_of(rank), signal.SIGSTOP)
    return rf"watchdog, rank \d+: rank {rank} \(pid"


def pause_rank(soak: Soak) -> None:
    pid = soak.pid_of(soak.any_rank())
    send(pid, signal.SIGSTOP)
    time.sleep(3)
    send(pid, signal.SIGCONT)


def ask(number: int) -> Callable[[Soak], str]:
    def inflict(soak: Soak) -> str:
        soak.signal(number)
        return ASKED

    return inflict


def full_disk(soak: Soak) -> str:
    """The kernel refuses to let any file of one rank grow over what metrics.jsonl has: EFBIG, where a full disk says ENOSPC."""
    rank = 0 if soak.ranks == 1 else soak.any_rank()
    size = (soak.run_dir / "metrics.jsonl").stat().st_size
    resource.prlimit(soak.pid_of(rank), resource.RLIMIT_FSIZE, (max(size, 4096), resource.RLIM_INFINITY))
    return "File too large"


def lose_machine(soak: Soak) -> str:
    """Killed at once, with half of a line in a record, as a write that was on its way leaves it."""
    soak.kill()
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(soak.run_dir / name, "ab") as file:
            file.write(b'{"step": 9999, "rewa')
    return ""


def damage_checkpoint(soak: Soak) -> str:
    """Killed, and one byte of its newest checkpoint is another one at the next start."""
    soak.kill()
    newest = max((soak.run_dir / "checkpoints").glob("step_" + "[0-9]" * 6))
    damaged = soak.random.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
    place = soak.random.randrange(damaged.stat().st_size)
    with open(damaged, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << soak.random.randrange(8)]))
    return ""


def workers(pid: int) -> set[int]:
    """Processes of the reward pool below that one."""
    found = set()
    for below in descendants(pid):
        with contextlib.suppress(OSError):  # it has ended since
            if b"r1mega.reward.worker" in Path(f"/proc/{below}/cmdline").read_bytes():
                found.add(below)
    return found


def kill_worker(soak: Soak) -> None:
    """Of one rank all, and others come in their place. SoakError where there are none, or none come."""
    rank = soak.pid_of(soak.any_rank())
    old = workers(rank)
    if not old:
        raise SoakError(f"rank process {rank} has no workers to kill")
    for pid in old:
        send(pid, signal.SIGKILL)
    soak.until(lambda: bool(workers(rank) - old), SECONDS_TO_SEE, f"workers in the place of {sorted(old)}")


def kill_launcher(soak: Soak) -> str:
    """Its ranks must not go on without it: they would hold the run directory against the next start. Those that do are killed."""
    assert soak.process is not None
    ranks = {pid: began for pid in (soak.pid_of(rank) for rank in range(soak.ranks)) if (began := runs(pid))}
    soak.signal(signal.SIGKILL)
    soak.process.wait()
    left = lambda: [pid for pid, began in ranks.items() if runs(pid) == began]  # noqa: E731
    try:
        soak.until(lambda: not left(), 60, f"the end of the ranks {sorted(ranks)} after their launcher's")
    finally:
        for pid in left():
            send(pid, signal.SIGKILL)
    return ""


def runs(pid: int) -> int:
    """When it began, in the kernel's ticks (a number may be given again to another process); 0 for one that has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(words[19]) if words[0] not in "ZX" else 0


def second_job(soak: Soak) -> str:
    """Another start in the same run directory: refused, and the first goes on."""
    log = soak.directory / "second.log"
    other = soak.start_run([*soak.arguments, f"run_dir={soak.run_dir}"], log)
    try:
        code = other.wait(SECONDS_TO_START)
    finally:
        if other.poll() is None:
            other.kill()
            other.wait()
    if code != 2 or "in use by another run" not in log.read_text():
        raise SoakError(f"a second job in the run directory: exit code {code}\n{log.read_text()[-2000:]}")
    with open(soak.log, "ab") as file:
        file.write(b"the other: in use by another run (exit code 2)\n")
    return "in use by another run"


KILLED = 128 + signal.SIGKILL
FOR_A_PERSON = (4, 11, 12)
"""Codes of these faults after which nothing starts the run again by itself; here this program stands for the person."""
FAULTS = (
    Fault("kill", "`kill -9` of a rank", kill_rank, (KILLED,)),
    Fault("stop", "`kill -STOP` of a rank", stop_rank, (12,), several_ranks=True),
    Fault("pause", "a rank stopped for 3 s", pause_rank),
    Fault("term", "SIGTERM", ask(signal.SIGTERM), (85,)),
    Fault("usr2", "SIGUSR2", ask(signal.SIGUSR2), (85,)),
    Fault("full", "files of a rank cannot grow", full_disk, (4, 11)),
    Fault("machine", "all killed, half a line written", lose_machine, (KILLED,)),
    Fault(
        "damage",
        "all killed, a byte of the newest checkpoint flipped",
        damage_checkpoint,
        (KILLED,),
        told=r"moved to step_\d+\.damaged",
    ),  # fmt: skip
    Fault("worker", "the grader's workers killed", kill_worker),
    Fault("launcher", "`kill -9` of the launcher", kill_launcher, (KILLED,), several_ranks=True),
    Fault("second", "a second job in the run directory", second_job),
)
