"""Measures the kernels: `python tools/bench_kernels.py [--cpu | --gpu] [--peers] [--install DIR] [--quick] [--threads N] [--json FILE]`.

CPU: against torch's eager functions in the same run, with --peers against what peers compute and against those that are
installed (--install DIR makes a virtual environment with them), with memory and errors. GPU: against the device's measured copy
bandwidth and matmul rate, and against the peers that are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

import r1mega_kernels  # noqa: E402

PEERS = ("trl", "verl", "liger-kernel", "cut-cross-entropy", "triton")
NEEDED_BY_VERL = ("ray", "tensordict", "pyvers", "msgpack")  # to import it, and nothing else


def in_environment(directory: Path) -> None:
    """Run this again in a virtual environment that sees this one's packages and has the peers beside them; it is made where
    it is not there yet. One package that does not install is said, and left out.
    """
    python, tag = directory / "bin" / "python", f"python{sys.version_info.major}.{sys.version_info.minor}"
    seen = directory / "lib" / tag / "site-packages" / "this_environment.pth"
    if not seen.exists():  # written last: one that was interrupted is made again
        venv.create(directory, with_pip=True)
        for package in (*PEERS, *NEEDED_BY_VERL):  # not their dependencies: torch stays the one that is measured here
            done = subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", package])
            if done.returncode:
                print(f"# {package} does not install", file=sys.stderr)
        seen.write_text(sysconfig.get_path("purelib") + "\n")
    os.execv(python, [str(python), *sys.argv])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--cpu", action="store_true", help="default without a GPU")
    where.add_argument("--gpu", action="store_true")
    parser.add_argument("--peers", action="store_true", help="CPU: peers' formulas alone (on a GPU they always run)")
    parser.add_argument(
        "--install", type=Path, metavar="DIR", help="run in a virtual environment of peers, made there if need be"
    )
    parser.add_argument("--quick", action="store_true", help="smaller and fewer runs")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads (CPU): 1 counts CPU time, more wall-clock"
    )
    parser.add_argument("--json", type=Path, help="write the records here too")
    arguments = parser.parse_args()
    if arguments.install and arguments.install.resolve() != Path(sys.prefix).resolve():  # else this runs in it already
        in_environment(arguments.install)
    on_gpu = arguments.gpu or (torch.cuda.is_available() and not arguments.cpu)
    if on_gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no CUDA device here")
    if on_gpu:
        from bench.gpu import measure
    else:
        torch.set_num_threads(arguments.threads)
        if arguments.peers:
            os.environ.setdefault("TRITON_INTERPRET", "1")
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes for one function
            from bench.cpu_peers import measure
        else:
            from bench.cpu import measure
    kind = "cuda" if on_gpu else "cpu"
    print(f"# torch {torch.__version__}, {platform.machine()}, backend {r1mega_kernels.backend(kind)}", end="")
    print("" if on_gpu else f", {torch.get_num_threads()} thread(s)")
    records = measure(arguments.quick)
    for record in records:
        print("  ".join(f"{key}: {value}" if key != "case" else str(value) for key, value in record.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
