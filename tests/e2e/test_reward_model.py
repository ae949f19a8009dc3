"""Stage `reward_model` as a user runs it: nano preferences -> a classifier that tells good answers from bad ones."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import save_file

from r1mega.data import nano_general
from r1mega.data.nano_tokenizer import train_tokenizer
from r1mega.reward.preference import RewardModel
from tests.e2e.runs import metrics, r1mega, run_until_step, without_times
from tests.reference import DEEPSEEK, make_reference

LAYOUTS = os.environ.get("R1MEGA_REWARD_MODEL_LAYOUTS", "parallel.dp=2,parallel.tp=2").split(",")
"""parallel.pp=2 and parallel.cp=2 hold as well; a run each is what they cost."""
HF = DEEPSEEK | {"vocab_size": 448, "num_hidden_layers": 2, "hidden_size": 64, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A language model with random weights, the nano tokenizer, and preference files."""
    directory = tmp_path_factory.mktemp("rm")
    model = directory / "model"
    model.mkdir()
    state = make_reference(HF, seed=0, batch=1, length=4).state
    save_file({name: value.contiguous() for name, value in state.items()}, model / "model.safetensors")
    (model / "config.json").write_text(
        json.dumps(HF | {"architectures": ["DeepseekV3ForCausalLM"], "rope_interleave": True})
    )
    train_tokenizer(model)
    (directory / "data").mkdir()
    for split, count in (("train", 512), ("eval", 96)):
        nano_general.write_general(directory / "data", 0, count, split)
    return directory


def arguments(base, run_dir, kind="preference", *overrides):
    config = base / "config.yaml"
    config.write_text("stage: reward_model\nrun_dir: unset\nmodel: {path: unset}\ndata: {files: [unset]}\n")
    return [
        "train", config, f"run_dir={run_dir}", "threads=1", f"model.path={base / 'model'}", "model.dtype=float32",
        f"data.files=[{base / 'data' / f'{kind}_train.jsonl'}]",
        f"data.held_out=[{base / 'data' / f'{kind}_eval.jsonl'}]",
        "data.template=nano", "data.max_tokens=128", "microbatch_tokens=2048", "batch_size=64",
        f"objective={'pairwise' if kind == 'preference' else 'pointwise'}", "num_epochs=2", "optimizer.lr=0.003",
        "checkpoint.every_steps=4", "observe.tensorboard=false", *overrides,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(base):
    run_dir = base / "whole"
    r1mega(*arguments(base, run_dir), real=True)
    return run_dir


def test_it_learns_and_its_evaluation_says_what_about(whole_run):
    lines = metrics(whole_run)
    assert [line["step"] for line in lines] == list(range(1, 17))  # 2 epochs of 512 / 64
    assert lines[0]["preference/loss"] == pytest.approx(math.log(2), abs=0.2)
    last = lines[-1]
    assert last["preference/loss"] < lines[0]["preference/loss"] and last["eval/pairs"] == 96
    assert last["eval/accuracy"] > 0.6  # a word too many is beyond a model that has read 512 pairs; other flaws are not
    assert 0 <= last["eval/accuracy_shorter"] <= 1 and 0 <= last["eval/accuracy_longer"] <= 1
    assert -1 <= last["eval/length_correlation"] <= 1
    assert all("eval/accuracy" not in line for line in lines[:-1])


def test_the_export_scores_as_the_run_did(base, whole_run):
    """Held-out accuracy and loss of RUN_DIR/hf, asked the way a reward is, are the run's own."""
    from r1mega.reward.extract import final_text

    pairs = [json.loads(line) for line in (base / "data" / "preference_eval.jsonl").read_text().splitlines()]
    model = RewardModel(whole_run / "hf", batch_size=7, max_tokens=128)
    assert model.reader == {"template": "nano", "reads": "summary"}
    chosen, rejected = (
        torch.tensor(model.scores([(p["question"], final_text(p[key])) for p in pairs])).double()
        for key in ("chosen", "rejected")
    )
    last = metrics(whole_run)[-1]
    assert float((chosen > rejected).double().mean()) == pytest.approx(last["eval/accuracy"], abs=1e-9)
    assert float(torch.log1p(torch.exp(rejected - chosen)).mean()) == pytest.approx(last["eval/loss"], abs=1e-4)


def test_interrupted_run_equals_uninterrupted_bitwise(base, whole_run, tmp_path):
    run_dir = tmp_path / "run"
    assert run_until_step(6, run_dir, signal.SIGTERM, *arguments(base, run_dir)) == 85
    r1mega(*arguments(base, run_dir))
    assert without_times(metrics(run_dir)) == without_times(metrics(whole_run))
    assert (run_dir / "hf" / "model.safetensors").read_bytes() == (whole_run / "hf" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.replace("parallel.", ""))
def test_two_ranks_learn_the_same(base, whole_run, tmp_path, layout):
    run_dir = tmp_path / "run"
    r1mega(*arguments(base, run_dir, "preference", "num_epochs=1", layout), num_ranks=2)
    for mine, theirs in zip(metrics(run_dir)[:4], metrics(whole_run), strict=False):
        for name in ("preference/loss", "preference/accuracy", "policy/grad_norm", "tokens/update"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-3), (mine["step"], name)


def test_pointwise_safety(base, tmp_path):
    run_dir = tmp_path / "run"
    r1mega(*arguments(base, run_dir, "safety"))
    last = metrics(run_dir)[-1]
    assert last["eval/responses"] > 96 and last["eval/separation"] > 0.7 and "eval/accuracy_shorter" not in last
    assert RewardModel(run_dir / "hf", batch_size=4, max_tokens=128).reader["reads"] == "response"


def align(base, run_dir, model, *overrides, num_ranks=1):
    """Two steps of RL on general requests whose only teacher (but for the form) is the reward model."""
    config = base / "align.yaml"
    config.write_text("stage: align\nrun_dir: unset\nmodel: {path: unset}\ndata: {prompts: [unset]}\n")
    r1mega(
        "train", config, f"run_dir={run_dir}", "threads=1", "steps=2", f"model.path={base / 'model'}",
        "model.dtype=float32",
        f"data.prompts=[{base / 'data' / 'general_train.jsonl'}]", "data.template=nano", "data.max_prompt_tokens=32",
        "rollout.engine=transformers", "rollout.num_prompts=4", "rollout.group_size=4",
        "rollout.max_response_tokens=12",
        "update.num_minibatches=1", "update.microbatch_tokens=512", "optimizer.lr=0.0001", "observe.tensorboard=false",
        "reward.helpfulness.weight=1", f"reward.helpfulness.model={model}", *overrides, num_ranks=num_ranks,
    )  # fmt: skip
    return metrics(run_dir)


def test_rl_on_the_reward_model_whole_or_spread_over_ranks(base, whole_run, tmp_path):
    whole = align(base, tmp_path / "whole", whole_run / "hf", "reward.helpfulness.from_step=2")
    assert "reward/helpfulness" not in whole[0] and "reward/accuracy" not in whole[0]
    assert 0 < whole[1]["reward/helpfulness"] < 1 and whole[1]["reward/std"] > 0
    spread = align(
        base, tmp_path / "spread", whole_run / "hf", "reward.helpfulness.from_step=2",
        "reward.helpfulness.backend=megatron", "parallel.ep=2", num_ranks=2,
    )  # fmt: skip
    assert "reward/helpfulness" not in spread[0]
    assert spread[1]["reward/helpfulness"] == pytest.approx(whole[1]["reward/helpfulness"], abs=2e-3)
    assert spread[1]["reward/mean"] == pytest.approx(whole[1]["reward/mean"], abs=2e-3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "chosen": "a"}', "pairs.jsonl:2: 'rejected' is missing"),
        ('{"question": "q", "chosen": "a", "rejected": "a"}', "pairs.jsonl:2: 'chosen' and 'rejected' are the same"),
        ('{"question": "q", "chosen": "a", "rejected": "b", "margin": "big"}', "pairs.jsonl:2: 'margin' is 'big'"),
        ("{", "pairs.jsonl:2: not JSON"),
        (
            json.dumps({"question": "q", "chosen": "x " * 200, "rejected": "b"}),
            "pairs.jsonl:2: .* data.max_tokens is 128",
        ),
    ],
)
def test_bad_lines_are_named(base, tmp_path, line, message):
    from r1mega.config.stages.reward_model import RewardModelStage
    from r1mega.data.tokenizer import load_tokenizer
    from r1mega.errors import DataError
    from r1mega.stages.reward_model import load_samples

    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "q", "chosen": "a", "rejected": "b"}\n' + line + "\n")
    config = RewardModelStage(
        stage="reward_model", run_dir=tmp_path, model={"path": base / "model"},
        data={"files": [path], "template": "nano", "max_tokens": 128},
    )  # fmt: skip
    with pytest.raises(DataError, match=message):
        load_samples(config, load_tokenizer(base / "model"), config.data.files)


def test_unclear_margins_are_dropped_and_summaries_compared(base, tmp_path, caplog):
    from r1mega.config.stages.reward_model import RewardModelStage
    from r1mega.data.tokenizer import load_tokenizer
    from r1mega.stages.reward_model import load_samples

    path = tmp_path / "pairs.jsonl"
    records = [
        {"question": "q", "chosen": "a", "rejected": "b", "margin": 0.5},
        {"question": "q", "chosen": "a", "rejected": "c", "margin": 1.5},
        {"question": "q", "chosen": "a", "rejected": "d"},
        {"question": "q", "chosen": "<think> x </think> e", "rejected": "<think> y </think> e", "margin": 3},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = RewardModelStage(
        stage="reward_model", run_dir=tmp_path, model={"path": base / "model"}, margin="stated",
        data={"files": [path], "template": "nano", "min_margin": 1.0},
    )  # fmt: skip
    tokenizer = load_tokenizer(base / "model")
    samples = load_samples(config, tokenizer, config.data.files)
    assert [sample.target for sample in samples] == [1.5, 0.0]
    assert samples[0].sequences[0] == (*tokenizer.encode_prompt("User: q Assistant:"), *tokenizer.encode("a"), 2)
    assert "1 of 4 pairs have a margin below 1" in caplog.text and "1 pairs whose summaries are the same" in caplog.text


def test_layouts_and_lengths_that_cannot_work_are_refused_first(base, tmp_path):
    done = r1mega(*arguments(base, tmp_path / "run", "preference", "microbatch_tokens=200"), check=False)
    assert done.returncode == 2 and "2 * data.max_tokens = 256" in done.stdout
    assert not (tmp_path / "run" / "checkpoints").exists()
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
