"""The zero stage with partial rollouts, end to end: killed in the middle of a step it ends as if it had not been."""

import math

from tests.e2e.runs import kill_when, metrics, r1mega, without_times, zero_arguments

PARTIAL = (
    "rollout.partial.overdraw=2",
    "rollout.partial.every_tokens=4",
    "rollout.partial.max_staleness=2",
    "rollout.top_p=0.95",
)


def lines_of(run_dir, step):
    return sum(path.read_bytes().count(b"\n") for path in run_dir.glob(f"rollouts/step_{step:06d}/*.jsonl"))


def test_partial_run_killed_within_a_rollout_equals_uninterrupted_bitwise(nano_base, tmp_path):
    """Killed in step 4, of which some responses are on disk; the checkpoint is of step 2, with unfinished ones."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    r1mega(*zero_arguments(nano_base, whole, *PARTIAL))
    arguments = zero_arguments(nano_base, run_dir, *PARTIAL)
    kill_when(lambda: lines_of(run_dir, 4) > 3, *arguments, log=tmp_path / "log")
    assert "from step 2" in r1mega(*arguments).stdout
    lines = metrics(run_dir)
    assert without_times(lines) == without_times(metrics(whole))
    name = "hf/model.safetensors"
    assert (run_dir / name).read_bytes() == (whole / name).read_bytes()
    assert (run_dir / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert max(line["staleness/max"] for line in lines) in (1, 2)
    assert all(math.isfinite(line["policy/loss"]) and line["logprob/kept_ids"] > 1 for line in lines)
    assert lines[0]["logprob/diff_max"] < 2e-4  # of the first step every token is new
    assert lines[-1]["logprob/diff_max"] > 2e-4  # of a later one not
