"""What is installed and which of it works. A library that is there and does not import is broken, and says why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

from r1mega.gpu_check.findings import Context, Findings
from r1mega.gpu_check.runner import ROOT

UNCORRECTED = "ecc.errors.uncorrected.volatile.total"
"""Errors of memory that ECC could not mend, since the driver was loaded."""
PROBE_SECONDS = {"cuda": 200, "cpu": 600}
"""For one import. Together they may take as long as the step (steps.py)."""
LIBRARIES = {
    "torch": ("torch", "import torch; torch.ones(1) + 1"),
    "triton": ("triton", "import triton.language"),
    "megatron-core": (
        "megatron-core",
        "import r1mega.platform; r1mega.platform.prepare(); import megatron.core.models.gpt.gpt_layer_specs",
    ),
    "transformer-engine": (
        "transformer-engine",
        "from r1mega.platform import libraries; libraries.transformer_engine().check()",
    ),
    "apex": ("apex", "from r1mega.platform import libraries; libraries.apex().check()"),
    "vllm": (
        "vllm",
        "from r1mega.platform.generator import vllm_platform; p = vllm_platform(); p.prepare_environment(); "
        "from r1mega.platform.vllm_version import check_version; check_version(p.PACKAGE); "
        "import r1mega.rollout.vllm_engine, vllm.engine.arg_utils, vllm.v1.engine.llm_engine",
    ),
}
"""name: (distribution, what must run for it to work: what this project uses of it)."""
VERSIONS = (
    "numpy", "pydantic", "safetensors", "transformers", "tokenizers", "omegaconf", "datasets", "pytest", "hypothesis", "rich"
)  # fmt: skip
"""Told, not tried."""
PROBES = {
    "policy": "import r1mega.train.grpo_update, r1mega.checkpoint.store",
    "stages": "import r1mega.cli, r1mega.stages.rl, r1mega.stages.sft, r1mega.data.nano",
    "pytest": "import pytest, hypothesis, pytest_timeout",
}
"""What steps need beyond single libraries: ability -> what must run."""
WANTED_BY = {"policy": ("megatron-core", "transformer-engine", "policy"), "te": ("transformer-engine",)}
"""ability -> what is tried for it, where that is not the library or probe of its name."""


def describe(context: Context, findings: Findings) -> None:
    """Figures 'libraries', 'device', 'abilities' ({ability: '' or why not}). Tries what the steps of this run need."""
    statements = {name: statement for name, (_, statement) in LIBRARIES.items()} | PROBES
    wanted = {"torch"}
    for need in context.needs:
        wanted.update(WANTED_BY.get(need, (need,)))
    versions = {name: _version(distribution, name) for name, (distribution, _) in LIBRARIES.items()}
    to_try = [name for name in statements if name in wanted and versions.get(name, "a probe")]
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        limit = PROBE_SECONDS[context.device]
        tried = dict(zip(to_try, pool.map(lambda name: _try(statements[name], limit), to_try), strict=True))
    libraries = {}
    for name, version in versions.items():
        state = (
            "missing"
            if version is None
            else "not tried"
            if name not in tried
            else "broken"
            if tried[name]
            else "present"
        )
        libraries[name] = {"state": state, "version": version, "reason": tried.get(name, "")}
    findings.figures["python"] = platform.python_version()
    findings.figures["libraries"] = libraries
    findings.figures["versions"] = {name: version for name in VERSIONS if (version := _version(name, name))}
    findings.figures["compilers"] = {name: path and _first_line(path) for name, path in _compilers().items()}
    device = _device_facts(context.device) if not tried.get("torch", "missing") else {}
    findings.figures["device"] = device
    for index, each in enumerate(device.get("each", [])):
        errors = each.get(UNCORRECTED, "")
        none = not errors.isdigit() or int(errors) == 0
        findings.holds(f"device {index}: no uncorrected memory errors", none, errors)
    findings.figures["host"] = {"cores": len(os.sched_getaffinity(0)), "memory_gib": _host_gib()}
    abilities = _abilities(context.device, libraries, tried, device)
    findings.figures["abilities"] = abilities
    for name, entry in libraries.items():
        print(f"{name:<20}{entry['state']:<10}{entry['version'] or ''}  {entry['reason']}".rstrip())
    for name, value in device.items():
        print(f"{name:<20}{value}")
    findings.notes.append(_in_short(libraries, device))
    findings.holds(f"torch computes on {context.device}", not abilities["torch"], abilities["torch"])


def _in_short(libraries: dict[str, dict[str, Any]], device: dict[str, Any]) -> str:
    parts = [str(device.get("name", "no device"))]
    for name, entry in libraries.items():
        parts.append(
            f"{name} {' '.join(filter(None, [entry['version'], *[entry['state']] * (entry['state'] != 'present')]))}"
        )
    return ", ".join(parts)


def _abilities(
    device: str, libraries: dict[str, dict[str, Any]], tried: dict[str, str], facts: dict[str, Any]
) -> dict[str, str]:
    """{ability: '' where it is there, else why not}."""

    def library(name: str) -> str:
        entry = libraries[name]
        told = {"present": "", "missing": f"no {name}", "not tried": f"{name} was not tried"}
        return told.get(entry["state"], f"{name} is broken: {entry['reason']}")

    def probe(name: str) -> str:
        return tried.get(name, f"{name} was not tried")

    cuda = device == "cuda"
    no_gpu = "needs a GPU"
    devices = int(facts.get("devices", 0)) if cuda else 99  # CPU ranks share one
    torch = library("torch")
    if not torch and cuda and not devices:
        torch = "torch sees no CUDA device (--cpu runs the same steps on the CPU)"
    policy = torch or library("megatron-core") or probe("policy")
    return {
        "torch": torch,
        "gpu": "" if cuda and devices else no_gpu,
        "compiler": "; ".join(
            f"no {name}" for name, path in _compilers().items() if path is None and (cuda or name == "g++")
        ),
        "sanitizer": _tool("compute-sanitizer") if cuda else no_gpu,
        "ncu": _tool("ncu") if cuda else no_gpu,
        "policy": policy,
        "te": library("transformer-engine") if cuda else "Transformer Engine needs a GPU",
        "fp8": "" if facts.get("fp8") else "this device has no FP8",
        "vllm": library("vllm"),
        "stages": probe("stages"),
        "pytest": probe("pytest"),
        "2 devices": "" if devices >= 2 else f"needs 2 devices, {devices} here",
        "4 devices": "" if devices >= 4 else f"needs 4 devices, {devices} here",
    }


def _try(statement: str, limit: int) -> str:
    """'' when it runs in a fresh interpreter, else the last line of what it said."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", statement], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=limit, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"its import took more than {limit} s"
    if done.returncode == 0:
        return ""
    print(done.stdout[-3000:])
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit code {done.returncode}"


def _device_facts(device: str) -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"torch_cuda": torch.version.cuda, "devices": torch.cuda.device_count()}
    if device == "cpu":
        return facts | {"name": f"CPU ({_processor()})", "fp8": False}
    if not torch.cuda.is_available():
        return facts
    properties = torch.cuda.get_device_properties(0)
    facts |= {
        "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1), "multiprocessors": properties.multi_processor_count,
        "fp8": (properties.major, properties.minor) >= (8, 9), "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }  # fmt: skip
    devices = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(facts["devices"])]
    return facts | {"each": _from_nvidia_smi(devices)}


SMI_KEYS = (
    "name", "pci.bus_id", "driver_version", "clocks.max.sm", "clocks.max.memory", "clocks.sm", "temperature.gpu",
    "power.limit", "ecc.mode.current", UNCORRECTED, "mig.mode.current",
)  # fmt: skip


def _from_nvidia_smi(devices: list[str]) -> list[dict[str, str]]:
    """SMI_KEYS of each device, where it tells them. By UUID: nvidia-smi counts what CUDA_VISIBLE_DEVICES hides."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(SMI_KEYS)}", "--format=csv,noheader", f"--id={','.join(devices)}"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return [{"driver_version": f"unknown: nvidia-smi: {error}"}]
    rows = [[value.strip() for value in line.split(",")] for line in done.stdout.strip().splitlines()]
    if done.returncode or any(len(row) != len(SMI_KEYS) for row in rows):
        return [{"driver_version": f"unknown: nvidia-smi said {(done.stdout + done.stderr).strip()[:200]}"}]
    return [dict(zip(SMI_KEYS, row, strict=True)) for row in rows]


def _version(distribution: str, name: str) -> str | None:
    """Of the distribution, or of the CPU build of vLLM, which has another name."""
    for candidate in (distribution, f"{distribution}-cpu"):
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    module = name.replace("-", "_")
    return "unknown" if importlib.util.find_spec(module) is not None else None


def build_script() -> ModuleType:
    """kernels/build.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("r1mega_kernels_build", ROOT / "kernels" / "build.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT / 'kernels' / 'build.py'}: Python does not take it for a module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tool(name: str) -> str:
    """'' when it is on PATH."""
    return "" if shutil.which(name) else f"no {name} on PATH (it comes with the CUDA toolkit)"


def _compilers() -> dict[str, str | None]:
    """Where kernels/build.py finds them."""
    return {"nvcc": build_script().find_nvcc(), "g++": os.environ.get("CXX") or shutil.which("g++")}


def _first_line(path: str) -> str:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
    lines = [line for line in done.stdout.splitlines() if re.search(r"\d+\.\d+", line)]
    return lines[0].strip() if lines else path


def _host_gib() -> float:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
