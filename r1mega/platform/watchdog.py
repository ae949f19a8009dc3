"""Which rank stands still. Each rank writes where it is, by a thread of its own that needs neither the main thread nor a
collective; when a rank gives no sign, or no rank gets on, the one behind is named, all write their stacks, and the job ends.

RUN_DIR/watch/rank_N.json   where rank N is, written over every few seconds
RUN_DIR/watch/verdict.json  why the watchdog ended this start
RUN_DIR/watch/stacks/       rank_N.txt: what each rank was doing then

Files and not torch's store: rank 0 may be the one that stands still, and what is written outlives the ranks. The lowest rank that
lives reads all of them; the others look for its verdict. No clock of one machine is compared with another's: a watcher counts
from when it saw a file change.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from r1mega.config.schema import TimeoutsConfig, WatchdogConfig
from r1mega.errors import EXIT_STALLED
from r1mega.files import write_atomic
from r1mega.platform.stacks import dump_collectives, native_stacks

FLOOR_SECONDS, UNSEEN_SECONDS, TIMES_LONGEST = 600.0, 3600.0, 10
"""A phase may stand still for TIMES_LONGEST the longest pause that it had, at least FLOOR_SECONDS; UNSEEN_SECONDS until it was
passed once, and where whole files are read and written (UNTIMED). Never less than what `timeouts` allows there."""
UNTIMED = ("start", "save", "export", "end")
OUTSIDE = (*UNTIMED, "between")
"""Phases in which long work of the main thread alone (a filter, a hash) counts as getting on."""
BUSY_SHARE = 0.05
"""Of a processor, for work: less is waiting. A thread that spins in one call of C, for a device say, takes more but moves nowhere."""
TIMES_SILENT = 5
"""How much longer than `silent_seconds` a rank may be silent whose process runs, or that starts on another machine."""
SECONDS_TO_DUMP = 20.0
SHOWN = 8
"""Ranks that a verdict names at most."""
LAUNCHER_VARIABLE = "R1MEGA_LAUNCHER"
"""Environment variable: the process that starts the ranks here and wants SIGUSR1 when the watchdog ends them."""

_NOT_RUNNING = _STOPPED, _DEAD, _GONE = "stopped, by SIGSTOP or a debugger", "process dead", "process gone"
_WAITING = ("/torch/distributed/", "/pipeline_parallel/p2p_communication.py")
_logger = logging.getLogger(__name__)
_ticks: Counter[str] = Counter()


def tick(what: str) -> None:
    """Say that this rank gets on: a microbatch, a step of the generator."""
    _ticks[what] += 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is in its run. part: outermost phases entered in this step; turns: phases entered and left so far."""

    step: int
    part: int
    phase: str
    turns: int


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself. ticks: see `tick`, since its start; collectives: torch's sequence number of the world's group, and
    all groups' together; busy: beats that found its main thread computing outside of a step's phases; at: its innermost line of
    r1mega; waits: it is inside of a collective; number: of the beat; ended: it left in order.
    """

    rank: int
    host: str
    pid: int
    place: Place
    ticks: dict[str, int]
    collectives: int
    all_collectives: int
    busy: int
    at: str
    waits: bool
    number: int
    ended: bool = False

    def progress(self) -> tuple[object, ...]:
        """Something of it changes when the rank gets on."""
        return self.place, sorted(self.ticks.items()), self.all_collectives, self.busy

    def where(self) -> str:
        counts = [f"{what} {count}" for what, count in [*self.ticks.items(), ("collective", self.collectives)]]
        return f"step {self.place.step}, {self.place.phase}, {', '.join(counts)}, at {self.at}"


def behind(beats: Mapping[int, Beat]) -> list[int]:
    """The ranks for which the others wait: earliest in the run, not inside of a collective where others are, and of those the
    ones with the fewest microbatches and collectives. All of them when nothing tells them apart.
    """
    left = list(beats)
    keys: tuple[Callable[[Beat], tuple[int, int]], ...] = (
        lambda beat: (beat.place.step, beat.place.part),
        lambda beat: (beat.waits, 0),
        lambda beat: (beat.ticks.get("microbatch", 0), beat.collectives),
    )
    for key in keys:
        least = min(key(beats[rank]) for rank in left)
        left = [rank for rank in left if key(beats[rank]) == least]
    return left


@dataclass(slots=True)
class _Seen:
    """What a watcher knows of a rank, and when (its own clock) it last saw a sign of it, and it getting on."""

    beat: Beat | None
    sign: float
    progress: float


class Watchdog:
    """A context manager, on every rank: beats and watches while it is open. directory: RUN_DIR/watch, made before.

    on_verdict: called by the one rank that finds it, with the text, before the job ends with EXIT_STALLED.
    """

    def __init__(
        self,
        directory: Path,
        config: WatchdogConfig,
        place: Callable[[], Place],
        *,
        rank: int,
        world: int,
        timeouts: TimeoutsConfig | None = None,
        on_verdict: Callable[[str], None] = lambda text: None,
    ):
        self._directory, self._config, self._place, self._on_verdict = directory, config, place, on_verdict
        self._rank, self._world, self._timeouts = rank, world, timeouts or TimeoutsConfig()
        self._interval = max(min(5.0, config.silent_seconds / 6), world / 100)  # at most a hundred files a second
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._main_clock = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
        self._number, self._busy, self._trouble = 0, 0, ""
        self._cpu_seconds = self._looked = 0.0
        self._spot: tuple[int, int] | None = None
        self._seen: dict[int, _Seen] = {}
        self._pauses: dict[str, float] = {}
        self._passed: set[str] = set()
        self._last: tuple[float, str] | None = None  # when any rank got on, and the phase of the one behind then

    def __enter__(self) -> Watchdog:
        if self._config.enabled:
            self._beat()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._config.enabled:
            self._stop.set()
            self._thread.join(timeout=2 * self._interval)
            with contextlib.suppress(OSError):
                self._beat(ended=True)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._beat()
                self._look()
                self._trouble = ""
            except Exception as error:  # what cannot be written or read now says nothing of the ranks; told once
                if str(error) != self._trouble:
                    _logger.warning("watchdog: no sign of rank %d while this lasts: %s", self._rank, error)
                self._trouble = str(error)
                self._seen.clear()

    # ------------------------------------------------------------------ this rank's own sign

    def _beat(self, *, ended: bool = False) -> None:
        place = self._place()
        at, waits, spot = _main_thread()
        cpu_seconds = time.clock_gettime(self._main_clock)
        computes = cpu_seconds - self._cpu_seconds > BUSY_SHARE * self._interval
        if place.phase in OUTSIDE and computes and spot != self._spot and not waits:
            self._busy += 1
        self._cpu_seconds, self._spot = cpu_seconds, spot
        self._number += 1
        collectives, all_collectives = _sequence_numbers()
        beat = Beat(
            self._rank, socket.gethostname(), os.getpid(), place, dict(_ticks), collectives, all_collectives, self._busy, at,
            waits, self._number, ended,
        )  # fmt: skip
        text = json.dumps(asdict(beat)).encode().ljust(1024)  # one size: written over in place, also on a full disk
        descriptor = os.open(_beat_file(self._directory, self._rank), os.O_WRONLY | os.O_CREAT, 0o666)
        try:  # opened anew each time: so NFS shows it to others
            os.pwrite(descriptor, text, 0)
        finally:
            os.close(descriptor)

    # ------------------------------------------------------------------ the others

    def _look(self) -> None:
        now = time.monotonic()
        late, self._looked = now - self._looked > 3 * self._interval + 5, now
        if late:  # this process was stopped itself, or has just begun: it has seen nothing
            self._seen.clear()
            self._last = None
        try:
            self._read(now)
        finally:  # many files on a slow disk take their time: that is not lateness, unless nothing came for as long as a silence
            if (after := time.monotonic()) - now <= self._config.silent_seconds:
                self._looked = after

    def _read(self, now: float) -> None:
        verdict = self._directory / "verdict.json"
        if verdict.exists():
            self._end(json.loads(verdict.read_text()))
            return
        for rank in range(self._rank):
            seen = self._observe(rank, now)
            if not (seen.beat and seen.beat.ended) and now - seen.sign <= self._config.silent_seconds:
                return  # that one, or one below it, reads for all
        for rank in range(self._rank, self._world):
            self._observe(rank, now)
        if (text := self._judge(now)) is not None:
            alive = [rank for rank, seen in self._seen.items() if now - seen.sign <= self._config.silent_seconds]
            found: dict[str, str | int] = {"text": text, "dumps": len(alive), "found_by": self._rank}
            if self._stop.is_set():
                return
            with contextlib.suppress(OSError):  # a full disk: without the file the others find out by themselves
                write_atomic(verdict, json.dumps(found, indent=2) + "\n")
            try:
                self._on_verdict(text)
            except Exception as error:
                _logger.warning("watchdog: %s", error)
            self._end(found)

    def _observe(self, rank: int, now: float) -> _Seen:
        seen = self._seen.setdefault(rank, _Seen(None, now, now))
        beat = _read_beat(self._directory, rank)
        if beat is not None and (seen.beat is None or beat.number != seen.beat.number):
            seen.sign = now
            if seen.beat is None or beat.progress() != seen.beat.progress():
                seen.progress = now
            seen.beat = beat
        return seen

    def _judge(self, now: float) -> str | None:
        """Why the job must end, or None. Learns how long phases pause."""
        open_ranks = {rank: seen for rank, seen in self._seen.items() if not (seen.beat and seen.beat.ended)}
        silent = {rank: seen for rank, seen in open_ranks.items() if now - seen.sign > self._allowed_silence(seen)}
        if silent:
            first = list(silent.items())[:SHOWN]
            named = "; ".join(self._silent_text(rank, now - seen.sign, seen.beat) for rank, seen in first)
            return f"{named}{_more(list(silent))}"
        beats = {rank: seen.beat for rank, seen in open_ranks.items() if seen.beat is not None}
        if not beats:
            return None
        last = max(seen.progress for seen in open_ranks.values())
        slowest = behind(beats)
        phase = beats[slowest[0]].place.phase
        if self._last is not None and last > self._last[0]:
            earlier, in_phase = self._last
            self._pauses[in_phase] = max(self._pauses.get(in_phase, 0.0), last - earlier)
            if phase != in_phase:
                self._passed.add(in_phase)
        if self._last is None or last > self._last[0]:
            self._last = last, phase
        limit = self._config.seconds or self._limit(phase)
        if now - last <= limit:
            return None
        named = "; ".join(f"{_name(rank, beats[rank])} at {beats[rank].where()}" for rank in slowest[:SHOWN])
        ended = sorted(self._seen.keys() - open_ranks)
        before = f"rank {', '.join(map(str, ended[:SHOWN]))} ended before; " if ended else ""
        return (
            f"no rank got on for {now - last:.0f} s ({phase} may pause for {limit:.0f}); {before}behind is {named}"
            f"{_more(slowest)}; if that is only slow, raise watchdog.seconds"
        )

    def _limit(self, phase: str) -> float:
        timeouts = self._timeouts
        if phase in UNTIMED:
            allowed = timeouts.startup_seconds if phase in ("start", "end") else timeouts.checkpoint_seconds
            return max(UNSEEN_SECONDS, allowed)
        floor = max(FLOOR_SECONDS, timeouts.collective_seconds)
        if phase not in self._passed:
            return max(UNSEEN_SECONDS, floor)
        return max(floor, TIMES_LONGEST * self._pauses.get(phase, 0.0))

    def _allowed_silence(self, seen: _Seen) -> float:
        """Longer for a process that runs: a call of C that keeps Python's lock (a library that loads) silences its other threads."""
        seconds, beat = self._config.silent_seconds, seen.beat
        if beat is not None and beat.host == socket.gethostname():
            runs = _state(beat.pid) not in _NOT_RUNNING
        else:
            runs = beat is None or beat.place.phase == "start"
        return TIMES_SILENT * seconds if runs else seconds

    def _silent_text(self, rank: int, seconds: float, beat: Beat | None) -> str:
        if beat is None:
            return f"rank {rank} has given no sign since it started"
        state = _state(beat.pid) if beat.host == socket.gethostname() else f"see its machine {beat.host}"
        return f"{_name(rank, beat)} has given no sign for {seconds:.0f} s ({state}); it was at {beat.where()}"

    # ------------------------------------------------------------------ the end

    def _end(self, verdict: Mapping[str, str | int]) -> None:
        """Write what this rank does, wait until the others have too, and end this process whatever its main thread does. Not where
        the main thread has left meanwhile.
        """
        if self._stop.is_set():
            return
        stacks = self._directory / "stacks"
        try:
            with contextlib.suppress(OSError):
                text = f"watchdog, rank {self._rank}: {verdict['text']}; stacks of all ranks: {stacks}"
                print(text, file=sys.stderr, flush=True)
            try:
                self._write_stacks(stacks, int(verdict["dumps"]))
            except Exception as error:
                _logger.warning("watchdog: no stacks: %s", error)
            if (launcher := os.environ.get(LAUNCHER_VARIABLE)) == str(os.getppid()):  # not another job's, machine's
                os.kill(int(launcher), signal.SIGUSR1)
        finally:
            os._exit(EXIT_STALLED)

    def _write_stacks(self, stacks: Path, dumps: int) -> None:
        limit = time.monotonic() + SECONDS_TO_DUMP
        stacks.mkdir(exist_ok=True)
        own = stacks / f"rank_{self._rank}.txt"
        with open(own.with_suffix(".tmp"), "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.write(native_stacks(os.getpid()))
        own.with_suffix(".tmp").rename(own)
        dump_collectives(self._directory / f"nccl_trace_rank_{self._rank}")
        while len(list(stacks.glob("*.txt"))) < dumps and time.monotonic() < limit:
            time.sleep(0.2)  # the first rank to end has the launcher kill the others


def prepare_directory(directory: Path) -> None:
    """RUN_DIR/watch for a new start; what the watchdog wrote of an earlier one moves to `earlier`. On one rank."""
    directory.mkdir(exist_ok=True)
    if (directory / "verdict.json").exists():
        shutil.rmtree(directory / "earlier", ignore_errors=True)
        (directory / "earlier").mkdir()
        for path in [path for path in directory.iterdir() if path.name != "earlier"]:
            path.rename(directory / "earlier" / path.name)
    for path in directory.glob("rank_*.json"):
        path.unlink()


def _sequence_numbers() -> tuple[int, int]:
    """(the world's, all groups' together), where torch knows them."""
    numbers = []
    if dist.is_initialized():
        for group in [dist.group.WORLD, *dist.distributed_c10d._world.pg_map.copy()]:
            try:
                numbers.append(group._get_sequence_number_for_group())  # type: ignore[union-attr]  # not in torch's stubs
            except (RuntimeError, AttributeError):  # a backend without; a group that is being taken down
                numbers.append(0)
    return (numbers[0], sum(numbers[1:])) if numbers else (0, 0)


def _main_thread() -> tuple[str, bool, tuple[int, int] | None]:
    """(its innermost line of r1mega, whether it is inside of a collective, which instruction of which call it is at)."""
    frame = innermost = sys._current_frames().get(threading.main_thread().ident or 0)
    while innermost is not None and innermost.f_code.co_filename == __file__:  # it beats itself, as it begins and ends
        frame = innermost = innermost.f_back
    if innermost is None:
        return "nowhere", False, None
    while frame is not None and "/r1mega/" not in frame.f_code.co_filename:
        frame = frame.f_back
    shown = frame or innermost
    file = shown.f_code.co_filename.rpartition("/r1mega/")
    waits = any(part in innermost.f_code.co_filename for part in _WAITING)
    line = f"{(file[1] + file[2]).lstrip('/')}:{shown.f_lineno} {shown.f_code.co_name}"[:200]
    return line, waits, (id(innermost), innermost.f_lasti)


def _beat_file(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank}.json"


def _read_beat(directory: Path, rank: int) -> Beat | None:
    """None: not there, not to be read now, or being written."""
    try:
        values = json.loads(_beat_file(directory, rank).read_bytes())
    except (OSError, ValueError):
        return None
    return Beat(**{**values, "place": Place(**values["place"])})


def _state(pid: int) -> str:
    """Of a process of this machine, by the kernel."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return _GONE
    known = {"T": _STOPPED, "t": _STOPPED, "D": "waiting for a disk or device", "Z": _DEAD, "R": "running"}
    return known.get(letter, f"its process is in state {letter}")


def _name(rank: int, beat: Beat) -> str:
    return f"rank {rank} (pid {beat.pid} on {beat.host})"


def _more(ranks: Sequence[int]) -> str:
    return f"; and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
