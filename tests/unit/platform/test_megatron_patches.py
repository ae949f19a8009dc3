"""The patches: they fit the installed megatron-core, leave torch alone, and say so when they do not fit."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch

from r1mega import platform
from r1mega.errors import PlatformError
from r1mega.platform import megatron_import
from r1mega.platform.megatron_import import apply_patches, rewrite_for_cpu
from r1mega.platform.megatron_patches import MEGATRON_VERSIONS, PATCHES, Patch, installed_version

pytestmark = pytest.mark.heavy


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)


def installed_source(module: str) -> str:
    """The unpatched source of megatron.core.MODULE; empty where the installed version has no such module."""
    from importlib.util import find_spec
    from pathlib import Path

    path = Path(find_spec("megatron.core").origin).parent / module.replace(".", "/")
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.exists():
            return file.read_text()
    return ""


def stale(
    patches: Sequence[Patch], source_of: Callable[[str], str], version: str, supported: Iterable[str]
) -> list[str]:
    """What to do about each patch that megatron-core, of this version and this source, has made superfluous."""
    found = []
    for patch in patches:
        name = f"{patch.module}, {patch.reason!r} (upstream: {patch.upstream})"
        if all(patch.ended(other) for other in supported):
            found.append(f"delete the patch of {name}: {patch.fixed_in} has it, and no older version is supported")
        elif patch.is_for(version):
            source = source_of(patch.module)
            if source.count(patch.old) != patch.count or patch.fault not in source:
                found.append(
                    f"the patch of {name} finds no longer what it replaces in {version}: if that is mended there, delete "
                    f"the patch, or write fixed_in={version!r} while an older version is supported"
                )
    return found


def test_no_patch_has_outlived_its_reason():
    assert stale(PATCHES, installed_source, installed_version(), MEGATRON_VERSIONS) == []


def test_a_patch_that_upstream_has_made_superfluous_is_named():
    """The patches of 0.16.1, once only 0.19.2 is supported; a fault that is gone from the source; one mended elsewhere in it."""
    ended = [patch for patch in PATCHES if patch.ended("0.19.2")]
    assert {"#4593", "#5997"} <= {patch.upstream.split()[0].rstrip(":") for patch in ended}
    delete = [text for text in stale(PATCHES, installed_source, "0.19.2", ["0.19.2"]) if text.startswith("delete")]
    assert [f"{patch.module}, {patch.reason!r}" in text for patch, text in zip(ended, delete, strict=True)] == [
        True
    ] * len(ended)
    patch = Patch("jit", "always", "x = 1\n", "x = 2\n", "reason", "#1", fault="y = 1")
    for source, is_stale in (("x = 1\ny = 1", False), ("x = 1.0\ny = 1", True), ("x = 1\ny = 2", True)):
        messages = stale([patch], lambda _, source=source: source, "0.19.2", ["0.19.2"])
        assert [("fixed_in='0.19.2'" in m, "#1" in m) for m in messages] == [(True, True)] * is_stale


def test_every_patch_says_what_ends_it():
    """A pull request of upstream, or that none is known and what it would have to do."""
    assert [p for p in PATCHES if not re.search(r"#\d+|^none known; \w+ .*would have to ", p.upstream)] == []
    assert [p for p in PATCHES if p.fixed_in and not re.search(r"#\d+|see below", p.upstream)] == []


@pytest.mark.parametrize("index", range(len(PATCHES)))
def test_a_patch_fits_the_versions_that_it_is_for_and_no_other(index):
    patch = PATCHES[index]
    source = installed_source(patch.module)
    if patch.is_for(installed_version()):
        assert patch.new in apply_patches(patch.module, source, [patch])
    else:  # else it would have been dropped too early
        assert source.count(patch.old) != patch.count


def test_every_supported_version_is_covered_by_a_lock_file_and_the_package_itself():
    """A version is in MEGATRON_VERSIONS, requirements/ and setup.py, or in none of them."""
    from pathlib import Path

    root = Path(__file__).parents[3]
    locked = {
        line.split(";")[0].strip().split("==")[1]
        for path in root.glob("requirements/*.lock")
        for line in path.read_text().splitlines()
        if line.startswith("megatron-core==")
    }
    assert locked == set(MEGATRON_VERSIONS)
    assert all(f"megatron-core=={version}" in (root / "setup.py").read_text() for version in MEGATRON_VERSIONS)


@pytest.mark.parametrize(
    ("version", "message"),
    [("0.18.2", r"megatron-core 0\.18\.2 is installed.*0\.16\.1 and 0\.19\.2"), (None, "is not installed")],
)
def test_another_version_is_a_typed_error_that_says_what_to_install(version, message, monkeypatch):
    import importlib.metadata

    def installed(_name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(PlatformError, match=message) as error:
        installed_version()
    assert "with Python 3.12: pip install megatron-core==0.19.2" in str(error.value)


def test_a_patch_that_does_not_fit_is_a_typed_error():
    with pytest.raises(PlatformError, match="is there 0 times"):
        apply_patches("jit", "nothing of the kind", [Patch("jit", "cpu", "torch.compile", "identity", "reason", "#1")])


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
    finders = [f for f in sys.meta_path if type(f).__module__ == "r1mega.platform.megatron_import"]
    assert len(finders) == 1
    import megatron.core.models.gpt

    assert before == (torch.zeros, torch.tensor, torch.cuda.current_device, torch.cuda.Stream, torch.compile)
    assert megatron.core.jit.jit_fuser is not torch.compile


def test_megatron_imported_too_early_is_a_typed_error():
    result = run_python("import megatron.core\nfrom r1mega import platform\nplatform.prepare()")
    assert result.returncode != 0
    assert "PlatformError" in result.stderr
    assert "call it first" in result.stderr


def test_what_the_platform_does_not_use_megatron_does_not_find(tmp_path):
    """Installed for GPUs, on a machine without one: one imports there (and is imported), the other fails in its own way."""
    put = {
        "transformer_engine/pytorch/optimizers.py": "FusedAdam = FusedSGD = 'of a GPU'",
        "apex/__init__.py": "raise OSError('libcuda.so.1: cannot open shared object file')",
    }
    for name, text in put.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    result = run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
        "\nimport transformer_engine.pytorch.optimizers"
        "\nfrom r1mega import platform; platform.prepare()"
        "\nfrom megatron.core.optimizer import Adam, distrib_optimizer"
        "\nfrom megatron.core.transformer.mlp import HAVE_TE"
        "\nprint(Adam.__module__, distrib_optimizer.Adam.__module__, HAVE_TE)"
    )
    assert result.stdout == "r1mega.platform.adam r1mega.platform.adam False\n", result.stderr[-2000:]
    assert "transformer_engine is installed and not used" in result.stderr and "apex is installed" in result.stderr


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


def test_what_a_patched_module_was_compiled_to_is_kept_until_anything_of_it_changes(tmp_path, monkeypatch):
    file = tmp_path / "one.py"
    file.write_text("x = torch.cuda.one()\ny = 'old'\n")
    file.chmod(0o640)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    changes = []
    monkeypatch.setattr(
        megatron_import, "apply_patches", lambda *given: changes.append(given[0]) or apply_patches(*given)
    )

    def names_of(new="new", cpu=True):
        patch = Patch("one", "always", "'old'", f"'{new}'", "a test")
        loader = megatron_import._Loader("megatron.core.one", str(file), [patch], cpu, {})
        code = loader.get_code("megatron.core.one")
        return code.co_names, code.co_consts[0], code.co_filename

    stand_in = (("_cuda_stand_in", "one", "x", "y"), "new", str(file))
    assert names_of() == names_of() == stand_in and len(changes) == 1
    (kept,) = (tmp_path / "__pycache__").iterdir()
    assert kept.stat().st_mode & 0o777 == 0o640, "who may not change the source may not change this"
    kept.write_bytes(kept.read_bytes()[:-1])
    assert names_of() == stand_in and len(changes) == 2, "one that is not whole is none"
    assert names_of("other")[1] == "other" and "cuda" in names_of(cpu=False)[0] and len(changes) == 4
    file.write_text("y = 'old', 2\n")
    assert names_of()[1] == ("new", 2) and len(changes) == 5
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file.write_text("y = 'old', 3\n")
    assert names_of() == names_of() and len(changes) == 7
    file.write_text("y = 4\n")
    for _ in range(2):
        with pytest.raises(PlatformError, match="0 times instead of 1"):
            names_of()


def test_what_a_module_without_changes_is_compiled_to_is_pythons_own(tmp_path, monkeypatch):
    file = tmp_path / "two.py"
    file.write_text("z = 1\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    loader = megatron_import._Loader("megatron.core.two", str(file), [], True, {})
    assert loader.get_code("megatron.core.two") == loader.get_code("megatron.core.two")
    assert (tmp_path / "__pycache__" / f"two.{sys.implementation.cache_tag}.pyc").exists()


def test_what_is_compiled_without_assertions_is_not_kept_for_those_who_want_them(tmp_path):
    file = tmp_path / "three.py"
    file.write_text("x = 1\nassert x, 'old'\n")
    code = (
        "import sys; sys.dont_write_bytecode = False; from r1mega.platform import megatron_import as m\n"
        "p = m.Patch('three', 'always', 'old', 'new', '')\n"
        f"print('new' in m._Loader('megatron.core.three', {str(file)!r}, [p], True, {{}}).get_code('megatron.core.three').co_consts)"
    )
    told = [subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True).stdout
            for flags in (["-O"], [], ["-O"])]  # fmt: skip
    assert told == ["False\n", "True\n", "False\n"]
