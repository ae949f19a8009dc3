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
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed.",
    "Transformer Engine and Apex are not installed. Falling back to Torch optimizers.",
)


def said(statements: str) -> str:
    """Standard error of a fresh interpreter after `silence()`, twice: where the command and megatron's import ask for it."""
    begin = "import logging, warnings; logging.basicConfig(format='%(message)s'); from r1mega.noise import silence; silence(); silence(); "
    command = [sys.executable, "-W", "default", "-c", begin + statements]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def test_known_messages_are_left_out():
    logs = "; ".join(f"logging.getLogger({name!r}).warning({text!r})" for name, text in KNOWN.items())
    warned = "; ".join(f"warnings.warn({text!r}, FutureWarning)" for text in WARNED)
    assert said(f"{logs}; {warned}") == ""


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


def test_bars_are_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    bar = "import tqdm; list(tqdm.tqdm(range(3)))"
    assert said(bar) == ""
    monkeypatch.setenv("TQDM_DISABLE", "")
    assert "3/3" in said(bar)
