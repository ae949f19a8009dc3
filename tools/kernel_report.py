"""Compiles the CUDA kernels for every target and prints what ptxas made of them, as JSON: no GPU is needed.

    python tools/kernel_report.py [--targets 80 90a 100] [--check]

For each kernel and target: registers a thread, spilled bytes, stack and static shared memory, and how many blocks of
its size an SM holds by registers (65536 a SM); where there is a cuobjdump with its nvdisasm (of the toolkit, of triton's wheel or
of nvidia-cuda-cuobjdump's and nvidia-cuda-nvdisasm's), of the statistics of log-probs the instructions of a loop, which reads
four 16-byte packs a thread.
--check: exit status 1 if a kernel is over its budget, or a loop that has one was not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))

import build  # noqa: E402  (kernels/build.py needs nothing installed)

# Registers a thread. 64 keeps 4 blocks of 256 threads (half of an SM's threads) resident, what the loads in flight of a
# bandwidth-bound kernel need; the advantages run as one block, where only spills would matter.
BUDGETS = {
    "kept_log_prob_stats": 64,  # before what its name ends in: symbols are looked up in this order
    "kept_log_prob_backward": 64,
    "log_prob_stats": 64,
    "log_prob_merge": 64,
    "log_prob_backward": 64,
    "token_loss": 64,
    "group_advantages": 128,
}
# Machine instructions of the loop on sm_90a, by element and whether the entropy's terms are in it, of aligned rows: 32
# bf16 or 16 fp32.
LOOP_BUDGETS: dict[tuple[object, object], int] = {
    ("bf16", True): 220,
    ("bf16", False): 170,
    ("fp32", True): 130,
    ("fp32", False): 90,
}
THREADS = {"group_advantages": 512}
REGISTERS_PER_SM = 65536
THREADS_PER_SM = 2048


def compile_report(targets: tuple[str, ...] = build.CUDA_TARGETS) -> dict[str, Any]:
    """{"nvcc": version, "cuobjdump": its path or None, "kernels": [one record for each compiled variant and target]}.

    Raises:
        RuntimeError: there is no nvcc, or it failed.
    """
    nvcc = build.find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc: set CUDA_HOME or put it on PATH")
    version = re.search(r"release ([\d.]+)", build.run([nvcc, "--version"]))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(lambda target: _ptxas_log(nvcc, target, scratch), targets))
        records = [record for target, log in zip(targets, logs, strict=True) for record in parse(log, f"sm_{target}")]
        dumped = [_loops(f"{scratch}/{target}.cubin") for target in targets]
    for record in records:
        loops = dumped[targets.index(record["target"][3:])]
        record["loop_instructions"] = loops.get(record.pop("symbol"))
    return {"nvcc": version[1] if version else "unknown", "cuobjdump": find_cuobjdump(), "kernels": records}


def find_cuobjdump() -> str | None:
    """cuobjdump beside nvcc, on PATH, or in the wheels of triton or nvidia-cuda-cuobjdump; one that finds its nvdisasm beside it
    or on PATH, without which it disassembles nothing."""
    nvcc, triton, nvidia = build.find_nvcc(), importlib.util.find_spec("triton"), importlib.util.find_spec("nvidia")
    wheels = [Path(folder) for folder in nvidia.submodule_search_locations or ()] if nvidia else []
    candidates = [
        Path(nvcc).parent / "cuobjdump" if nvcc else None,
        shutil.which("cuobjdump"),
        Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None,
        *(path for folder in wheels for path in sorted(folder.glob("cu*/bin/cuobjdump"))),
    ]
    for path in [Path(candidate) for candidate in candidates if candidate]:
        if os.access(path, os.X_OK) and (os.access(path.parent / "nvdisasm", os.X_OK) or shutil.which("nvdisasm")):
            return str(path)
    return None


def _loops(cubin: str) -> dict[str, int]:
    tool = find_cuobjdump()
    return {} if tool is None else loop_instructions(build.run([tool, "-sass", cubin]))


def loop_instructions(sass: str) -> dict[str, int]:
    """Symbol -> instructions of the shortest loop that computes powers of two, in a `cuobjdump -sass` listing."""
    found: dict[str, int] = {}
    for part in sass.split("Function : ")[1:]:
        code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", part)]
        for end, text in code:
            jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            body = [i for at, i in code if jump and int(jump[1], 16) <= at <= end]
            if any("MUFU.EX2" in i for i in body):
                found[part.split()[0]] = min(len(body), found.get(part.split()[0], len(body)))
    return found


def _ptxas_log(nvcc: str, target: str, scratch: str) -> str:
    source = build.ROOT / "csrc" / "cuda" / "cuda_ops.cu"
    return build.run(
        [nvcc, "-std=c++17", "-O3", f"-I{build.ROOT / 'include'}", f"-gencode=arch=compute_{target},code=sm_{target}",
         "-Xptxas=-v", "-cubin", str(source), "-o", f"{scratch}/{target}.cubin"]
    )  # fmt: skip


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas says nothing like {pattern!r}: its log has another form")
    return int(found[1])


def parse(log: str, target: str) -> list[dict[str, Any]]:
    """The records of one `ptxas -v` log."""
    records = []
    for part in log.split("Compiling entry function '")[1:]:
        symbol = part.split("'")[0]
        name = next((kernel for kernel in BUDGETS if kernel in symbol), None)
        if name is None:
            raise RuntimeError(f"kernel {symbol} has no budget: add it to BUDGETS in tools/kernel_report.py")
        registers = _number(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        stack, stores, loads = (
            _number(rf"(\d+) bytes {what}", part) for what in ("stack frame", "spill stores", "spill loads")
        )
        threads = THREADS.get(name, 256)
        types, flags, width = _template_arguments(name, symbol)
        per_block = -(-registers // 8) * 8 * threads
        records.append(
            {
                "kernel": name,
                "symbol": symbol,
                "element": types[0] if types else None,
                "gradient": types[1] if len(types) > 1 else None,
                "aligned": flags.pop(0) if flags and name != "kept_log_prob_stats" else None,
                "entropy": flags.pop(0) if flags else None,
                "row_threads": width,
                "target": target,
                "registers": registers,
                "register_budget": BUDGETS[name],
                "spill_bytes": stores + loads,
                "stack_bytes": stack,
                "shared_bytes": int(shared[1]) if shared else 0,
                "threads": threads,
                "blocks_per_sm": min(REGISTERS_PER_SM // per_block, THREADS_PER_SM // threads),
            }
        )
    return records


def _template_arguments(name: str, symbol: str) -> tuple[list[str], list[bool], int | None]:
    """Of a kernel's mangled name: types of elements, flags and the number, in their orders."""
    found = re.search(rf"{name}I(.+?)EEv", symbol)
    listed = found[1] if found else ""
    types = [
        "fp32" if one == "f" else "fp16" if "Half" in one else "bf16" for one in re.findall("4Bf16|4Half|S2_|f", listed)
    ]
    width = re.search(r"Li(\d+)E", listed)
    return types, [flag == "1" for flag in re.findall("Lb([01])E", listed)], int(width[1]) if width else None


def loop_budget(record: dict[str, object]) -> int | None:
    """Of the variant that large vocabularies meet: rows aligned, a block each."""
    if (
        record["kernel"] != "log_prob_stats"
        or record["target"] != "sm_90a"
        or not record["aligned"]
        or record["row_threads"] == 32
    ):
        return None
    return LOOP_BUDGETS[record["element"], record["entropy"]]


def violations(report: dict[str, Any]) -> list[str]:
    """What is over budget: spills, stack frames, registers, instructions of a loop (None: it was not found)."""
    long = [
        f"{r['kernel']} ({r['element']}, {'with' if r['entropy'] else 'without'} entropy): {r['loop_instructions']} of {budget} "
        "instructions a loop"
        for r in report["kernels"]
        if (budget := loop_budget(r)) and not 0 < (r["loop_instructions"] or 0) <= budget
    ]
    return long + [
        f"{r['kernel']} ({r['element']}) on {r['target']}: {r['registers']} of {r['register_budget']} registers, "
        f"{r['spill_bytes']} bytes spilled, {r['stack_bytes']} bytes of stack"
        for r in report["kernels"]
        if r["spill_bytes"] or r["stack_bytes"] or r["registers"] > r["register_budget"]
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(build.CUDA_TARGETS))
    parser.add_argument("--check", action="store_true", help="exit with 1 if a kernel is over its budget")
    arguments = parser.parse_args()
    report = compile_report(tuple(arguments.targets))
    print(json.dumps(report, indent=1))
    over = violations(report)
    if report["cuobjdump"] is None:
        over.append(
            "loops were not counted: no cuobjdump with an nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, "
            "or the toolkit's on PATH)"
        )
    for line in over:
        print(line, file=sys.stderr)
    sys.exit(1 if arguments.check and over else 0)


if __name__ == "__main__":
    main()
