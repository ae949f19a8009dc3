"""samples.jsonl: what a line holds, how many there are, the cut on resume."""

from r1mega.observe.samples import SamplesWriter, read_samples
from r1mega.types import Prompt, Response, Reward, RewardStatus, RolloutGroup


def make_group(name, value=1.0, status=RewardStatus.OK):
    prompt = Prompt(name, f"{name}?", ("4", "four"), "math", None, (1, 2))
    response = Response((5, 6, 7), (-0.1, -0.2, -0.3), "stop")
    reward = Reward(value, {"accuracy": 1.0}, status)
    return RolloutGroup(prompt, (response, response), ("<think> 好 </think>", "other"), (reward, reward), 3)


def test_lines_and_limit(tmp_path):
    groups = [make_group("a"), make_group("b", None, RewardStatus.FAILED), make_group("c")]
    with SamplesWriter(tmp_path) as writer:
        writer.write(5, groups, limit=2)
        writer.write(10, groups, limit=0)
    first, second = read_samples(tmp_path)
    assert first == {
        "step": 5,
        "prompt_id": "a",
        "question": "a?",
        "answers": ["4", "four"],
        "response": "<think> 好 </think>",
        "tokens": 3,
        "finish_reason": "stop",
        "reward": 1.0,
        "parts": {"accuracy": 1.0},
        "status": "ok",
    }
    assert second["reward"] is None and second["status"] == "failed"
    assert "好" in (tmp_path / "samples.jsonl").read_text(), "readable without decoding"


def test_resume_cuts(tmp_path):
    with SamplesWriter(tmp_path) as writer:
        for step in (5, 10, 15):
            writer.write(step, [make_group("a"), make_group("b")], limit=2)
    with SamplesWriter(tmp_path, resume_step=12) as writer:
        writer.write(15, [make_group("c")], limit=2)
    assert [(s["step"], s["prompt_id"]) for s in read_samples(tmp_path)] == [
        (5, "a"), (5, "b"), (10, "a"), (10, "b"), (15, "c"),
    ]  # fmt: skip


def test_disabled_writer_touches_nothing(tmp_path):
    with SamplesWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(1, [make_group("a")], limit=1)
    assert not (tmp_path / "run").exists()
