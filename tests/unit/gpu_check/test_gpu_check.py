"""tools/gpu_check.py: every way in which a step can end, what is never counted as proven, and real steps on the CPU."""

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.utils._python_dispatch import TorchDispatchMode

import r1mega_kernels
from bench import exercise
from r1mega.gpu_check import inspect_kernels
from r1mega.gpu_check.environment import UNCORRECTED, _from_nvidia_smi
from r1mega.gpu_check.findings import Context, Findings
from r1mega.gpu_check.report import plain_table, summary
from r1mega.gpu_check.runner import ROOT, Plan, run_all, unpack
from r1mega.gpu_check.steps import STEPS, Step, select
from r1mega_kernels import library

pytestmark = pytest.mark.heavy

ODD = "tests.unit.gpu_check.odd_steps"


def step(function, name=None, limit=60, **further):
    return Step(name or function, f"proves {function}", f"{ODD}:{function}", 1, limit, **further)


def run(tmp_path, *steps, deadline=None):
    told = []
    results = run_all(Plan(steps, "cpu", tmp_path, deadline=deadline), told.append)
    assert told == results
    return {result.name: result for result in results}


def test_a_step_that_fails_in_any_way_does_not_stop_the_others(tmp_path):
    names = ("raises", "does_not_hold", "short_of_goal", "crashes", "crashes_at_its_end", "leaves", "fine")
    results = run(tmp_path, *map(step, names), step("hangs", limit=15), step("fine", "after"))
    assert {name: result.status for name, result in results.items()} == {
        "raises": "failed", "does_not_hold": "failed", "short_of_goal": "slow", "crashes": "failed",
        "crashes_at_its_end": "failed", "leaves": "failed", "hangs": "failed", "fine": "passed", "after": "passed",
    }  # fmt: skip
    assert results["raises"].reason == "RuntimeError: the third layer is upside down"
    assert 'raise RuntimeError("the third layer' in results["raises"].traceback
    assert results["raises"].figures == {"measured before": 1.0}
    assert "error is nan" in results["does_not_hold"].reason
    assert results["crashes"].reason == "its process ended by SIGSEGV; its process left no result"
    assert "measured before: 2.0" in results["crashes"].tail
    assert any("in crashes" in line for line in results["crashes"].tail)
    assert results["crashes_at_its_end"].reason == "its process ended by SIGSEGV"
    assert results["leaves"].reason == "its process ended with exit code 3; its process left no result"
    assert results["hangs"].reason == "it was ended after 15 s; its process left no result"
    assert "measured before: 7.0" in results["hangs"].tail and any("in hangs" in line for line in results["hangs"].tail)
    assert not _read(Path("/proc", (tmp_path / "child").read_text(), "cmdline"))  # a zombie has none
    assert summary(list(results.values())) == "2 passed, 1 slow, 6 failed, 0 skipped, 0 not run"
    assert "the goal is 0.9" in plain_table(list(results.values()))


def test_what_lacks_something_is_skipped_by_name(tmp_path):
    results = run(
        tmp_path, step("describes", "environment"), step("fine", "carve", needs=("wood",)),
        step("fine", "build", needs=("wood", "stone")), step("fine", "live in it", uses=("build",)),
        step("raises", "saw"), step("fine", "sit", uses=("saw",)), step("fine", "both", needs=("stone",), uses=("saw",)),
    )  # fmt: skip
    assert [(r.status, r.reason) for r in results.values() if r.name != "saw"] == [
        ("passed", ""), ("passed", ""), ("skipped", "no stone"), ("skipped", "step build was skipped"),
        ("skipped", "step saw was failed"), ("skipped", "no stone"),
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


def command(tmp_path, *arguments, python=sys.executable):
    return [python, ROOT / "tools" / "gpu_check.py", "--json", tmp_path / "found.json", *arguments]


def gpu_check(tmp_path, *arguments, **further):
    """(exit code, {name: step of the JSON}, what was printed), started from another directory."""
    done = subprocess.run(
        command(tmp_path, *arguments, **further), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900,
        check=False, cwd=tmp_path, env={n: v for n, v in os.environ.items() if n != "PYTHONPATH"},
    )  # fmt: skip
    path = tmp_path / "found.json"
    steps = {s["name"]: s for s in json.loads(path.read_text())["steps"]} if path.exists() else {}
    return done.returncode, steps, done.stdout


def bare_python(folder):
    """An interpreter that has torch (triton where it is here), megatron-core and pydantic with what these require: no
    Transformer Engine, no vLLM, no transformers, no rich."""
    venv.create(folder, symlinks=True, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    wanted, found = ["torch", "megatron-core", "pydantic"], {}
    wanted += ["triton"] * (importlib.util.find_spec("triton") is not None)
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            requirements = map(Requirement, found[name].requires or ())
            wanted += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    for distribution in found.values():
        for top in {Path(file).parts[0] for file in distribution.files} - {"..", "__pycache__", "/"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    return folder / "bin" / "python"


@pytest.mark.slow
def test_the_first_part_needs_torch_and_megatron_alone(tmp_path, monkeypatch):
    """From another directory, without a GPU to be seen: each step passes, or says what it lacks. (Of the steps of a policy
    one, for time: they import the same.)"""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, steps, printed = gpu_check(
        tmp_path, "--cpu", "--only", "kernels-fast,checkpoint,policy-fp8,gpu-tests,engine,rl,reshard",
        python=bare_python(tmp_path / "bare"),
    )  # fmt: skip
    assert code == 0, printed
    lacking = {name: s["reason"] for name, s in steps.items() if s["status"] == "skipped"}
    assert lacking == {
        "policy-fp8": "Transformer Engine needs a GPU; this device has no FP8",
        "gpu-tests": f"needs a GPU; {steps['environment']['figures']['abilities']['pytest']}",
        "engine": "no vllm", "rl": f"no vllm; {steps['environment']['figures']['abilities']['stages']}",
        "reshard": "no vllm",
    }  # fmt: skip
    passed = [name for name in steps if name not in lacking]
    assert [steps[name]["status"] for name in passed] == ["passed"] * len(passed)
    assert passed == [
        "environment", "limits", "kernels-build", "kernels-right", "kernels-fast", "reference", "checkpoint"
    ]  # fmt: skip
    states = {name: entry["state"] for name, entry in steps["environment"]["figures"]["libraries"].items()}
    assert states["megatron-core"] == "present" and states["transformer-engine"] == states["vllm"] == "missing"
    assert steps["checkpoint"]["figures"]["the checkpoint brings back: tensors compared"] > 100
    assert f"7 passed, 0 slow, 0 failed, {len(lacking)} skipped" in printed


def test_without_a_gpu_nothing_passes(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, steps, _ = gpu_check(tmp_path, "--only", "limits")
    assert code == 1
    assert steps["environment"]["status"] == "failed" and "--cpu" in steps["environment"]["reason"]
    assert steps["limits"]["status"] == "skipped" and "no CUDA device" in steps["limits"]["reason"]


@pytest.mark.parametrize("option", ["--json", "--work"])
def test_a_place_that_cannot_be_written_is_found_out_first(tmp_path, option):
    (tmp_path / "file").touch()
    code, steps, printed = gpu_check(tmp_path, "--cpu", option, tmp_path / "file" / "place")
    assert code == 2 and not steps and "cannot write" in printed and str(tmp_path / "file") in printed


def test_a_wheel_that_is_none_is_named(tmp_path):
    (tmp_path / "torch-1.0-py3-none-any.whl").write_text("<html>moved</html>")
    code, _, printed = gpu_check(tmp_path, "--cpu", "--packages", ".")
    assert code == 2 and "torch-1.0-py3-none-any.whl is no wheel" in printed


def test_what_ends_the_command_ends_the_step_and_keeps_the_results(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--cpu", "--only", "environment", "--work", tmp_path / "work"),
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "work" / "environment.log").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "0 passed" in printed
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["finished"] is False and record["steps"] == []
    place = str(tmp_path / "work").encode()
    assert not [found for found in Path("/proc").glob("[0-9]*/cmdline") if place in _read(found)]


def _read(path):
    try:
        return path.read_bytes()
    except OSError:  # ended meanwhile
        return b""


def test_what_nvidia_smi_says_of_each_device(tmp_path, monkeypatch):
    """A script in its place, which answers as it does (csv, noheader); it says so when its arguments are not as expected."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    told = [f"NVIDIA H100 80GB HBM3, 00000000:{n}:00.0, 580.65.06, 1980 MHz, 2619 MHz, 345 MHz, 31, 700.00 W, Enabled, {n}, Disabled"
            for n in (0, 2)]  # fmt: skip
    answer = "echo " + "; echo ".join(f"'{line}'" for line in told)
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\ncase "$*" in *--id=GPU-a,GPU-b*) {answer} ;; *) echo No devices; exit 6 ;; esac\n')
    script.chmod(0o755)
    found = _from_nvidia_smi(["GPU-a", "GPU-b"])
    assert [each["pci.bus_id"] for each in found] == ["00000000:0:00.0", "00000000:2:00.0"]
    assert [each[UNCORRECTED] for each in found] == ["0", "2"] and found[0]["power.limit"] == "700.00 W"
    assert _from_nvidia_smi(["GPU-c"]) == [{"driver_version": "unknown: nvidia-smi said No devices"}]
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert "No such file" in _from_nvidia_smi(["GPU-a"])[0]["driver_version"]


def test_kernels_that_are_not_in_use_fail(tmp_path, monkeypatch):
    """The torch reference is right too, but it is not what was to be shown."""
    monkeypatch.setenv("R1MEGA_KERNELS", "reference")
    results = run(tmp_path, Step("right", "", "r1mega.gpu_check.kernels:right", 1, 120))
    assert results["right"].status == "failed"
    assert results["right"].reason.startswith("the compiled library is in use: no (reference)")


def test_a_run_with_a_metric_that_is_not_finite_is_caught(tmp_path, caplog):
    """By what the run's own writer makes of it."""
    from r1mega.gpu_check.findings import Findings
    from r1mega.gpu_check.loop import TOLD, judge_run
    from r1mega.observe.metrics import MetricsWriter

    def judged(name, **wrong):
        caplog.clear()
        (tmp_path / name).mkdir()
        writer = MetricsWriter(tmp_path / name, tensorboard=False)
        for step in (1, 2):
            writer.write(step, dict.fromkeys(TOLD, 1e-6) | {"policy/loss": 0.5} | (wrong if step == 2 else {}))
        writer.close()
        findings = Findings()
        judge_run(findings, tmp_path / name, caplog.text, 2, 2e-5)
        return [failure.split(":")[0].split(" is ")[0] for failure in findings.failures]

    assert judged("good") == []
    assert judged("loss", **{"policy/loss": float("nan")}) == ["every metric"]
    agreement = "mean difference of trainer and sampler"
    assert judged("sampler", **{"logprob/diff_mean": float("inf")}) == ["every metric", agreement]
    assert judged("apart", **{"logprob/diff_mean": 3e-5}) == [agreement]


def test_what_compute_sanitizer_and_ncu_say(tmp_path, monkeypatch):
    """Stand-ins on PATH: one tool finds something, ncu's CSV comes after other lines; neither may be a pass by mistake.
    Nor may a sanitizer that checks no kernel at all."""
    listing = (
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Value"\n'
        '"0","r1mega::device::token_loss(r1mega::LossTensors, int)","dram__throughput.avg.pct_of_peak_sustained_elapsed","1,090.0"\n'
        '"1","r1mega::device::token_loss(r1mega::LossTensors, int)","dram__throughput.avg.pct_of_peak_sustained_elapsed","12.0"\n'
        '"2","void r1mega::device::log_prob_stats<r1mega::Bf16, (bool)1>(r1mega::device::RowSource, r1mega::RowStats *)",'
        '"sm__throughput.avg.pct_of_peak_sustained_elapsed","40.5"\n'
    )
    (tmp_path / "listing").write_text(listing)
    for name, script in {
        "compute-sanitizer": 'echo "seen: $* $PYTORCH_NO_CUDA_MEMORY_CACHING"; [ "$2" != racecheck ] || exit 9\n'
        f'case "$*" in *--fault) cat {tmp_path}/fault; exit 9;; esac',
        "ncu": f"cat {tmp_path}/listing",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found, context = Findings(), Context("cuda", tmp_path, {}, ())
    (tmp_path / "fault").write_text("========= Invalid __global__ read of size 16 bytes\n")
    inspect_kernels.sanitize(context, found)
    control = "memcheck finds the read out of bounds that is there"
    expected = {f"{check} finds nothing": check != "racecheck" for check in inspect_kernels.CHECKS}
    assert found.figures == expected | {control: True}
    assert len(found.failures) == 1 and "bench.exercise 1" in found.failures[0]
    (tmp_path / "fault").write_text("========= ERROR SUMMARY: 0 errors\n")
    unseen = Findings()
    inspect_kernels.sanitize(context, unseen)
    assert unseen.figures[control] is False and "0 errors" in unseen.failures[-1]
    inspect_kernels.profile(context, found)
    assert found.figures["token_loss: share of memory bandwidth, %"] == 1090 and len(found.failures) == 1
    assert found.figures["log_prob_stats: share of compute, %"] == 40.5
    (tmp_path / "listing").write_text("==ERROR== ERR_NVGPUCTRPERM")
    inspect_kernels.profile(context, found)
    assert "may not read the counters" in found.notes[0] and len(found.failures) == 1


def test_what_they_look_at_runs_every_operator():
    """On the CPU, where the same calls work."""
    if r1mega_kernels.backend("cpu") == "reference":
        pytest.skip("no compiled CPU kernels")
    called = set()

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            called.add(function.name().removeprefix("r1mega_kernels::"))
            return function(*arguments, **(options or {}))

    with Recorded():
        exercise.exercise(9, 70, torch.float32, "cpu")
    declared = {schema.split("(")[0] for schema in library._SCHEMAS}
    assert declared - called == {"instruction_set"}


def test_one_wrong_gradient_is_caught():
    import torch

    from r1mega.gpu_check.findings import Findings
    from r1mega.gpu_check.policy import EXACT, Case, Steps, compare
    from r1mega.gpu_check.policy import STEPS as NUMBER

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
