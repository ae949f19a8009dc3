"""Messages that ask nothing of the user are left out; whatever else the same libraries say is shown."""

import subprocess
import sys

import pytest

KNOWN = {
    "torch._library.triton": "Triton not available, find_triton_kernels = []",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED, use HybridModel",
}
WARNED = (
    "`torch.distributed.reduce_op` is deprecated, please use `torch.distributed.ReduceOp` instead",
    "Transformer Engine and Apex are not installed. Falling back to Torch optimizers.",
)


UNCUT = "`sequence_parallel` is set to `True`, but tensor model parallel size is 1. Disabling sequence parallel."
LEAF = "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed."


def said(statements: str, nvidia: str = "/nowhere") -> str:
    """Standard error of a fresh interpreter after `silence()`, twice: the command and megatron's import ask for it.

    nvidia: a path that is there where the machine has a GPU.
    """
    begin = (
        "import logging, pathlib, warnings; logging.basicConfig(format='%(message)s'); from r1mega import noise; "
        f"noise.NVIDIA = pathlib.Path({nvidia!r}); noise.silence(); noise.silence(); "
    )
    command = [sys.executable, "-W", "default", "-c", begin + statements]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def of_module(module: str, text: str = LEAF) -> str:
    return f"warnings.warn_explicit({text!r}, UserWarning, 'file.py', 1, module={module!r})"


def test_known_messages_are_left_out():
    logs = "; ".join(f"logging.getLogger({name!r}).warning({text!r})" for name, text in KNOWN.items())
    warned = "; ".join(f"warnings.warn({text!r}, FutureWarning)" for text in WARNED)
    of_megatron = f"{of_module('megatron.core.optimizer')}; {of_module('megatron.core.tensor_parallel.layers', UNCUT)}"
    assert said(f"{logs}; {warned}; {of_megatron}") == ""


@pytest.mark.parametrize(
    "statement",
    [
        "logging.getLogger('torch._library.triton').warning('a fault')",
        "logging.getLogger('torch').warning('a fault: Triton not available')",
        "logging.getLogger('megatron.core.models.gpt.gpt_model').error('a fault')",
        "warnings.warn('a fault, for `torch.distributed.reduce_op` is deprecated')",
    ],
)
def test_others_are_shown(statement):
    assert "a fault" in said(statement)


def test_a_gradient_asked_of_no_leaf_is_known_of_megatron_alone():
    assert LEAF in said(of_module("r1mega.train.policy")) and LEAF in said(of_module("megatronic"))


def test_a_gpu_wants_triton(tmp_path):
    name, text = next(iter(KNOWN.items()))
    assert text in said(f"logging.getLogger({name!r}).warning({text!r})", str(tmp_path))


def test_errors_and_filters_of_others_stay():
    name, text = "megatron.core.models.gpt.gpt_model", KNOWN["megatron.core.models.gpt.gpt_model"]
    assert text in said(f"logging.getLogger({name!r}).error({text!r})")
    other = f"logging.getLogger({name!r}); f.filters.clear(); f.addFilter(functools.partial(bool)); noise.silence()"
    assert said(f"import functools; f = {other}; f.warning({text!r})") == ""


def test_bars_are_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    bar = "import tqdm; list(tqdm.tqdm(range(3)))"
    assert said(bar) == ""
    monkeypatch.setenv("TQDM_DISABLE", "")
    assert "3/3" in said(bar)
