"""What can be proven on the GPU that is here: `python tools/gpu_check.py [--cpu] [--minutes N] [--packages DIR]`.

Kernels right, then fast against measured limits; training steps, checkpoints and offload against the CPU; vLLM's life
cycle; steps of RL; and where there are more GPUs, the same over several. Each step is a process of its own with a time
limit. A step that lacks something (a library, a second GPU) is skipped by name and proves nothing. Nothing is downloaded.
The exit code is 1 when a step failed. docs/gpu.md says what each step proves.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from r1mega.gpu_check.report import Record, print_table, summary  # noqa: E402
from r1mega.gpu_check.runner import Plan, run_all, run_step, unpack  # noqa: E402
from r1mega.gpu_check.steps import STEPS, select  # noqa: E402
from r1mega.observe.environment import git_commit  # noqa: E402

CPU_PATIENCE = 4.0
"""The steps' time limits are made for a GPU machine that does nothing else."""


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cpu", action="store_true", help="the same steps on the CPU, at small sizes")
    parser.add_argument("--minutes", type=float, help="steps that would not fit are listed as not run")
    parser.add_argument("--only", type=names, default=(), metavar="A,B", help="these steps and what they use")
    parser.add_argument("--skip", type=names, default=(), metavar="A,B", help="all but these steps")
    parser.add_argument("--packages", type=Path, action="append", default=[], metavar="DIR",
                        help="a folder of wheels or unpacked packages to import from, before what is installed")  # fmt: skip
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="default: %(default)s")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the steps' logs and files here")
    parser.add_argument("--list", action="store_true", help="the steps, and nothing else")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # 'module:function', in this process
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    return parser, parser.parse_args()


def main() -> int:
    """The command line."""
    parser, asked = arguments()
    if asked.step:  # what the runner starts
        return run_step(asked.step, asked.device, asked.work, asked.json)
    if asked.list:
        for step in STEPS:
            print(
                f"{step.name:<16}{step.seconds:>5} s  {step.proves}" + f" [{', '.join(step.needs)}]" * bool(step.needs)
            )
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # the step that runs ends with this process
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, lambda received, _frame: sys.exit(128 + received))
    try:
        plan, record = prepare(asked)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write: {error}; --json and --work (without it TMPDIR) say where to")
    try:
        run_all(plan, record.add)
        record.finished = True
    finally:  # also when it is ended from outside
        if asked.work is None:
            shutil.rmtree(plan.work, ignore_errors=True)
        print_table(record.results)
        print(f"{summary(record.results)}; {record.write():.0f} s; {record.path}", flush=True)
    return 1 if any(result.status == "failed" for result in record.results) else 0


def prepare(asked: argparse.Namespace) -> tuple[Plan, Record]:
    """What to run, and where the results go: written once now, not for the first time after an hour.

    Raises ValueError for a wrong argument, OSError for a place that cannot be written.
    """
    steps, begun = select(asked.only, asked.skip), time.monotonic()
    device: Literal["cuda", "cpu"] = "cpu" if asked.cpu else "cuda"
    record = Record(asked.json, {
        "command": sys.argv[1:], "device": device, "host": socket.gethostname(), "git_commit": git_commit(ROOT),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    })  # fmt: skip
    record.write()
    if asked.work is not None:
        asked.work.mkdir(parents=True, exist_ok=True)
        (asked.work / "context.json").touch()
    work = (asked.work or Path(tempfile.mkdtemp(prefix="gpu_check_"))).resolve()
    try:
        packages = unpack(asked.packages, work)
    except (ValueError, OSError):
        if asked.work is None:
            shutil.rmtree(work, ignore_errors=True)
        raise
    deadline = begun + 60 * asked.minutes if asked.minutes is not None else None
    return Plan(steps, device, work, packages, deadline, patience=CPU_PATIENCE if asked.cpu else 1.0), record


if __name__ == "__main__":
    sys.exit(main())
