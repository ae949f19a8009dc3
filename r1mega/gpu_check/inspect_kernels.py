"""The CUDA kernels under NVIDIA's own tools: compute-sanitizer, which sees accesses and races, and ncu, which counts."""

from __future__ import annotations

import csv
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
    barrier that not all threads reach, a read of what was never written. Its tools see this project's kernels alone."""
    for check in CHECKS:
        filters = ["--kernel-regex", "kns=r1mega", "--error-exitcode", "9"]
        done = _run(["compute-sanitizer", "--tool", check, *filters, *_exercise()])
        findings.holds(f"{check} finds nothing", done.returncode == 0, done.stdout[-1500:])


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
        kernel, metric = row["Kernel Name"].split("(")[0].split("::")[-1], row["Metric Name"]
        if metric in METRICS:
            name = f"{kernel}: {METRICS[metric]}"
            found[name] = max(float(row["Metric Value"].replace(",", "")), found.get(name, 0.0))
    return found


def _exercise() -> list[str]:
    return [sys.executable, "-m", "bench.exercise"]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=KERNELS)
