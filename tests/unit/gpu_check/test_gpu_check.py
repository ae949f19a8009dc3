"""tools/gpu_check.py: every way in which a step can end, what is never counted as proven, and real steps on the CPU."""

import json
import subprocess
import sys
import time
import zipfile

import pytest

from r1mega.gpu_check.report import plain_table, summary
from r1mega.gpu_check.runner import Plan, run_all, unpack
from r1mega.gpu_check.steps import STEPS, Step, select

ODD = "tests.unit.gpu_check.odd_steps"


def step(function, name=None, limit=60, **further):
    return Step(name or function, f"proves {function}", f"{ODD}:{function}", 1, limit, **further)


def run(tmp_path, *steps, deadline=None):
    told = []
    results = run_all(Plan(steps, "cpu", tmp_path, deadline=deadline), told.append)
    assert told == results
    return {result.name: result for result in results}


def test_a_step_that_fails_in_any_way_does_not_stop_the_others(tmp_path):
    names = ("raises", "does_not_hold", "short_of_goal", "crashes", "fine")
    results = run(tmp_path, *map(step, names), step("hangs", limit=15), step("fine", "after"))
    assert {name: result.status for name, result in results.items()} == {
        "raises": "failed", "does_not_hold": "failed", "short_of_goal": "slow", "crashes": "failed", "hangs": "failed",
        "fine": "passed", "after": "passed",
    }  # fmt: skip
    assert results["raises"].reason == "RuntimeError: the third layer is upside down"
    assert 'raise RuntimeError("the third layer' in results["raises"].traceback
    assert results["raises"].figures == {"measured before": 1.0}
    assert "error is nan" in results["does_not_hold"].reason
    assert "SIGSEGV" in results["crashes"].reason
    assert results["hangs"].reason == "it was ended after 15 s" and "about to hang" in results["hangs"].tail
    assert summary(list(results.values())) == "2 passed, 1 slow, 4 failed, 0 skipped, 0 not run"
    assert "the goal is 0.9" in plain_table(list(results.values()))


def test_what_lacks_something_is_skipped_by_name(tmp_path):
    results = run(
        tmp_path, step("describes", "environment"), step("fine", "carve", needs=("wood",)),
        step("fine", "build", needs=("wood", "stone")), step("fine", "live in it", uses=("build",)),
        step("raises", "saw"), step("fine", "sit", uses=("saw",)),
    )  # fmt: skip
    assert [(r.status, r.reason) for r in results.values() if r.name != "saw"] == [
        ("passed", ""), ("passed", ""), ("skipped", "no stone"), ("skipped", "step build was skipped"),
        ("skipped", "step saw was failed"),
    ]  # fmt: skip


def test_what_does_not_fit_is_not_run(tmp_path):
    results = run(tmp_path, step("fine"), step("fine", "late"), deadline=time.monotonic() - 1)
    assert {result.status for result in results.values()} == {"not run"}
    results = run(tmp_path, step("hangs", limit=600), step("fine", "late"), deadline=time.monotonic() + 4)
    assert results["hangs"].status == "failed" and results["late"].status == "not run"


def test_selected_steps_bring_those_they_use():
    assert [s.name for s in select(("policy-bf16",), ())] == [
        "environment", "kernels-build", "kernels-right", "reference", "policy-bf16"
    ]  # fmt: skip
    assert [s.name for s in select((), ())] == [s.name for s in STEPS]
    with pytest.raises(ValueError, match="no step is called polcy; there are environment"):
        select(("polcy",), ())


def test_every_step_comes_after_those_it_uses():
    names = [s.name for s in STEPS]
    for place, each in enumerate(STEPS):
        assert set(each.uses) <= set(names[:place]), each.name


def test_wheels_are_unpacked(tmp_path):
    folder, target = tmp_path / "packages", tmp_path / "work"
    folder.mkdir()
    with zipfile.ZipFile(folder / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "VALUE = 7")
    path = unpack([folder], target)
    assert (path[0] / "carried" / "__init__.py").exists() and path[1] == folder
    with pytest.raises(ValueError, match="no such folder"):
        unpack([tmp_path / "none"], target)


def gpu_check(tmp_path, *arguments):
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py", *arguments, "--json", str(tmp_path / "found.json")], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500, check=False,
    )  # fmt: skip
    path = tmp_path / "found.json"
    return done.returncode, {s["name"]: s for s in json.loads(path.read_text())["steps"]} if path.exists() else done.stdout


def test_real_steps_on_the_cpu(tmp_path):
    code, steps = gpu_check(tmp_path, "--cpu", "--only", "policy-fp32")
    assert {name: s["status"] for name, s in steps.items()} == dict.fromkeys(
        ("environment", "kernels-build", "kernels-right", "reference", "policy-fp32"), "passed"
    ), [s["reason"] for s in steps.values()]
    assert code == 0
    assert steps["environment"]["figures"]["libraries"]["megatron-core"]["state"] == "present"
    assert 0 < steps["policy-fp32"]["figures"]["float32 hidden, step 1: gradients"] < 1e-5


def test_without_a_gpu_nothing_passes(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, steps = gpu_check(tmp_path, "--only", "limits")
    assert code == 1
    assert steps["environment"]["status"] == "failed" and "--cpu" in steps["environment"]["reason"]
    assert steps["limits"]["status"] == "skipped" and "no CUDA device" in steps["limits"]["reason"]


def test_kernels_that_are_not_in_use_fail(tmp_path, monkeypatch):
    """The torch reference is right too, but it is not what was to be shown."""
    monkeypatch.setenv("R1MEGA_KERNELS", "reference")
    results = run(tmp_path, Step("right", "", "r1mega.gpu_check.kernels:right", 1, 120))
    assert results["right"].status == "failed"
    assert results["right"].reason.startswith("the compiled library is in use: no (reference)")


def test_one_wrong_gradient_is_caught():
    import torch

    from r1mega.gpu_check.findings import Findings
    from r1mega.gpu_check.policy import EXACT, STEPS as NUMBER, Case, Steps, compare

    state = {name: torch.randn(8, 8) for name in "abc"}
    gradients = {name: torch.randn(8, 8) for name in "abc"}
    after = {name: value + 0.1 for name, value in state.items()}
    good = Steps([[torch.zeros(3)]] * NUMBER, [1.0] * NUMBER, [1.0] * NUMBER, [gradients] * NUMBER, after)
    findings = Findings()
    compare(findings, Case(), state, good, good, EXACT)
    assert not findings.failures
    swapped = gradients | {"b": gradients["b"].flip(0)}
    bad = Steps(good.log_probs, good.losses, good.norms, [gradients, swapped], after)
    compare(findings, Case(), state, good, bad, EXACT)
    assert [failure.split(" is ")[0] for failure in findings.failures] == [
        "float32 logits, step 2: gradients", "float32 logits, step 2: worst gradient"
    ]  # fmt: skip
    assert findings.figures["float32 logits, step 2: worst gradient is of"] == "b"
