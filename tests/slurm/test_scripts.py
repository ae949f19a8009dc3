"""What the launch scripts make of their arguments and variables; no Slurm is needed for that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "zero", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_ON_NODE": "96"}


def bash(*command, cwd=REPOSITORY, **variables):
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "R1MEGA_"))}
    done = subprocess.run(
        ["bash", *command], cwd=cwd, env=outside | variables, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "runs"),
    [
        ("stage2", [], ["configs/nano/reasoning_rl.yaml"]),
        ("stage2", ["seed=2", "run_dir=a b"], ["configs/nano/reasoning_rl.yaml seed=2 run_dir=a b"]),
        ("stage2", ["configs/nano/zero.yaml", "seed=2"], ["configs/nano/zero.yaml seed=2"]),
        ("stage2", ["missing.yaml"], ["missing.yaml"]),
        ("stage1", [], ["configs/nano/cold_start.yaml", "configs/nano/cold_start_sft.yaml"]),
        ("stage3", ["seed=2"], ["configs/nano/rejection_sampling.yaml seed=2", "configs/nano/sft.yaml seed=2"]),
        ("stage4", ["configs/nano/align.yaml"], ["configs/nano/align.yaml"]),
    ],
)
def test_config_and_overrides_are_optional(script, arguments, runs):
    code, lines, errors = bash(f"launch/{script}.sh", *arguments, R1MEGA_PYTHON="echo")
    assert (code, lines) == (0, [f"-m r1mega train {run}" for run in runs]), errors
    for run in runs[:-1]:
        assert (REPOSITORY / run.split()[0]).is_file()


@pytest.mark.parametrize("script", sorted((REPOSITORY / "launch").glob("*.sh")), ids=lambda path: path.stem)
def test_what_is_submitted_has_its_machines_whole_and_may_come_back(script):
    """Also their memory: a cluster's default is a share a processor, which ends a job that reads a model."""
    header = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    wanted = {"--exclusive", "--mem=0", "--requeue", "--signal=B:USR1@600", "--open-mode=append"}
    assert not header or wanted <= set(header)
    assert header or script.stem in ("common", "install_cuda", "quickstart", "slurm", "test")


def test_a_stage_that_fails_ends_the_script_with_its_code():
    code, lines, _ = bash("launch/stage1.sh", R1MEGA_PYTHON="false")
    assert (code, lines) == (1, [])


def test_from_elsewhere_it_says_so(tmp_path):
    code, _, errors = bash(REPOSITORY / "launch" / "stage2.sh", cwd=tmp_path, SLURM_SUBMIT_DIR=str(tmp_path))
    assert code == 2 and f"{tmp_path}/launch/slurm.sh: No such file" in errors
    code, lines, _ = bash(REPOSITORY / "launch" / "stage2.sh", cwd=tmp_path, R1MEGA_PYTHON="echo")
    assert (code, len(lines)) == (0, 1), "without Slurm the script finds its repository by itself"


def test_a_dry_run_of_the_recipe_submits_nothing(tmp_path):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\ntouch $0.called\necho 1\n")
    sbatch.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    arguments = ["launch/pipeline.sh", "r1.yaml", "--until", "zero"]
    code, lines, _ = bash(*arguments, "--dry-run", R1MEGA_PYTHON="echo", PATH=path)
    assert (code, lines) == (0, ["-m r1mega pipeline r1.yaml --until zero --dry-run"])
    assert not Path(f"{sbatch}.called").exists()
    logs = {"R1MEGA_LOGS": str(tmp_path / "logs")}
    code, lines, errors = bash(*arguments, R1MEGA_PYTHON=str(_plan(tmp_path)), PATH=path, **logs)
    assert (code, lines) == (0, ["zero: job 1"]), errors
    assert Path(f"{sbatch}.called").exists()


def test_each_job_of_a_recipe_has_the_spare_machines(tmp_path):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$*" > $0.called\necho 1\n')
    sbatch.chmod(0o755)
    variables = {
        "R1MEGA_PYTHON": str(_plan(tmp_path)),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "R1MEGA_LOGS": str(tmp_path),
    }
    for spare, asked in (("0", "--nodes=1 "), ("2", "--nodes=3 ")):
        code, _, errors = bash("launch/pipeline.sh", "r1.yaml", R1MEGA_SPARE_NODES=spare, **variables)
        said = Path(f"{sbatch}.called").read_text()
        assert code == 0 and asked in said and (" --no-kill " in said) == (spare == "2"), errors + said


def _plan(directory):
    """A program that lists one job, whatever it is asked."""
    program = directory / "plan"
    program.write_text("#!/bin/sh\nprintf 'zero\\t1\\t8\\t-\\n'\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("variables", "end", "python"),
    [
        ({}, "--cpus-per-task=12 --cpu-bind=none", "/opt/python"),
        ({"R1MEGA_SRUN": "--mpi=none"}, "--cpus-per-task=12 --cpu-bind=none --mpi=none", "/opt/python"),
        ({"R1MEGA_CONTAINER": "/images/r1.sif", "R1MEGA_MOUNTS": "/data:/data"},
         f"apptainer exec --nv --bind {REPOSITORY},/data:/data --pwd {REPOSITORY} /images/r1.sif", "python"),
        ({"R1MEGA_CONTAINER": "registry/r1:1", "R1MEGA_CONTAINER_PYTHON": "python3.11"},
         f"--container-image=registry/r1:1 --container-workdir={REPOSITORY} --container-mounts={REPOSITORY}:{REPOSITORY} "
         "--no-container-mount-home --container-env=PYTHONPATH,PYTHONUNBUFFERED,PYTHONFAULTHANDLER,OMP_NUM_THREADS,MASTER_ADDR,"
         "MASTER_PORT,NCCL_DEBUG,NCCL_SOCKET_IFNAME,GLOO_SOCKET_IFNAME,TORCH_NCCL_ASYNC_ERROR_HANDLING,"
         "CUDA_DEVICE_MAX_CONNECTIONS,R1MEGA_SAY_RUN_DIR",
         "python3.11"),
        ({"R1MEGA_CONTAINER": "/images/r1.sif", "R1MEGA_LOGS": "/logs"},
         f"apptainer exec --nv --bind {REPOSITORY},/logs/zero-7:/logs/zero-7 --pwd {REPOSITORY} /images/r1.sif", "python"),
    ],
    ids=["plain", "options", "apptainer", "enroot", "logs elsewhere"],
)  # fmt: skip
def test_what_stands_before_a_rank(variables, end, python):
    show = "source launch/slurm.sh; rank_launcher; echo $RANK_PYTHON"
    code, lines, errors = bash("-c", show, R1MEGA_PYTHON="/opt/python", **JOB, **variables)
    assert (code, len(lines), lines[-1]) == (0, 2, python), errors
    assert lines[0].startswith("srun --kill-on-bad-exit=1 ") and lines[0].endswith(end)
    assert f"--output={variables.get('R1MEGA_LOGS', f'{REPOSITORY}/logs')}/zero-7/rank-%t.log" in lines[0]


def run_test_script(tmp_path, *arguments, failing="none"):
    """(code, what each run was given, errors) with a set-up that does nothing and a Python that ends as it is told."""
    (tmp_path / "test.sh").write_text((REPOSITORY / "launch/test.sh").read_text())
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\necho "ran $*"; [[ "$*" != *{failing} ]]\n')
    python.chmod(0o755)
    (tmp_path / "common.sh").write_text(
        f"set -euo pipefail\nPYTHON={python}\napt_install() {{ :; }}\nset_up() {{ :; }}\nfind_python() {{ echo python; }}\ntransformer_engine_files() {{ :; }}\n"
    )
    code, lines, errors = bash(str(tmp_path / "test.sh"), *arguments)
    return code, [line.split()[1:] for line in lines if line.startswith("ran ")], errors


def files_of(run):
    """The files of tests that pytest finds with these arguments."""
    left_out = {
        file for word in run if word.startswith("--ignore=") for file in files_in(word.removeprefix("--ignore="))
    }
    return [file for word in run if word.startswith("tests/") for file in files_in(word) if file not in left_out]


def files_in(place):
    path = REPOSITORY / place
    return [path] if path.is_file() else sorted(path.rglob("test_*.py"))


@pytest.mark.parametrize(("failing", "code"), [("none", 0), ("tests/e2e", 1), ("tests/gpu", 1)])
def test_the_tests_fail_when_one_of_the_runs_does(tmp_path, failing, code):
    """What all of them print is there: every file of tests, once."""
    ended, runs, errors = run_test_script(tmp_path, failing=failing)
    assert ended == code, errors
    assert sorted(file for run in runs for file in files_of(run)) == files_in("tests")


def test_those_of_the_other_megatron_are_there_and_none_is_run_twice(tmp_path):
    code, runs, errors = run_test_script(tmp_path, "--megatron", "0.19")
    assert (code, len(runs)) == (0, 2), errors
    named = [file for run in runs for file in files_of(run)]
    assert len(named) == len(set(named)) > 20 and all(file.is_file() for file in named)


@pytest.mark.parametrize(("failing", "code"), [("none", 0), ("tests/unit/model", 1)])
def test_both_are_everything_and_what_the_other_megatron_runs(tmp_path, failing, code):
    ended, runs, errors = run_test_script(tmp_path, "--both", failing=failing)
    assert ended == code, errors
    apart = [run for given in ([], ["--megatron", "0.19"]) for run in run_test_script(tmp_path, *given)[1]]
    assert sorted(runs) == sorted(apart)


def test_the_fast_tests_are_two_runs_with_every_folder_in_one_of_them(tmp_path):
    code, runs, errors = run_test_script(tmp_path, "--fast")
    assert (code, len(runs)) == (0, 2), errors
    named, rest = sorted(runs, key=lambda run: "tests/unit" in run)
    folders = [word for word in named if word.startswith("tests/")]
    assert all((REPOSITORY / folder).is_dir() for folder in folders)
    assert [word.removeprefix("--ignore=") for word in rest if word.startswith("--ignore")] == folders


@pytest.mark.parametrize(
    ("given", "wanted", "found"), [("3.12", "3.12", True), ("3.11", "", True), ("3.13", "", False)]
)
def test_an_interpreter_is_taken_by_its_version_only(tmp_path, given, wanted, found):
    """The lock file has another megatron-core for 3.11 than for 3.12."""
    python = tmp_path / "python"
    python.write_text(f"#!/usr/bin/env bash\necho {given}\n")
    python.chmod(0o755)
    others = {"PATH": "/usr/bin:/bin", "PYENV_ROOT": str(tmp_path), "R1MEGA_PYTHON": str(python)}
    _, lines, _ = bash("-c", f"source launch/common.sh; find_python {wanted}", **others)
    assert (lines == [str(python)]) == found
    _, lines, _ = bash("-c", "source launch/common.sh; find_python 3.12", **others)
    assert (lines == [str(python)]) == (given == "3.12")


def test_a_wrong_interpreter_is_named_also_where_no_other_is_found(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 3.13\n")
    python.chmod(0o755)
    wrong = {"R1MEGA_PYTHON": str(python), "PYENV_ROOT": str(tmp_path)}
    for found in ("", "/bin/false"):
        show = f"source launch/common.sh; find_python() {{ echo {found}; }}; make_venv {tmp_path / 'venv'}"
        code, lines, errors = bash("-c", show, **wrong)
        assert code == 1 and f"R1MEGA_PYTHON={python} is no Python 3.11 or 3.12" in lines[0], (lines, errors)


def test_packages_are_compiled_without_a_word(tmp_path):
    """What warns, and what is for another Python, among them."""
    sources = {"warns": "x = 1 is 1\n", "other": "def f(:\n", "plain": "x = 1\n"}
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    python = f'python() {{ if [ "$1" = -c ]; then echo {tmp_path}; else {sys.executable} "$@"; fi; }}; PYTHON=python'
    assert bash("-c", f"source launch/common.sh; {python}; compile_packages") == (0, [], "")
    assert sorted(file.name.split(".")[0] for file in tmp_path.rglob("*.pyc")) == ["plain", "warns"]


@pytest.mark.parametrize(
    ("failing", "code", "tested"),
    [
        ("none", 0, 1),
        ("--set-up", 3, 0),
        ("--megatron 0.19 --set-up", 1, 1),
        ("format --check", 1, 1),
        ("--both", 3, 1),
    ],
)
def test_continuous_integration_fails_when_a_part_does(tmp_path, failing, code, tested):
    """The tests run all the same, and what every part printed is there, but without packages nothing can."""
    part = f'#!/bin/sh\necho "ran $*"; [ "$*" != "{failing}" ] || exit 3\n'
    for name in (".ci/run", "launch/test.sh", ".venv/bin/ruff", ".venv/bin/mypy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((REPOSITORY / name).read_text() if name == ".ci/run" else part)
        (tmp_path / name).chmod(0o755)
    ended, lines, errors = bash(str(tmp_path / ".ci/run"))
    assert ended == code, errors
    packages = "ran --megatron 0.19 --set-up"
    assert (lines.count(packages), lines.count("ran --both")) == (tested, tested)
    assert not tested or lines.index(packages) < lines.index("ran --both")
