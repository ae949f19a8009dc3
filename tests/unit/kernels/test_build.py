"""The build: torch's ABI as torch declares it, no compiler, a broken one, the CUDA kernels' registers and spills."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import r1mega_kernels

pytestmark = pytest.mark.heavy

KERNELS = Path(r1mega_kernels.__file__).parents[1]
ROOT = KERNELS.parent


def module_from(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build():
    return module_from(KERNELS / "build.py")


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_declarations_agree_with_torchs_headers(tmp_path):
    """A function declared twice as extern "C" with different types does not compile."""
    source = tmp_path / "check.cpp"
    source.write_text(
        "#include <torch/csrc/stable/c/shim.h>\n#define R1_TORCH_HEADERS\n"
        'extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);\n'
        '#include "r1mega_kernels/torch_abi.h"\n'
    )
    torch_include = Path(torch.__file__).parent / "include"
    command = ["g++", "-std=c++20", "-fsyntax-only", f"-I{torch_include}", f"-I{KERNELS / 'include'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_a_wheel_of_the_source_distribution_works_without_r1mega(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(KERNELS, source, ignore=shutil.ignore_patterns("__pycache__", "build", "dist", "*.egg-info"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"R1MEGA_BUILD_CUDA": "0"}

    def python(*arguments, cwd=tmp_path):
        done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    python("setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    assert not list(unpacked.rglob("*.so")), "a library of the machine that packed it"
    pip = ("-m", "pip", "--disable-pip-version-check", "-q")
    python(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(unpacked))
    (wheel,) = tmp_path.glob("*.whl")
    python(*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    assert (site / "r1mega_kernels/_cpu.so").exists() and (site / "r1mega_kernels/py.typed").exists()
    check = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import r1mega_kernels as k; "
        "print(k.__file__, k.backend('cpu'), any(name.split('.')[0] == 'r1mega' for name in sys.modules))"
    )
    module, backend, with_r1mega = python("-c", check).split()
    assert module == str(site / "r1mega_kernels/__init__.py") and with_r1mega == "False"
    assert backend.startswith("cpu-"), "the compiled kernels do not serve"


def test_without_compilers_nothing_is_built_and_nothing_fails(build, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.build_libraries(tmp_path) == []
    said = capsys.readouterr().err
    assert "no g++" in said and "no nvcc" in said
    with pytest.raises(RuntimeError, match="there is no nvcc"):
        build.build_libraries(tmp_path, cuda=True)


def test_a_compiler_that_fails_is_an_error(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="failed with status 1"):
        build.build_libraries(tmp_path, cuda=False)


def nvcc_of(folder: Path, release: str, *architectures: str) -> str:
    """A compiler that says what this release of nvcc says, and nothing else."""
    script = folder / f"nvcc-{release}"
    script.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo 'Cuda compilation tools, release {release}, V{release}';; "
        f"--list-gpu-arch) echo {' '.join(architectures)};; *) exit 1;; esac\n"
    )
    script.chmod(0o755)
    return str(script)


def test_cuda_is_built_only_where_it_is_wanted(build, tmp_path, monkeypatch, capsys):
    nvcc = nvcc_of(tmp_path, "13.0", "compute_100")
    monkeypatch.delenv("R1MEGA_BUILD_CUDA", raising=False)
    assert build.torch_cuda() == torch.version.cuda
    for version, wanted in ((None, False), ("12.8", False), ("13.0", True)):
        monkeypatch.setattr(build, "torch_cuda", lambda version=version: version)
        assert build.wants_cuda(nvcc) is wanted
    for value, wanted in (("1", True), ("0", False)):
        monkeypatch.setenv("R1MEGA_BUILD_CUDA", value)
        assert build.wants_cuda(nvcc) is wanted
    monkeypatch.delenv("R1MEGA_BUILD_CUDA")
    monkeypatch.setattr(build, "torch_cuda", lambda: "12.8")
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(build, "build_cpu", lambda compiler, output: output)
    build.build_libraries(tmp_path)
    assert "is of CUDA 13 and torch of 12.8" in capsys.readouterr().err


def test_architectures_are_those_of_the_compiler(build, tmp_path):
    old = nvcc_of(tmp_path, "12.6", "compute_75", "compute_80", "compute_90")
    assert build.cuda_targets(old) == ("80", "90a")  # sm_100 came with 12.8
    assert build.cuda_targets(nvcc_of(tmp_path, "13.0", "compute_80", "compute_90", "compute_100")) == (
        "80",
        "90a",
        "100",
    )
    with pytest.raises(RuntimeError, match="support none"):
        build.cuda_targets(nvcc_of(tmp_path, "14.0", "compute_120"))


def test_package_without_libraries_says_so_and_computes(tmp_path):
    """A copy of the package without compiled libraries, as after an install without g++."""
    shutil.copytree(
        KERNELS / "r1mega_kernels", tmp_path / "r1mega_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    program = (
        "import logging, torch, r1mega_kernels as k; logging.basicConfig()\n"
        "print(k.backend('cpu'), *k.grouped_log_prob(torch.zeros(2, 4), torch.tensor([1, 2])).log_prob.tolist())\n"
        "k.grouped_log_prob(torch.zeros(2, 4), torch.tensor([1, 2]))\n"
        "try: k.grouped_log_prob(torch.zeros(1, 4), torch.tensor([1]), backend='native')\n"
        "except Exception as error: print(type(error).__name__, 'needs g++' in str(error))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["reference -1.3862943649291992 -1.3862943649291992", "PlatformError True"]
    assert done.stderr.count("using the torch reference") == 1  # said once


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_a_library_of_other_operators_is_refused(tmp_path):
    """One left over from before an update would read arguments that are not there."""
    shutil.copytree(
        KERNELS / "r1mega_kernels", tmp_path / "r1mega_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    declared = tmp_path / "r1mega_kernels" / "library.py"
    declared.write_text(declared.read_text().replace("float kl_coefficient", "float further, float kl_coefficient"))
    program = (
        "import torch, r1mega_kernels as k\n"
        "logits, targets = torch.zeros(1, 4), torch.tensor([1])\n"
        "print(float(k.grouped_log_prob(logits, targets, backend='reference').log_prob.exp()))\n"
        "for call in (k.backend, lambda: k.grouped_log_prob(logits, targets)):\n"
        "    try: call()\n"
        "    except k.PlatformError as error: print(error)\n"
        "from r1mega.doctor.machine import _kernels\n"
        "print(_kernels()[0])\n"
        "from r1mega.errors import PlatformError\n"
        "from r1mega.platform.validate import _check_kernels\n"
        "for choice in (('cpu', 'logits'), ('cpu', 'reference'), ('cuda', 'logits')):\n"
        "    try: _check_kernels(*choice)\n"
        "    except PlatformError as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    reference, *refusals = done.stdout.splitlines()
    assert reference == "0.25" and len(refusals) == 6, done.stdout
    assert all("built for other operators" in line and "kernels/build.py" in line for line in refusals)
    assert "log_probs=reference" not in done.stdout, "advantages would not do without"


def test_cuda_kernels_keep_their_budgets(build):
    if build.find_nvcc() is None:
        pytest.skip("no nvcc")
    report_tool = module_from(ROOT / "tools" / "kernel_report.py")
    report = report_tool.compile_report()
    assert report["cuobjdump"], "no cuobjdump, of requirements/cpu.lock, to count the instructions of loops"
    assert report_tool.violations(report) == []
    compiled = {(r["kernel"], r["element"], r["target"]) for r in report["kernels"]}
    variants = [(r["element"], r["gradient"], r["aligned"], r["entropy"], r["row_threads"])
                for r in report["kernels"] if r["target"] == "sm_90a"]  # fmt: skip
    for variant in (
        ("bf16", None, True, False, 256),
        ("fp32", "bf16", True, None, 32),
        ("fp32", "fp16", False, None, 256),
    ):
        assert variants.count(variant) == 1, variant
    kept = [(r["element"], r["gradient"]) for r in report["kernels"]
            if r["target"] == "sm_90a" and r["kernel"] == "kept_log_prob_backward" and r["aligned"]]  # fmt: skip
    assert sorted(kept) == [("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp16"), ("fp32", "fp32")]
    for target in ("sm_80", "sm_90a", "sm_100"):
        for kernel in ("log_prob_stats", "log_prob_backward"):
            assert {(kernel, "bf16", target), (kernel, "fp32", target)} <= compiled
        assert {(k, None, target) for k in ("log_prob_merge", "token_loss", "group_advantages")} <= compiled
    counted = [record["loop_instructions"] for record in report["kernels"] if report_tool.loop_budget(record)]
    assert len(counted) == 4 and all(60 < count <= 220 for count in counted), "each loop that has a budget is found"


def test_a_cuobjdump_without_its_disassembler_is_none(tmp_path, monkeypatch):
    report_tool = module_from(ROOT / "tools" / "kernel_report.py")
    monkeypatch.setattr(report_tool.build, "find_nvcc", lambda: str(tmp_path / "nvcc"))
    monkeypatch.setattr(report_tool.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    for name, found in (("cuobjdump", None), ("nvdisasm", str(tmp_path / "cuobjdump"))):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert report_tool.find_cuobjdump() == found


def test_over_budget_is_reported():
    report_tool = module_from(ROOT / "tools" / "kernel_report.py")
    log = (
        "Compiling entry function '_ZN6r1mega6device10token_lossE' for 'sm_80'\n"
        "    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info : Used 255 registers, 512 bytes smem\n"
    )
    (record,) = report_tool.parse(log, "sm_80")
    assert record["spill_bytes"] == 12 and record["stack_bytes"] == 16 and record["shared_bytes"] == 512
    listing = (
        "Function : f\n/*0000*/ LDG.E.128 R4 ;\n/*0010*/ MUFU.EX2 R1, R2 ;\n/*0020*/ @P0 BRA 0x0 ;\n/*0030*/ EXIT ;\n"
    )
    assert report_tool.loop_instructions(listing) == {"f": 3}
    long = record | {"kernel": "log_prob_stats", "element": "bf16", "aligned": True, "target": "sm_90a"}
    long |= {"entropy": True, "loop_instructions": 221}
    assert "221 of 220 instructions" in report_tool.violations({"kernels": [long]})[0]
    assert "221 of 170 instructions" in report_tool.violations({"kernels": [long | {"entropy": False}]})[0]
    assert "None of 220 instructions" in report_tool.violations({"kernels": [long | {"loop_instructions": None}]})[0]
    assert "255 of 64 registers" in report_tool.violations({"kernels": [record]})[0]


def test_the_kernels_ask_torch_for_memory():
    """What cudaMalloc takes, torch's allocator neither counts nor gives back."""
    sources = [path.read_text() for path in (KERNELS / "csrc").rglob("*.cu*")]
    assert len(sources) > 3 and not any("cudaMalloc" in source for source in sources)
