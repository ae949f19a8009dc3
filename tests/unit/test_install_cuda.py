"""The GPU machine's set-up: the script's steps with programs that note how they are called, and that its pins go together.

What it does not cover: the builds of Transformer Engine's part for torch and of apex, which need nvcc.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE_FOR_TORCH = (
    "einops", "onnxscript", "onnx", "packaging", "pydantic", "nvdlfw-inspect", "nvidia-cudnn-frontend>=1.29.0",
    "transformer-engine-cu13==2.20.2",
)  # fmt: skip
"""What the source package transformer-engine-torch 2.20.2 requires besides torch. It says so to a torch of CUDA only."""


LIKE_PYTHON = """case $* in
*purelib*) echo /site; exit ;;
*transformer_engine.pytorch*) cat "${BASH_SOURCE[0]}.says" 2>/dev/null; exit 1 ;;
*amp_C*) exec test -e "${BASH_SOURCE[0]}.has_apex" ;;
esac
"""
"""Answers what the script asks; the files beside it say what."""


@pytest.fixture
def machine(tmp_path):
    """A copy of the set-up files beside a .venv and a PATH of programs that write down their arguments."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for directory, names in ((".venv/bin", ("python", "pip", "r1mega")), ("bin", ("git",))):
        (tmp_path / directory).mkdir(parents=True)
        for name in names:
            program(tmp_path / directory / name, f"{LIKE_PYTHON if name == 'python' else ''}echo "
                    f'"${{APEX_CUDA_EXT:+apex}} {name} $* ${{CPATH:+CPATH=$CPATH}}" >> "{tmp_path}/calls"')  # fmt: skip
    program(tmp_path / "bin/nvcc", 'echo "Cuda compilation tools, release 13.0, V13.0.88"')
    program(tmp_path / "bin/nvidia-smi", "echo 580.95.05")
    return tmp_path


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def install(machine: Path, *arguments: str) -> tuple[int, str, list[str]]:
    """(exit code, what it said, calls of programs)"""
    path = f"{machine / 'bin'}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", machine / "launch/install_cuda.sh", *arguments],
        capture_output=True,
        text=True,
        env={"PATH": path, "HOME": "/"},
    )
    calls = (machine / "calls").read_text().splitlines() if (machine / "calls").exists() else []
    return done.returncode, done.stdout + done.stderr, [call.strip() for call in calls]


def place(calls: list[str], text: str) -> int:
    (found,) = (i for i, call in enumerate(calls) if text in call)
    return found


def test_what_is_built_here_comes_after_its_torch_and_without_isolation(machine):
    code, said, calls = install(machine, "--apex")
    assert code == 0, said
    torch, rest = place(calls, " torch==2.13.0"), place(calls, "-r requirements/cuda.txt")
    engine, apex = place(calls, "transformer-engine-torch==2.20.2"), place(calls, "apex pip install")
    own = place(calls, "-e .[cuda]")
    assert torch < rest < engine < apex < own < place(calls, "kernels/build.py --cuda") < place(calls, "r1mega doctor")
    for call in (calls[engine], calls[apex]):  # pip's cache holds what it built for another torch
        assert " --no-build-isolation --no-cache-dir " in call and "CPATH=/site/nvidia/" in call
    assert all("pip install -c .venv/constraints.txt" in call for call in calls if "pip install" in call)
    assert "git clone --depth 1 --branch 25.09 https://github.com/NVIDIA/apex" in calls[place(calls, "git clone")]


def test_apex_is_optional(machine):
    code, said, calls = install(machine)
    assert code == 0, said
    assert not [call for call in calls if "apex" in call]


def test_what_was_built_for_another_torch_is_built_anew(machine):
    (machine / ".venv/bin/python.says").write_text(
        "ImportError: transformer_engine_torch.so: undefined symbol: _ZN3c10\n"
    )
    code, said, calls = install(machine)
    assert code == 0, said
    first, second = (call for call in calls if "transformer-engine-torch==2.20.2" in call)
    assert "--force-reinstall" not in first
    assert "--no-build-isolation --no-cache-dir --force-reinstall --no-deps transformer-engine-torch==2.20.2" in second


@pytest.mark.parametrize("says", ["", "ImportError: libcuda.so.1: cannot open shared object file\n"])
def test_what_is_there_is_not_built_twice(machine, says):
    (machine / ".venv/bin/python.says").write_text(says)
    (machine / ".venv/bin/python.has_apex").touch()
    code, said, calls = install(machine, "--apex")
    assert code == 0, said
    assert not [call for call in calls if "--force-reinstall" in call or call.startswith("apex pip")]


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("nvcc", 'echo "Cuda compilation tools, release 12.8, V12.8.93"', "torch and vLLM are built for CUDA 13"),
        ("nvidia-smi", "echo 570.124.06", "driver 570.124.06: CUDA 13 wants 580 or newer"),
    ],
)
def test_another_cuda_is_refused_before_anything_is_installed(machine, name, body, message):
    program(machine / "bin" / name, body)
    code, said, calls = install(machine)
    assert code == 1 and message in said
    assert calls == []


@pytest.mark.heavy
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_pins_resolve(machine, tmp_path, python):
    """All requirements of setup.py, cuda.txt and what is built here, theirs included, for CUDA's wheels, in the versions of the
    CPU's lock file. Resolved by uv, which reads metadata alone: pip downloads gigabytes of wheels for a dry run.
    """
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    if not uv.exists():
        pytest.skip("uv is not installed")
    install(machine)
    constraints = machine / ".venv/constraints.txt"
    (tmp_path / "core.txt").write_text("\n".join([*core_requirements(), *ENGINE_FOR_TORCH]))
    done = subprocess.run(
        [uv, "pip", "compile", ROOT / "requirements/cuda.txt", tmp_path / "core.txt", "--no-header", "--no-annotate", "--quiet",
         "-c", constraints, "--only-binary", ":all:", "--python-platform", "x86_64-manylinux_2_34",
         "--python-version", python],
        capture_output=True, text=True, env=os.environ | {"UV_HTTP_TIMEOUT": "60"}, timeout=300,
    )  # fmt: skip
    if done.returncode and any(
        text in done.stderr for text in ("error sending request", "Failed to fetch", "dns error", "Connect")
    ):
        pytest.skip(f"no package index is reachable: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    pins = (ROOT / "requirements/cuda.txt").read_text().splitlines()
    resolved = done.stdout.splitlines()
    assert {pin for pin in pins if "==" in pin} <= set(resolved)
    assert any(line.startswith("nvidia-cudnn-cu13==") for line in resolved)  # of torch's CUDA 13 build
    tested = {line.partition(";")[0].strip() for line in constraints.read_text().splitlines()}
    assert len(tested & set(resolved)) > 100


def core_requirements() -> list[str]:
    import ast

    tree = ast.parse((ROOT / "setup.py").read_text())
    (value,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "CORE")
    return ast.literal_eval(value)
