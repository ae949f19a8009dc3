"""SFT end to end: files, the held-out loss against transformers, resume, two ranks, a dense student from scratch."""

import json
import math
import random
import signal

import pytest
import torch

from r1mega.data import nano
from r1mega.data.sft import SFTDataset, held_out_indices
from tests.e2e.runs import metrics, r1mega, run_until_step, without_times


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Clean reasoning about fresh problems."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "lines.jsonl"
    records = [
        {
            "id": f"s{i}",
            "question": p.question,
            "response": nano.trace(p, rng, "search", p.language),
            "language": p.language,
        }
        for i, p in enumerate(nano.problems(5, 90, "train"))
    ]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return path


def arguments(base, lines, run_dir, *overrides, config="configs/nano/sft.yaml"):
    return (
        "train", config, f"run_dir={run_dir}", f"model.path={base}/hf", f"data.files=[{lines}]", "threads=1", "epochs=2",
        "batch_size=32", "held_out.share=0.1", "checkpoint.every_steps=2", "observe.tensorboard=false", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(nano_base, lines, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("sft") / "run"
    r1mega(*arguments(nano_base, lines, run_dir), real=True)
    return run_dir


def transformers_loss(hf, run_dir):
    """Mean nats a response token of the held-out samples, each alone in a batch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    dataset = SFTDataset(run_dir / "data/tokens.arrow")
    total = count = 0.0
    for index in held_out_indices(dataset.prompts(), 0.1, 1):
        ids, weights = (torch.tensor(part) for part in dataset.sample(index, 0.0))
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total, count = total - float((log_probs * weights[1:]).sum()), count + float(weights.sum())
    return total / count


def test_run_directory_and_held_out_loss(nano_base, whole_run):
    lines = metrics(whole_run)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert [line["step"] for line in lines if "train/held_out_loss" in line] == [3, 6]
    last = lines[-1]["train/held_out_loss"]
    assert last < 0.9 * transformers_loss(nano_base / "hf", whole_run)
    assert math.isclose(last, transformers_loss(whole_run / "hf", whole_run), abs_tol=1e-4)
    samples = [json.loads(line) for line in (whole_run / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 3, 6}
    assert all("</answer>" in s["response"] and s["parts"]["loss"] > 0 for s in samples)


@pytest.mark.parametrize(("sent", "step", "code"), [(signal.SIGKILL, 3, -9), (signal.SIGTERM, 1, 85)])
def test_interrupted_run_equals_uninterrupted_bitwise(nano_base, lines, whole_run, tmp_path, sent, step, code):
    run = arguments(nano_base, lines, tmp_path / "run")
    assert run_until_step(step, tmp_path / "run", sent, *run) == code
    r1mega(*run)
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(whole_run))
    assert (tmp_path / "run/samples.jsonl").read_text() == (whole_run / "samples.jsonl").read_text()
    assert (tmp_path / "run/hf/model.safetensors").read_bytes() == (whole_run / "hf/model.safetensors").read_bytes()


def test_two_ranks_equal_one(nano_base, lines, whole_run, tmp_path):
    r1mega(*arguments(nano_base, lines, tmp_path / "run"), num_ranks=2, real=True)
    for one, two in zip(metrics(whole_run), metrics(tmp_path / "run"), strict=True):
        for name in ("train/loss", "policy/grad_norm", "train/held_out_loss"):
            assert (name in one) == (name in two)
            assert name not in one or math.isclose(one[name], two[name], rel_tol=1e-4), (name, one, two)


def test_dense_student_from_scratch(nano_base, lines, tmp_path):
    run_dir = tmp_path / "run"
    extra = ("model.path=configs/nano/student", f"tokenizer={nano_base}/hf")
    r1mega(*arguments(nano_base, lines, run_dir, *extra, config="configs/nano/distill.yaml"))
    assert math.isclose(
        metrics(run_dir)[-1]["train/held_out_loss"], transformers_loss(run_dir / "hf", run_dir), abs_tol=1e-4
    )
    assert metrics(run_dir)[-1]["train/loss"] < metrics(run_dir)[0]["train/loss"]
    done = r1mega(
        "generate", run_dir, "which of a 5 b 0 c 9 d 3 makes ? +4 +3 = 10", "--template", "nano", "--max-tokens", 8
    )
    assert done.stdout.strip()
