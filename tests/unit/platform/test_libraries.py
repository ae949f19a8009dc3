"""Transformer Engine and apex that are missing, broken, others than they seem, or work: packages on a path of their own, loaded
by Python's own machinery.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import r1mega_kernels
from r1mega import platform
from r1mega.config.load import load_config
from r1mega.doctor import machine
from r1mega.doctor.config import config_facts
from r1mega.errors import PlatformError
from r1mega.platform import libraries
from r1mega.platform.validate import _check_kernels, validate_platform
from r1mega_kernels import library

NAMES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")
NANO = Path(__file__).parents[3] / "configs/nano/base.yaml"
SWALLOWS = "try:\n    from . import pytorch\nexcept ImportError:\n    pass\n"  # as the real one does
LAYERS = "class Linear: pass\nLayerNormLinear = GroupedLinear = DotProductAttention = RMSNorm = Linear\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A directory that packages can be put into; the machine has a GPU."""
    if any(name in sys.modules for name in NAMES):
        pytest.skip("the real ones are loaded")
    monkeypatch.syspath_prepend(tmp_path)
    here = platform.Platform("cuda", torch.device("cuda", 0), "cpu:gloo,cuda:nccl", False, False)
    monkeypatch.setattr(platform, "current", lambda: here)
    look_anew()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        del sys.modules[name]
    look_anew()


def look_anew() -> None:
    for look in (libraries.transformer_engine, libraries.apex):
        look.cache_clear()


def put(site: Path, files: dict[str, str], distribution: str = "", version: str = "") -> None:
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    if distribution:
        record = site / f"{distribution}-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    look_anew()


def put_engine(site: Path, *, compiled: str, version: str = libraries.TRANSFORMER_ENGINE_VERSION) -> None:
    """compiled: what the layers' module does first."""
    put(site, {
        "transformer_engine/__init__.py": SWALLOWS,
        "transformer_engine/pytorch/__init__.py": compiled + LAYERS,
        "transformer_engine/pytorch/optimizers/__init__.py": "class FusedAdam: pass\n",
    }, "transformer_engine", version)  # fmt: skip


def refusal() -> str:
    try:
        validate_platform(load_config(NANO, ["model.log_probs=reference"]))  # the CUDA kernels are not built here
    except PlatformError as error:
        return str(error)
    return ""


def told(name: str) -> tuple[bool | None, str]:
    (fact,) = (fact for fact in machine._libraries() if fact.name == name)
    return fact.state, fact.text


def test_a_stale_cpu_library_of_the_kernels_is_told_before_a_run(monkeypatch):
    """On a GPU's machine too, whatever computes log-probs: advantages are computed on the CPU."""
    monkeypatch.setattr(library, "_CPU_PROBLEM", "_cpu.so is stale")
    _, facts, problem = config_facts(NANO, [])
    assert [fact.text for fact in facts if fact.name == "log-probs"] == ["kernels: _cpu.so is stale"]
    assert problem is not None
    assert refusal() == "_cpu.so is stale"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(library, "_has_cuda", lambda: True)
    assert machine._kernels()[0].text == "_cpu.so is stale"
    with pytest.raises(PlatformError, match=r"^_cpu\.so is stale$"):
        _check_kernels("cuda", "logits")


def test_only_the_cuda_library_of_the_kernels_can_be_done_without(monkeypatch):
    def refused():
        raise r1mega_kernels.PlatformError("_cuda.so is stale.")

    monkeypatch.setattr(library, "_has_cuda", refused)
    with pytest.raises(PlatformError, match=r"_cuda\.so is stale\. model\.log_probs=reference does without"):
        _check_kernels("cuda", "logits")
    _check_kernels("cuda", "reference")


def test_missing_is_a_choice(site):
    assert libraries.transformer_engine().state == libraries.apex().state == "missing"
    assert told("Transformer Engine") == (False, "not installed: Megatron's local layers and torch's Adam")
    assert refusal() == ""


def test_a_working_one_is_used(site):
    put_engine(site, compiled="")
    assert libraries.transformer_engine().works
    assert told("Transformer Engine") == (True, libraries.TRANSFORMER_ENGINE_VERSION)
    assert refusal() == ""


def test_one_built_for_another_torch_is_told_from_a_missing_one(site):
    """A real shared object that wants a symbol which this torch does not have."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    source = 'extern "C" void *_ZN3c1013of_another_torchEv(); extern "C" void *PyInit_transformer_engine_torch()'
    (site / "module.cpp").write_text(source + " { return _ZN3c1013of_another_torchEv(); }\n")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    target = site / f"transformer_engine_torch{suffix}"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", target, site / "module.cpp"], check=True)
    put_engine(site, compiled="import transformer_engine_torch\n")
    found = libraries.transformer_engine()
    assert found.state == "broken"
    for text in (
        "undefined symbol: _ZN3c1013of_another_torchEv",
        f"another torch than {torch.__version__}",
        "install_cuda.sh",
    ):
        assert text in found.problem
    assert refusal() == found.problem
    assert told("Transformer Engine") == (False, found.problem)


@pytest.mark.parametrize(
    ("compiled", "text"),
    [
        (
            "raise FileNotFoundError('Could not find shared object file for Transformer Engine torch lib.')\n",
            "compiled part",
        ),
        ("import transformer_engine_torch\n", "its compiled part for torch is not installed"),
        ("raise RuntimeError('Transformer Engine requires cuDNN 9.12.0 or later')\n", "requires cuDNN 9.12.0"),
        ("1 / 0\n", "does not load (ZeroDivisionError: division by zero)"),
    ],
)
def test_whatever_it_fails_with_is_told(site, compiled, text):
    put_engine(site, compiled=compiled)
    assert text in refusal()
    assert told("Transformer Engine")[0] is False


def test_without_its_layers_it_is_broken(site):
    put(site, {"transformer_engine/__init__.py": "", "transformer_engine/pytorch/__init__.py": "class Linear: pass\n"})
    assert "has no LayerNormLinear, GroupedLinear" in refusal()


def test_another_version_is_refused(site):
    put_engine(site, compiled="", version="2.11.0")
    assert "Transformer Engine 2.11.0 is installed, r1mega is made for and tested with 2.20.2" in refusal()


def test_the_apex_of_the_package_index_is_another_package(site, caplog):
    put(site, {"apex/__init__.py": "name = 'a toolkit for web applications'\n"}, "apex", "0.9.10.dev0")
    assert libraries.apex().state == "broken"
    state, text = told("apex")
    assert state is False and "PyPI's apex is another package" in text
    assert refusal() == ""  # it is optional
    assert "gradient accumulation is not fused" in caplog.text


def test_apex_wants_its_extensions(site):
    put(site, {"apex/__init__.py": "", "apex/optimizers/__init__.py": "class FusedAdam: pass\n", "amp_C.py": ""})
    assert not libraries.apex().works
    put(site, {"fused_weight_gradient_mlp_cuda.py": ""})
    assert libraries.apex().works


def test_the_pins_are_what_the_code_asks_for():
    pinned = (Path(__file__).parents[3] / "requirements/cuda.txt").read_text().splitlines()
    assert f"transformer-engine=={libraries.TRANSFORMER_ENGINE_VERSION}" in pinned
