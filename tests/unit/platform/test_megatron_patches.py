"""The patches: they fit the installed megatron-core, leave torch alone, and say so when they do not fit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from r1mega import platform
from r1mega.errors import PlatformError
from r1mega.platform.megatron_patches import PATCHES, Patch, apply_patches, rewrite_for_cpu


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)


def test_every_patch_fits_its_installed_module():
    from importlib.util import find_spec
    from pathlib import Path

    root = Path(find_spec("megatron.core").origin).parent
    for patch in PATCHES:
        path = root / (patch.module.replace(".", "/") + ".py")
        source = (path if path.exists() else root / patch.module.replace(".", "/") / "__init__.py").read_text()
        assert patch.new in apply_patches(patch.module, source, [patch])


def test_a_patch_that_does_not_fit_is_a_typed_error():
    with pytest.raises(PlatformError, match="is there 0 times"):
        apply_patches("jit", "nothing of the kind", [Patch("jit", "cpu", "torch.compile", "identity", "reason")])


def test_rewriting_turns_cuda_into_the_cpu():
    source = "x = torch.zeros(2, device='cuda').cuda()\nd = torch.device('cuda')\ns = load(f, map_location=\"cuda\")\nt = torch.cuda.current_device()\nn = 'torch.cuda.FloatTensor'\n"
    rewritten = rewrite_for_cpu(source + "from torch.cuda import _lazy_init\n")
    assert rewritten.splitlines() == [
        "x = torch.zeros(2, device='cpu').cpu()",
        "d = torch.device('cpu')",
        "s = load(f, map_location='cpu')",
        "t = _cuda_stand_in.current_device()",
        "n = 'torch.FloatTensor'",
        "from torch.cuda import _lazy_init",
    ]


def test_prepare_twice_installs_once_and_leaves_torch_alone():
    before = (torch.zeros, torch.tensor, torch.cuda.current_device, torch.cuda.Stream, torch.compile)
    assert platform.prepare() is platform.prepare() is platform.current()
    finders = [f for f in sys.meta_path if type(f).__module__ == "r1mega.platform.megatron_patches"]
    assert len(finders) == 1
    import megatron.core.models.gpt

    assert before == (torch.zeros, torch.tensor, torch.cuda.current_device, torch.cuda.Stream, torch.compile)
    assert megatron.core.jit.jit_fuser is not torch.compile


def test_megatron_imported_too_early_is_a_typed_error():
    result = run_python("import megatron.core\nfrom r1mega import platform\nplatform.prepare()")
    assert result.returncode != 0
    assert "PlatformError" in result.stderr
    assert "call it first" in result.stderr


@pytest.mark.parametrize("first", ["vllm", "megatron"])
def test_vllm_before_and_after(first):
    """One process, both import orders: a forward and backward pass after both are there."""
    pytest.importorskip("vllm")
    imports = ["import vllm", "from r1mega import platform; platform.prepare(); import megatron.core.models.gpt"]
    code = "\n".join(imports if first == "vllm" else imports[::-1]) + (
        "\nimport torch"
        "\nfrom r1mega.model.build import build_model"
        "\nfrom r1mega.platform import groups"
        "\nfrom tests.reference import DEEPSEEK, Layout, ModelSettings"
        "\ngroups.init_parallel(Layout(), 0)"
        "\n(m,) = build_model(DEEPSEEK, Layout(), ModelSettings(), init_std=0.05)"
        "\nout = m(torch.arange(8)[None], torch.arange(8)[None], None)"
        "\nout.logsumexp(-1).sum().backward()"
        "\nprint('finite', bool(out.isfinite().all()), torch.get_num_threads() > 0)"
    )
    result = run_python(code)
    assert "finite True True" in result.stdout, result.stderr[-2000:]
