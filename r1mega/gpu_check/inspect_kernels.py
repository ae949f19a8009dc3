"""The CUDA kernels under NVIDIA's own tools: compute-sanitizer, which sees accesses and races, and ncu, which counts."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

from r1mega.gpu_check.findings import Context, Findings

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
CHECKS = ("memcheck", "racecheck", "synccheck", "initcheck")
METRICS = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "share of memory bandwidth, %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "share of compute, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
}


def sanitize(context: Context, findings: Findings) -> None:
    """compute-sanitizer over every kernel, once for each of its tools: an access out of bounds, a race in shared memory, a
    barrier that not all threads reach, a read of what was never written. Its tools see this project's kernels alone, which
    a read out of bounds made on purpose shows: filters that match nothing find nothing too.
    """
    for check in CHECKS:
        done = _sanitized(check)
        findings.holds(f"{check} finds nothing", done.returncode == 0, done.stdout[-1500:])
    done = _sanitized("memcheck", "--fault")
    seen = done.returncode != 0 and "Invalid __global__ read" in done.stdout
    findings.holds("memcheck finds the read out of bounds that is there", seen, done.stdout[-1500:])


def profile(context: Context, findings: Findings) -> None:
    """ncu's counters of each kernel at 8192 tokens and 129,280 columns. Counters may be locked: a note then, no failure."""
    filters = ["--kernel-name", "regex:log_prob|token_loss|group_adv", "--csv", "--metrics", ",".join(METRICS)]
    done = _run(["ncu", *filters, *_exercise(), "--large"])
    if "ERR_NVGPUCTRPERM" in done.stdout:
        findings.notes.append("ncu may not read the counters here (ERR_NVGPUCTRPERM): nothing was measured")
        return
    findings.holds("ncu ran", done.returncode == 0, done.stdout[-1500:])
    for name, value in counters(done.stdout).items():
        findings.figure(name, value)


def counters(text: str) -> dict[str, float]:
    """'kernel: metric' -> the largest value of its launches, in ncu's CSV, before which it says other things."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, float] = {}
    for row in csv.DictReader(lines[start:]):
        kernel, metric = _base_name(row["Kernel Name"]), row["Metric Name"]
        if metric in METRICS:
            name = f"{kernel}: {METRICS[metric]}"
            found[name] = max(float(row["Metric Value"].replace(",", "")), found.get(name, 0.0))
    return found


def _base_name(kernel: str) -> str:
    """log_prob_stats of 'void r1mega::device::log_prob_stats<r1mega::Bf16, (bool)1>(r1mega::device::RowSource, ...)'."""
    found = re.match(r"(?:void )?([\w:]+)", kernel)
    return found[1].split("::")[-1] if found else kernel


def _sanitized(check: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One tool over the exercise. Each tensor is an allocation of its own: beyond the end of a part of a cached block, or in
    what the cache hands out again, the tools see nothing wrong."""
    filters = ["--kernel-regex", "kns=r1mega", "--error-exitcode", "9"]
    command = ["compute-sanitizer", "--tool", check, *filters, *_exercise(), *arguments]
    return _run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def _exercise() -> list[str]:
    return [sys.executable, "-m", "bench.exercise"]


def _run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=KERNELS, env=os.environ | variables
    )
