"""A run of nano zero that is hurt again and again, beside one that is left alone: what each fault costs, and that nothing is lost.

    python tools/soak.py --minutes 60 --dir /tmp/soak      # a fault about every minute, drawn by --seed
    python tools/soak.py --minutes 60 --faults kill,pause  # some of them; --list names all

Two ranks by `r1mega train --ranks 2`, which starts again by itself where it may; where it ends, this program starts it again, as
Slurm would after 85 and a lost machine, and a person after the exit codes 4, 11 and 12. Then the run is brought to an end, and the same
steps are run without a fault: metrics, samples and exported weights have to be equal, bit for bit. Prints a table, fault -> seen by ->
after -> lost; exit code 1 for a fault that was not seen or did nothing, without any fault or one of --faults, and for any difference.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # where it is not the program itself: a worker of the rewards, a test

from soak_faults import FAULTS, HEAD, SECONDS_TO_START, Fault, Soak, SoakError, metrics  # noqa: E402

UNTIMED = re.compile(r"time/|memory/|reward_pool/|straggler/|perf/|tokens/\w+_per_second")
"""Metrics that differ between two runs of the same steps."""
NEVER = 10**6
"""Steps of a run that is stopped before."""


class Length:
    """A part of the reward whose work is a worker process's, so that there is one to kill (`reward.custom`)."""

    def score(self, item):  # of r1mega.reward.parts, not imported: a worker of the pool loads this file
        from r1mega.reward.parts import Deferred, PartScore
        from r1mega.reward.pool import Task
        from r1mega.types import RewardStatus

        def finish(outcome):
            if outcome.failure is not None:
                return PartScore(None, outcome.failure, RewardStatus.FAILED)
            return PartScore(outcome.value, f"{outcome.value:.2f}")

        return Deferred(Task("tools.soak:shortness", (item.text,), 20.0), finish)


def shortness(text: str) -> float:
    """1 for an empty text, less for each character; takes a moment."""
    time.sleep(0.01)
    return 1 / (1 + len(text) / 20)


def draw(names: Sequence[str], ranks: int, chance: random.Random) -> Iterator[Fault]:
    """All in random order, then all in another. SoakError where none can be inflicted on so many ranks."""
    able = [fault for fault in FAULTS if (not names or fault.name in names) and (ranks > 1 or not fault.several_ranks)]
    if not able:
        raise SoakError(
            f"none of the faults {', '.join(names)} can be inflicted on {ranks} rank; give more --ranks or --faults"
        )
    return itertools.chain.from_iterable(chance.sample(able, len(able)) for _ in itertools.count())


# ---------------------------------------------------------------------- the whole


def soak(soaked: Soak, faults: Iterator[Fault], every: float, go_on: Callable[[], bool]) -> int:
    """Hurt it while `go_on()`; the step at which it was finished in the end."""
    print(HEAD, flush=True)
    try:
        soaked.start()
        soaked.goes_on(3, "the first steps")  # a checkpoint, and one before it
        for fault in faults:
            if not go_on():
                break
            wait, now = soaked.random.uniform(0, 2 * every), soaked.step()
            time.sleep(wait)
            soaked.goes_on(now + 3, "steps between faults")
            soaked.suffer(fault)
        if not soaked.outcomes:
            raise SoakError("the time was over before the first fault; give more --minutes or less --every")
        soaked.signal(signal.SIGTERM)
        soaked.until(soaked.ended, SECONDS_TO_START, "the end after SIGTERM")
        last = soaked.step() + 1
        soaked.start(f"steps={last}")
        soaked.until(soaked.ended, SECONDS_TO_START, "the last step and the export")
    finally:
        soaked.kill()
    return last


def differences(soaked: Path, control: Path) -> list[str]:
    """What of the two run directories is not equal, among what a run makes of its data."""
    ours, theirs = (
        [{name: value for name, value in line.items() if not UNTIMED.match(name)} for line in metrics(run)]
        for run in (soaked, control)
    )
    found = [f"{len(ours)} steps, not {len(theirs)}"] if len(ours) != len(theirs) else []
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    if (equal := len(list(pairs))) < min(len(ours), len(theirs)):
        names = [name for name in ours[equal] if ours[equal][name] != theirs[equal].get(name)]
        found.append(f"metrics of step {ours[equal]['step']}: {', '.join(names)}")
    for name in ("samples.jsonl", "hf/model.safetensors"):
        if (soaked / name).read_bytes() != (control / name).read_bytes():
            found.append(name)
    return found


def run_arguments(base: Path, ranks: int, *more: str) -> list[str]:
    """Of a small zero run on that base, steps of half a second, a checkpoint every second step."""
    return [
        "train", *(["--ranks", str(ranks)] if ranks > 1 else []), "configs/nano/zero.yaml", f"model.path={base}/hf",
        f"data.prompts=[{base}/data/train.jsonl]", "evaluate.data=null", "threads=1", f"steps={NEVER}", "rollout.num_prompts=4",
        "rollout.group_size=4", "rollout.max_response_tokens=24", "checkpoint.every_steps=2", "observe.tensorboard=false",
        "algorithm.reference_refresh_steps=3", "optimizer.schedule=constant", "watchdog.silent_seconds=15", "restart.backoff_seconds=1", "reward.pool.num_workers=1",
        "reward.custom.shortness={part: 'tools.soak:Length', weight: 0.1}", *more,
    ]  # fmt: skip


def start_command(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH")]))
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "r1mega", *arguments], cwd=REPOSITORY, env=variables, stdout=output, stderr=output,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip


def make_base(base: Path, log: Path) -> int:
    """Train a small one; its exit code."""
    arguments = [
        "train",
        "configs/nano/base.yaml",
        f"run_dir={base}",
        "steps=60",
        "threads=1",
        "optimizer.decay_steps=20",
    ]
    made = start_command(arguments, log)
    try:
        return made.wait()
    finally:
        if made.poll() is None:
            made.kill()
            made.wait()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=20, help="seconds of quiet between faults, on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--faults", default="", help="names with commas; all without it")
    parser.add_argument("--dir", type=Path, default=Path("runs/soak"))
    parser.add_argument("--base", type=Path, help="run directory of a nano base; made without it")
    parser.add_argument("--list", action="store_true", help="name the faults")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    if arguments.list:
        print("\n".join(f"{fault.name:10} {fault.text}" for fault in FAULTS))
        return 0
    names = [name for name in arguments.faults.split(",") if name]
    if unknown := set(names) - {fault.name for fault in FAULTS}:
        sys.exit(f"--faults: {', '.join(sorted(unknown))}: not known; --list names all")
    directory = arguments.dir.absolute()
    if (directory / "run").exists():
        sys.exit(f"--dir {directory}: holds a soak already; remove it or choose another")
    directory.mkdir(parents=True, exist_ok=True)
    base = (arguments.base or directory / "base").absolute()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started ends too
    if not (base / "hf").exists() and make_base(base, directory / "base.log") != 0:
        sys.exit(f"the base could not be made, see {directory}/base.log")
    chance = random.Random(arguments.seed)
    soaked = Soak(directory, run_arguments(base, arguments.ranks), start_command, chance, arguments.ranks)
    limit = time.monotonic() + 60 * arguments.minutes
    try:
        faults = draw(names, arguments.ranks, chance)
        last = soak(soaked, faults, arguments.every, lambda: time.monotonic() < limit)
    except SoakError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    equal = compare(soaked, last)
    if missing := set(names) - {outcome.fault.name for outcome in soaked.outcomes}:
        print(
            f"soak: asked for and not inflicted: {', '.join(sorted(missing))}; give more --minutes or --ranks",
            file=sys.stderr,
        )
    return 0 if equal and not missing else 1


def compare(soaked: Soak, last: int) -> bool:
    """Run the same steps without a fault, say what differs; whether nothing does."""
    control = Soak(soaked.directory / "control", soaked.arguments, soaked.start_run, soaked.random, soaked.ranks)
    control.directory.mkdir(exist_ok=True)
    try:
        control.start(f"steps={last}")
        assert control.process is not None
        control.process.wait()
    finally:
        control.kill()
    found = differences(soaked.run_dir, control.run_dir)
    lost = sum(outcome.lost for outcome in soaked.outcomes)
    print(f"\n{len(soaked.outcomes)} faults, {last} steps, {lost} of them done anew; ", end="")
    print(
        "equal to the run without a fault" if not found else f"differs from the run without a fault: {'; '.join(found)}"
    )
    return not found


if __name__ == "__main__":
    sys.exit(main())
