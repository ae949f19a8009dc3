"""Compiles the kernel libraries next to the Python package: `python kernels/build.py [--cuda | --no-cuda]`.

Needs neither torch nor anything else installed: g++ for the CPU library (seconds), nvcc for the CUDA library (a
minute).
`setup.py` calls `build_libraries` from its build_py command.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "r1mega_kernels"
COMMON_FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", f"-I{ROOT / 'include'}"]
# Nothing in the kernels reads errno or floating-point traps; NaN and infinity are kept (no -ffast-math).
CPU_FLAGS = [*COMMON_FLAGS, "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {"generic": (4, []), "avx2": (8, ["-mavx2", "-mfma"]), "avx512": (16, AVX512)}
CUDA_TARGETS = ("80", "90a", "100")


def build_libraries(output: Path = PACKAGE, cuda: bool | None = None) -> list[Path]:
    """Compiles what this machine can into `output` and returns the libraries; says on stderr what was left out and why.

    cuda: None builds the CUDA library if nvcc is there and a CUDA torch is installed (or R1MEGA_BUILD_CUDA=1).

    Raises:
        RuntimeError: a compiler that is there failed (its messages are in the error).
    """
    output.mkdir(parents=True, exist_ok=True)
    built = []
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler:
        built.append(build_cpu(compiler, output / "_cpu.so"))
    else:
        print("r1mega_kernels: no g++, the CPU library is not built; the torch reference serves", file=sys.stderr)
    nvcc = find_nvcc()
    if cuda or (cuda is None and nvcc and wants_cuda(nvcc)):
        if not nvcc:
            raise RuntimeError("the CUDA library was asked for and there is no nvcc (PATH, CUDA_HOME)")
        built.append(build_cuda(nvcc, output / "_cuda.so"))
    elif cuda is None:
        print(f"r1mega_kernels: {_no_cuda_because(nvcc)}, the CUDA library is not built", file=sys.stderr)
    return built


def _no_cuda_because(nvcc: str | None) -> str:
    if nvcc is None:
        return "no nvcc"
    if (version := torch_cuda()) is None:
        return "no CUDA torch is installed (R1MEGA_BUILD_CUDA=1 builds it all the same)"
    return (
        f"{nvcc} is of CUDA {cuda_major(nvcc)} and torch of {version}, whose drivers may be too old for it (set CUDA_HOME to "
        "a toolkit of torch's major version; R1MEGA_BUILD_CUDA=1 builds it all the same)"
    )


def build_cpu(compiler: str, output: Path) -> Path:
    """The kernels once for each instruction set of this architecture, and the operators that choose among them."""
    names = list(INSTRUCTION_SETS) if platform.machine() in ("x86_64", "AMD64") else ["generic"]
    source = ROOT / "csrc" / "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        for name in names:
            width, flags = INSTRUCTION_SETS[name]
            jobs.append(
                [
                    *flags,
                    f"-DR1_ISA={name}",
                    f"-DR1_WIDTH={width}",
                    str(source / "isa.cpp"),
                    "-o",
                    f"{scratch}/{name}.o",
                ]
            )
        jobs.append([f"-DR1_SIGNATURE={signature()}", str(source / "cpu_ops.cpp"), "-o", f"{scratch}/ops.o"])
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(lambda job: run([compiler, *CPU_FLAGS, "-c", *job]), jobs))
        _link([compiler, "-shared", *(job[-1] for job in jobs), *torch_stubs(compiler, Path(scratch), "cpu")], output)
    return output


def signature() -> str:
    """Of the operators that the package declares: a library that was built for others would read wrong arguments."""
    tree = ast.parse((PACKAGE / "library.py").read_text())
    (schemas,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_SCHEMAS")
    return f"0x{zlib.crc32(repr(ast.literal_eval(schemas)).encode()):08x}u"


def torch_stubs(compiler: str, folder: Path, *parts: str) -> list[str]:
    """Linker arguments that make a library need libtorch_<part>.so, by empty libraries of those names: torch, which
    loads its own privately, is found by name when the library is loaded, and need not be there now."""
    for part in parts:
        name = f"libtorch_{part}.so"
        run([compiler, "-shared", "-x", "c++", "/dev/null", f"-Wl,-soname,{name}", "-o", str(folder / name)])
    return [f"-L{folder}", "-Wl,--no-as-needed", *(f"-ltorch_{part}" for part in parts)]


def build_cuda(nvcc: str, output: Path) -> Path:
    """One fat binary: machine code for `cuda_targets`, and PTX of the last plain one for what comes after."""
    targets = cuda_targets(nvcc)
    code = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    plain = [target for target in targets if target.isdigit()][-1]
    code.append(f"-gencode=arch=compute_{plain},code=compute_{plain}")
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'include'}", f"-DR1_SIGNATURE={signature()}"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
    with tempfile.TemporaryDirectory() as scratch:
        linked = torch_stubs(os.environ.get("CXX", "g++"), Path(scratch), "cpu", "cuda")
        linked = [f"-Xlinker={arg[4:]}" if arg.startswith("-Wl,") else arg for arg in linked]
        source = str(ROOT / "csrc" / "cuda" / "cuda_ops.cu")
        _link([nvcc, *flags, *code, "-shared", "-cudart=static", source, *linked], output)
    return output


def cuda_targets(nvcc: str) -> tuple[str, ...]:
    """Those of CUDA_TARGETS that this nvcc compiles for.

    Raises:
        RuntimeError: none without a letter, which newer GPUs could run too.
    """
    listed = run([nvcc, "--list-gpu-arch"]).split()
    targets = tuple(target for target in CUDA_TARGETS if f"compute_{target.rstrip('a')}" in listed)
    if not any(target.isdigit() for target in targets):
        raise RuntimeError(f"{nvcc} compiles for {', '.join(listed)}, of which the kernels support none: CUDA 12 or 13")
    return targets


def _link(command: list[str], output: Path) -> None:
    """Written beside the target and moved: a process that has the old library loaded keeps it."""
    partial = output.with_suffix(f".{os.getpid()}.tmp")
    run([*command, "-o", str(partial)])
    partial.replace(output)


def run(command: list[str]) -> str:
    """Runs a compiler and returns what it said.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nfailed with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, PATH or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc" if home else None, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def wants_cuda(nvcc: str) -> bool:
    """Whether the torch of this environment is a CUDA build of the major version of nvcc, or R1MEGA_BUILD_CUDA=1."""
    if os.environ.get("R1MEGA_BUILD_CUDA"):
        return os.environ["R1MEGA_BUILD_CUDA"] == "1"
    version = torch_cuda()
    return version is not None and version.split(".")[0] == cuda_major(nvcc)


def cuda_major(nvcc: str) -> str:
    """'12' or '13'."""
    said = run([nvcc, "--version"])
    found = re.search(r"release (\d+)", said)
    if found is None:
        raise RuntimeError(f"{nvcc} --version names no release: {said}")
    return found[1]


def torch_cuda() -> str | None:
    """The CUDA version of the torch of this environment. Reads torch/version.py: an isolated build sees no torch on
    sys.path, and importing it takes seconds."""
    found = importlib.util.find_spec("torch")
    folder = Path(found.origin).parent if found and found.origin else Path(sysconfig.get_path("purelib")) / "torch"
    version = folder / "version.py"
    lines = version.read_text().splitlines() if version.exists() else []
    said = [line.split("=")[-1].strip() for line in lines if line.startswith("cuda")]
    return said[-1].strip("'\"") if said and said[-1] != "None" else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cuda", action=argparse.BooleanOptionalAction, default=None, help="default: if a CUDA torch is here"
    )
    for path in build_libraries(cuda=parser.parse_args().cuda):
        print(path)


if __name__ == "__main__":
    main()
