"""The data stages end to end: cold_start -> sft -> rejection_sampling, killed in the middle and gone on with two ranks."""

import json
import re
import shutil

import pytest
import yaml

from tests.e2e.runs import kill_when, metrics, r1mega


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_right(line):
    """By reading question and answer, without the reward."""
    listed, operands = re.fullmatch(
        r"(?:which of|哪个 之中) ([a-d\d ]+?) (?:makes|使) \? ([+\-\d ]+) = 10", line["question"]
    ).groups()
    answer = re.fullmatch(r"<think> .* </think> <answer> (\d+) </answer>", line["response"])[1]
    return answer in listed.split()[1::2] and int(answer) + sum(map(int, operands.split())) == 10


def small(run_dir, base, config, *overrides):
    return (
        "train", f"configs/nano/{config}.yaml", f"run_dir={run_dir}", f"data.prompts=[{base}/data/train.jsonl]", "threads=1",
        f"decontaminate.files=[{base}/data/eval.jsonl]", "observe.tensorboard=false", "rollout.num_prompts=32", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cold_start(nano_base, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("cold") / "run"
    r1mega(
        *small(
            run_dir, nano_base, "cold_start", f"model.path={nano_base}/hf", "max_prompts=null", "rollout.group_size=16"
        )
    )
    return run_dir


@pytest.fixture(scope="module")
def fine_tuned(nano_base, cold_start, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("sft") / "run"
    r1mega(
        "train", "configs/nano/cold_start_sft.yaml", f"run_dir={run_dir}", f"model.path={nano_base}/hf", "batch_size=4", "epochs=4",
        f"data.files=[{cold_start}/data/train.parquet]", "observe.tensorboard=false",
    )  # fmt: skip
    return run_dir


@pytest.fixture(scope="module")
def factory_arguments(nano_base, fine_tuned):
    def arguments(run_dir):
        general = f"general.files=[{nano_base}/data/general_sft_train.jsonl]"
        return small(
            run_dir,
            nano_base,
            "rejection_sampling",
            f"model.path={fine_tuned}/hf",
            "max_prompts=null",
            "rollout.group_size=12",
            general,
        )

    return arguments


@pytest.fixture(scope="module")
def whole_run(factory_arguments, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("factory") / "run"
    r1mega(*factory_arguments(run_dir), real=True)
    return run_dir


def test_cold_start_data_are_right_readable_and_counted(cold_start):
    lines, card = read(cold_start / "data/train.jsonl"), json.loads((cold_start / "data/card.json").read_text())
    assert lines and all(is_right(line) for line in lines)
    for line in lines:
        words = set(line["response"].split())
        other = {"试", "得", "错", "等等", "对"} if line["language"] == "en" else {"try", "is", "no", "wait", "yes"}
        assert not words & other, "one language, the question's"
    assert len({line["prompt_id"] for line in lines}) == len(lines), "one of a prompt"
    assert {line["source"] for line in lines} <= {"prompting 1", "prompting 2", "prompting 3"}
    first = card["funnel"][0]
    assert first["seen"] == 64 * 16 == len(read(cold_start / "raw/samples/samples-00000.jsonl"))
    left = first["seen"]
    for count in card["funnel"]:
        assert count["seen"] == left
        left -= count["taken"]
    assert left == len(lines) == card["samples"]
    assert len({r["prompt_id"] for r in read(cold_start / "raw/samples/samples-00000.jsonl")}) == 64


def test_factory_data(whole_run, nano_base):
    lines, card = read(whole_run / "data/train.jsonl"), json.loads((whole_run / "data/card.json").read_text())
    general = [line for line in lines if line["kind"] == "general"]
    reasoning = [line for line in lines if line["kind"] != "general"]
    assert all(is_right(line) for line in reasoning)
    assert len(general) == round(len(reasoning) / 3)
    assert card["mix"] == {"general": len(general), "reasoning": len(reasoning)}
    questions = {line["question"] for line in read(nano_base / "data/train.jsonl")}
    assert {line["question"] for line in reasoning} <= questions
    assert [line["step"] for line in metrics(whole_run)] == [1, 2]
    assert sum(line["group/num_sampled"] for line in metrics(whole_run)) == 64 * 12
    assert "| low accuracy |" in (whole_run / "data/card.md").read_text()


def test_killed_and_gone_on_with_two_ranks_gives_the_same_files(factory_arguments, whole_run, tmp_path):
    run_dir = tmp_path / "run"
    raw = run_dir / "raw/samples/samples-00000.jsonl"
    kill_when(
        lambda: raw.exists() and raw.read_text().count("\n") >= 20, *factory_arguments(run_dir), log=tmp_path / "log"
    )
    drawn = [json.loads(line) for line in raw.read_text().split("\n")[:-1]]
    assert 20 <= len(drawn) < 64 * 12
    r1mega(*factory_arguments(run_dir), num_ranks=2)
    for name in ("train.jsonl", "card.json", "card.md"):
        assert (run_dir / "data" / name).read_text() == (whole_run / "data" / name).read_text(), name
    stored = [record for path in sorted((run_dir / "raw/samples").glob("*.jsonl")) for record in read(path)]
    assert len(stored) == len({(r["prompt_id"], r["index"]) for r in stored}) == 64 * 12, "nothing was drawn twice"
    assert stored[: len(drawn)] == drawn


def test_prompts_that_changed_under_a_run_are_noticed(factory_arguments, whole_run, nano_base, tmp_path):
    """A start after a kill must not go on with other prompts than those that were sampled, or with the same in another order."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    (run_dir / "status.json").write_text(
        json.dumps(json.loads((run_dir / "status.json").read_text()) | {"state": "interrupted"})
    )
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config | {"run_dir": str(run_dir)}))
    prompts = nano_base / "data/train.jsonl"
    text = prompts.read_text()
    prompts.write_text("".join(reversed(text.splitlines(keepends=True))))
    try:
        done = r1mega(*factory_arguments(run_dir), check=False)
    finally:
        prompts.write_text(text)
    assert done.returncode == 3 and f"data.prompts[0]: {prompts} has another content" in done.stdout
    assert (run_dir / "data/train.jsonl").read_text() == (whole_run / "data/train.jsonl").read_text()


def test_rewriting_by_a_model_is_verified_again(nano_base, tmp_path):
    """The model that rewrites here answers anew, mostly wrong: of its rewritings only right ones stay."""
    run_dir = tmp_path / "run"
    done = r1mega(
        *small(
            run_dir, nano_base, "cold_start", f"model.path={nano_base}/hf", "max_prompts=null", "rollout.group_size=6",
            f"rewrite.model.path={nano_base}/hf", "rewrite.model.prompt='User: {{ question }} Assistant:'",
            "rewrite.model.temperature=1.0", "rewrite.model.max_tokens=60",
        ),
        check=False,
    )  # fmt: skip
    funnel = {count["name"]: count for count in json.loads((run_dir / "data/card.json").read_text())["funnel"]}
    right = funnel["no reasoning and summary"]["seen"] - funnel["no reasoning and summary"]["taken"]
    rewritten = read(run_dir / "raw/rewritten/samples-00000.jsonl")
    assert len(rewritten) == right == funnel["not rewritten by the model"]["seen"] > 0
    assert funnel["rewritten: low accuracy"]["taken"] > 0
    kept = read(run_dir / "data/train.jsonl") if done.returncode == 0 else []
    assert done.returncode in (0, 3) and all(is_right(line) for line in kept)
    assert done.returncode == 0 or "no sample passed the filters" in done.stdout


def test_both_ranks_of_a_generator_ask_it_for_its_judgement(nano_base, tmp_path):
    """A model this small gives no verdict: what has a reply to judge is kept as unjudged, and none passes the filters."""
    run_dir = tmp_path / "run"
    done = r1mega(
        *small(run_dir, nano_base, "rejection_sampling", f"model.path={nano_base}/hf"),
        f"data.prompts=[{nano_base}/data/general_train.jsonl]", f"general.files=[{nano_base}/data/general_sft_train.jsonl]",
        "max_prompts=4", "rollout.tp=2", "reward.judge.weight=1", "reward.judge.engine=policy", "reward.judge.max_tokens=8",
        "reward.judge.prompt='{{ question }} {{ response }}'", num_ranks=2, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "no sample passed the filters" in done.stdout
    (raw,) = (run_dir / "raw/samples").glob("*.jsonl")
    unjudged = {record["reason"].split(" in ")[0] for record in read(raw) if record["status"] == "unjudged"}
    assert unjudged == {"judge: no verdict"}
