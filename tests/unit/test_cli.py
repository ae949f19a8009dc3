"""The command as a user meets it: exit codes, messages without tracebacks, nothing written by a run that cannot start."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from r1mega.checkpoint.parameters import parameters
from tests import processes

pytestmark = pytest.mark.heavy

ZERO = "configs/nano/zero.yaml"
QUESTIONS = [f"What is {a} plus {b}?" for a in range(30) for b in range(30)]


def r1mega(*arguments, stdin="", real=False, **environment):
    variables = {**os.environ, "PYTHONPATH": f".{os.pathsep}kernels", "COLUMNS": "120", **environment}
    return processes.run(*arguments, separate=True, stdin=stdin, variables=variables, real=real)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory with a real tokenizer; its weights are an empty file, which nothing here gets to read."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(Path("configs/nano/model/config.json").read_text())
    (directory / "model.safetensors").touch()
    (directory / "corpus.txt").write_text("\n".join(QUESTIONS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"), model_prefix=str(directory / "tokenizer"), vocab_size=64,
        model_type="bpe", minloglevel=2, num_threads=1,
    )  # fmt: skip
    return directory


@pytest.fixture
def train(model, tmp_path):
    """Starts `r1mega train` on the nano zero config with the given lines as prompts, and overrides."""

    def start(*overrides, lines=({"question": QUESTIONS[0], "answer": "0"},), **environment):
        data = tmp_path / "prompts.jsonl"
        data.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return r1mega(
            "train", ZERO, f"model.path={model}", f"data.prompts=[{data}]", f"evaluate.data={data}",
            f"run_dir={tmp_path}/run", *overrides, **environment,
        )  # fmt: skip

    return start


@pytest.mark.parametrize(
    ("overrides", "lines", "code", "message"),
    [
        (["rollout.temprature=1"], None, 2, r"unknown key rollout\.temprature; did you mean rollout\.temperature\?"),
        (["stage=zer0"], None, 2, "must be one of base, zero"),
        (["parallel.tp=3"], None, 2, r"parallel\.tp = 3 does not divide the model's num_attention_heads = 4; 2 would"),
        (["model.path=nowhere"], None, 2, "config.json is missing"),
        ([f"model.path={__file__}"], None, 2, "config.json is missing"),
        (["data.prompts=[gone.jsonl]"], None, 2, "gone.jsonl is missing"),
        ([f"run_dir={__file__}/run"], None, 2, r"run_dir .*cannot be made \(.*test_cli\.py is a file\)"),
        (["model.fp8=blockwise"], None, 6, r"needs Transformer Engine.*set model\.fp8=off"),
        ([], ["{broken"], 3, r"prompts\.jsonl:1: not JSON.*data\.on_bad_line=skip"),
        ([], [{"question": "q", "answer": True}], 3, r"prompts\.jsonl:1: 'answer' is true"),
        ([], [{"question": " ".join(QUESTIONS), "answer": "5"}], 3, r"prompts\.jsonl:1: the prompt has \d+ tokens"),
    ],
)
def test_a_run_that_cannot_start_says_why_and_writes_nothing(train, tmp_path, overrides, lines, code, message):
    done = train(*overrides, **({"lines": lines} if lines else {}))
    assert done.returncode == code, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_model_that_the_generator_has_no_kernel_for(train, model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads((model / "config.json").read_text()) | {"kv_lora_rank": 256}
    (other / "config.json").write_text(json.dumps(content))
    (other / "model.safetensors").touch()
    (other / "tokenizer.model").write_bytes((model / "tokenizer.model").read_bytes())
    done = train(f"model.path={other}")
    assert done.returncode == 2
    assert "kv_lora_rank=512" in done.stderr
    assert "set rollout.engine=transformers" in done.stderr


@pytest.mark.parametrize(
    ("changed", "weights", "code", "message"),
    [
        ([1], {}, 2, r"config\.json: not the config\.json of an HF model"),
        ({"model_type": "gpt2"}, {}, 2, r"model_type 'gpt2' is not one of "),
        ({"rope_interleave": False}, None, 2, r"config\.json: rope_interleave = False is not supported"),
        ({}, {"model.embed_tokens.weight": (448, 64)}, 4,
         r"shape: model\.embed_tokens\.weight is \[448, 64\], config\.json asks for \[448, 128\]"),
        ({}, {"model.embed_tokens.weight": (448, 128), "transformer.wte.weight": (4, 4)}, 4, r"unknown: transformer\.wte"),
    ],
    ids=["no_object", "other_family", "not_covered", "shapes", "names"],
)  # fmt: skip
def test_a_model_that_cannot_be_trained_is_refused_before_anything_starts(
    train, model, tmp_path, changed, weights, code, message
):
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads((model / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(content | changed if isinstance(changed, dict) else changed))
    (other / "tokenizer.model").write_bytes((model / "tokenizer.model").read_bytes())
    save_file({name: torch.zeros(shape) for name, shape in (weights or {}).items()}, other / "model.safetensors")
    if weights is None:  # of the right model
        shapes = {n: s for p in parameters(content) for n, s in zip(p.entry.hf_names, p.entry.hf_shapes, strict=True)}
        save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, other / "model.safetensors")
    done = train(f"model.path={other}")
    assert done.returncode == code, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_all_ranks_find_the_first_tells_and_another_only_where_none_ends_it(train):
    """Were another silent and quicker, its launcher would end the first before that one has told."""
    first, second = (train("rollout.tp=0", RANK=rank, WORLD_SIZE="2") for rank in "01")
    assert first.returncode == second.returncode == 2
    assert "rollout.tp = 0" in first.stderr
    assert second.stderr == first.stderr


def test_local_ranks_tell_once(train):
    done = train("rollout.tp=0", "--ranks", "2")
    assert done.returncode == 2
    assert done.stderr.count("rollout.tp") == 1, done.stderr
    assert "ended first" not in done.stderr, "it is told before any rank is started"


def test_asked_to_stop_before_anything_has_begun_it_asks_to_be_started_again(model, tmp_path):
    """The signal comes while libraries load: nothing to save, nothing lost, exit code 85."""
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"question": QUESTIONS[0], "answer": "0"}))
    process = subprocess.Popen(
        [sys.executable, "-m", "r1mega", "train", ZERO, f"model.path={model}", f"data.prompts=[{data}]",
         f"evaluate.data={data}", f"run_dir={tmp_path}/run"],
        env={**os.environ, "PYTHONPATH": f".{os.pathsep}kernels"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    limit = time.monotonic() + 60
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and time.monotonic() < limit:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 85
    assert not (tmp_path / "run").exists()


def test_traceback_on_request(train):
    done = train("seed=x", R1MEGA_TRACEBACK="1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_missing_run_and_checkpoint(tmp_path):
    report, checkpoint = r1mega("report", tmp_path / "none"), r1mega("eval", tmp_path / "none", "x.jsonl")
    assert (report.returncode, checkpoint.returncode) == (3, 4)
    assert "no such" in report.stderr
    assert "no such directory" in checkpoint.stderr


def test_reward_math_scores_lines_in_order():
    pairs = [("1/2", r"so \boxed{0.5}"), ("3", "<answer>4</answer>"), ("x^2-1", r"\boxed{(x-1)(x+1)}")]
    lines = "".join(json.dumps({"gold": g, "prediction": p}) + "\n" for g, p in pairs)
    done = r1mega("reward", "math", stdin=lines, real=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["value"] for line in done.stdout.splitlines()] == [1.0, 0.0, 1.0]
    broken = r1mega("reward", "math", stdin='{"gold"\n')
    assert broken.returncode == 3
    assert "<stdin>:1: not JSON" in broken.stderr


def test_doctor_tells_machine_and_config(model, tmp_path):
    done = r1mega("doctor", "configs/nano/base.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "torch",
        "GPU",
        "megatron-core",
        "vllm",
        "Transformer Engine",
        "apex",
        "kernels",
        "bwrap",
        "MPI",
        "Slurm",
        "cores",
    ):
        assert re.search(rf"│ {re.escape(name)} ", done.stdout), name
    assert "this config can run here" in done.stdout
    broken = r1mega("doctor", ZERO, f"model.path={model}", f"data.prompts=[{tmp_path}/gone]", "model.fp8=blockwise")
    assert broken.returncode == 2
    assert "cannot run here" in broken.stdout
    assert "gone is missing" in broken.stdout


def test_doctor_lists_the_changes_made_to_megatron():
    from r1mega.platform.megatron_patches import PATCHES, installed_version

    done = r1mega("doctor", "--patches", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in done.stdout.splitlines() if "│" in line]
    for patch in PATCHES:
        here = "yes" if patch.is_for(installed_version()) else "-"
        assert [here, patch.module, patch.versions or "all"] in rows


def test_doctor_survives_a_machine_without_any_tool(tmp_path):
    done = r1mega("doctor", PATH=str(tmp_path), real=True)
    assert done.returncode == 0, done.stderr
    for name, text in (("bwrap", "missing"), (r"g\+\+", "missing"), ("nvcc", "missing"), ("Slurm", "no srun")):
        assert re.search(rf"│ {name} +│ no  │ {text}", done.stdout), done.stdout


def test_help_is_quick_because_it_imports_nothing_heavy():
    done = r1mega("--help", real=True)
    assert done.returncode == 0
    code = "import sys, r1mega.cli; print(*({'torch', 'transformers', 'vllm', 'megatron', 'sympy', 'pydantic'} & set(sys.modules)))"
    begun = time.process_time()
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == "", imported.stdout
    assert time.process_time() - begun < 1


def test_doctor_looks_at_a_cluster_that_is_not_there():
    done = r1mega("doctor", "configs/deepseek_v3_671b/zero.yaml", "rollout.tp=1", "--gpus", "512", COLUMNS="200")
    assert "512 processes: tp 4, pp 16, cp 1, dp 8" in done.stdout and "1,342.1 GB a GPU" in done.stdout


def test_plan_tells_every_phase_and_whether_it_fits():
    plan = ["plan", "configs/nano/zero.yaml", "model.path=configs/nano/model", "--gpus", "2"]
    done = r1mega(*plan)
    assert done.returncode == 0, done.stderr
    phases = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("fits")]
    assert phases == ["rollout", "logprob", "reference", "update", "step", "reshard", "save", "verdict"]
    assert "seconds " in done.stdout and "GB a checkpoint" in done.stdout
    refused = r1mega(*plan, "--gpu", "h101")
    assert refused.returncode == 2 and "h100-80" in refused.stderr
