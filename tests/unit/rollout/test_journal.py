"""The journal of rollouts: a kill at any moment changes nothing, whatever layout goes on from it."""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from r1mega.errors import CheckpointError, DataError
from r1mega.platform.groups import GeneratorPlace
from r1mega.rollout.engine import sample_seed
from r1mega.rollout.journal import Place, RolloutJournal, Segment
from r1mega.types import (
    UNFINISHED,
    Response,
    Reward,
    RewardStatus,
)
from tests.unit.rollout import scripted
from tests.unit.rollout.scripted import (
    FILE,
    HARD,
    ROOMY,
    Run,
    facts,
    length_of,
)


@pytest.mark.parametrize("partial", [{}, ROOMY, {**ROOMY, "dynamic": True}], ids=["whole", "partial", "dynamic"])
def test_a_kill_at_any_line_of_the_journal_changes_nothing(alone, tmp_path, partial):
    """Resumed from any checkpoint with what was on disk at the kill: what is sampled again is what was in flight."""
    whole, saved = Run(tmp_path / "whole", **partial), {0: None}
    expected = {}
    for step in range(1, 7):
        expected[step] = facts(whole.step(step))
        saved[step] = whole.progress()
    whole.journal.close()
    rng = random.Random(0)
    for trial in range(12):
        start, run_dir = rng.randint(0, 5), tmp_path / f"run{trial}"
        shutil.copytree(tmp_path / "whole", run_dir)
        last = rng.randint(start + 1, 6)
        file = run_dir / f"rollouts/step_{last:06d}/{FILE}"
        lines = file.read_bytes().splitlines(keepends=True)
        kept = b"".join(lines)[: rng.randint(0, sum(map(len, lines)))]
        file.write_bytes(kept)
        for step in range(last + 1, 7):
            shutil.rmtree(run_dir / f"rollouts/step_{step:06d}")
        run = Run(run_dir, copy.deepcopy(saved[start]), start, **partial)
        for step in range(start + 1, 7):
            before = run.engine.tokens
            assert facts(run.step(step)) == expected[step], (trial, start, last, step)
            if step < last:
                assert run.engine.tokens == before  # read, not sampled
        run.journal.close()


def open_tokens(run):
    """What each response in the making has, as far as it is known to the rank."""
    return [(member.token_ids, member.finish_reason) for group in run.collector._open for member in group.members]


def lines_of(run_dir, step):
    return [json.loads(line) for line in (run_dir / f"rollouts/step_{step:06d}/{FILE}").read_text().splitlines()]


def write_lines(run_dir, step, lines, name=FILE):
    path = run_dir / f"rollouts/step_{step:06d}/{name}"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def whole(alone, tmp_path):
    """A run of six steps, its directory; what each step had; what a checkpoint after each keeps."""
    run, expected, saved = Run(tmp_path / "whole", **HARD), {}, {0: None}
    for step in range(1, 7):
        expected[step] = facts(run.step(step))
        saved[step] = run.progress()
    run.journal.close()
    return tmp_path / "whole", expected, saved


def test_the_last_start_counts_whatever_its_generators_wrote_to(whole, tmp_path):
    """Killed between the finished lines of a step and the unfinished ones, in a layout of two; the next start, of one, cuts what
    those had finished too far, and saves; the third reads what the second had.
    """
    directory, expected, saved = whole
    beyond = 0
    for step in range(1, 6):
        lines, run_dir = lines_of(directory, step), tmp_path / f"run{step}"
        keys = [(line["seed"], line["index"]) for line in lines if line.get("finish_reason") == "unfinished"]
        kept = lines[: next((n for n, line in enumerate(lines) if line.get("finish_reason") == "unfinished"), None)]
        beyond += sum("tokens" in line and (line["seed"], line["index"]) in keys for line in kept)
        shutil.copytree(directory, run_dir)
        for later in range(step, 7):
            shutil.rmtree(run_dir / f"rollouts/step_{later:06d}")
        (run_dir / f"rollouts/step_{step:06d}").mkdir()
        write_lines(run_dir, step, kept, "start_1-1-of-2.jsonl")
        run = Run(run_dir, copy.deepcopy(saved[step - 1]), step - 1, **HARD)
        assert facts(run.step(step)) == expected[step]
        progress = run.progress()
        run.journal.close()
        again = Run(run_dir, progress, step, **HARD)
        assert open_tokens(again) == open_tokens(run)
        assert [facts(again.step(later)) for later in range(step + 1, 7)] == [expected[n] for n in range(step + 1, 7)]
        again.journal.close()
    assert beyond  # the case did occur


@pytest.mark.parametrize("longer", [False, True], ids=["shorter", "longer"])
def test_what_is_sampled_again_may_come_out_otherwise(alone, tmp_path, monkeypatch, longer):
    """A finished line is lost and the response, sampled again, comes out with another length (other rounding), so that the step
    is cut elsewhere: what earlier starts left unfinished there is shortened or goes on, and is what the next start reads.
    """
    first = Run(tmp_path / "run", overdraw=2.0, max_staleness=2)
    cut = first.step(1).figures["partial/cut_tokens"]
    first.journal.close()
    lines, usual, seen = lines_of(tmp_path / "run", 1), length_of, 0
    for place, lost in enumerate(line for line in lines if line.get("finish_reason") == "stop"):
        run_dir, victim = tmp_path / f"run{place}", sample_seed(lost["seed"], lost["index"])
        shutil.copytree(tmp_path / "run", run_dir)
        key = (lost["seed"], lost["index"])
        write_lines(run_dir, 1, [line for line in lines if (line["seed"], line["index"]) != key])
        monkeypatch.setattr(
            scripted, "length_of", lambda s, v=victim: (usual(s) + 20 if longer else 1) if s == v else usual(s)
        )
        run = Run(run_dir, None, 0, overdraw=2.0, max_staleness=2)
        again_at = run.step(1).figures["partial/cut_tokens"]
        seen += again_at > cut if longer else again_at < cut
        for step in (1, 2):
            run.step(2) if step == 2 else None
            for tokens, _ in open_tokens(run):
                assert [token % 100 for token in tokens] == list(range(len(tokens)))
        again = Run(run_dir, run.progress(), 2, overdraw=2.0, max_staleness=2)
        assert open_tokens(again) == open_tokens(run)
        assert facts(again.step(3)) == facts(run.step(3))
        run.journal.close(), again.journal.close()
    assert seen


def test_a_segment_that_does_not_fit_is_no_part_of_a_response(whole, tmp_path):
    """Of a start that had gone on from another number of tokens: sampled anew, or refused where it cannot be."""
    directory, expected, saved = whole
    lines = lines_of(directory, 2)
    assert any(line.get("begun", 0) > 0 for line in lines)
    write_lines(directory, 2, [{**line, "begun": line["begun"] + 1} if line.get("begun") else line for line in lines])
    for step in range(3, 7):
        shutil.rmtree(directory / f"rollouts/step_{step:06d}")
    with pytest.raises(CheckpointError, match="lacks the tokens of step 2"):
        Run(directory, copy.deepcopy(saved[2]), 2, **HARD)
    run = Run(directory, copy.deepcopy(saved[1]), 1, **HARD)
    assert facts(run.step(2)) == expected[2]


def test_what_an_older_program_did_not_tell_the_ids_of_is_sampled_again(whole):
    """A run with `rollout.top_p` that goes on, or is refused where earlier steps' tokens cannot be sampled again."""
    directory, expected, saved = whole
    for step in (1, 2):
        old = [{key: value for key, value in line.items() if key != "kept"} for line in lines_of(directory, step)]
        write_lines(directory, step, old)
    for step in range(3, 7):
        shutil.rmtree(directory / f"rollouts/step_{step:06d}")
    cut = {**HARD, "keys": {"top_p": 0.9}}
    with pytest.raises(
        CheckpointError, match=r"lacks the tokens of step [12] .*which ids they were drawn from.*another run_dir"
    ):
        Run(directory, copy.deepcopy(saved[2]), 2, **cut)
    run = Run(directory, None, 0, **cut)
    assert [facts(run.step(step)) for step in (1, 2)] == [expected[1], expected[2]]  # with the ids, of all


def test_a_reward_is_of_the_segment_that_counts(alone, tmp_path):
    """Between files, whichever is read first; not of what an earlier start had sampled."""
    place, spot = Place(1, 5, 0), GeneratorPlace.of_this_rank(1)
    done, reward = Response((1, 2), (-1.0, -2.0), "stop"), Reward(1.0, {"accuracy": 1.0}, RewardStatus.OK)

    def start(*writes):
        journal = RolloutJournal(tmp_path, spot)
        for method, what, *begun in writes:
            getattr(journal, method)(place, what, *begun)
        journal.close()
        return RolloutJournal(tmp_path, spot).take(place, 0)

    assert start(("write", done, 0)).reward is None
    assert start(("write_reward", reward)) == Segment(done, reward)
    assert start(("write", replace(done, finish_reason=UNFINISHED), 0)).reward is None
    assert start(("write", done, 0), ("write_reward", reward)) == Segment(done, reward)


def test_what_is_not_finite_or_no_text_is_written_and_read(alone, tmp_path):
    place, spot = Place(1, 5, 0), GeneratorPlace.of_this_rank(1)
    journal = RolloutJournal(tmp_path, spot)
    journal.write(place, Response((1, 2, 3), (float("nan"), float("-inf"), -0.5), "stop"), 0)
    journal.write_reward(place, Reward(float("inf"), {"a": float("nan")}, RewardStatus.OK, "answer \ud800"))
    journal.close()
    found = RolloutJournal(tmp_path, spot).take(place, 0)
    assert math.isnan(found.response.log_probs[0]) and found.response.log_probs[1:] == (float("-inf"), -0.5)
    assert found.reward.value == float("inf") and math.isnan(found.reward.parts["a"])
    assert found.reward.reason == "answer \\ud800"


def test_the_journal_keeps_places_not_tokens_and_those_of_steps_to_come(whole):
    directory, _, saved = whole
    run = Run(directory, copy.deepcopy(saved[3]), 3, **HARD)
    for step in range(4, 7):
        run.step(step)
        assert {place.step for place in run.journal._segments} <= set(range(step, 7))
    run = Run(directory, copy.deepcopy(saved[3]), 3, **HARD)
    write_lines(directory, 4, lines_of(directory, 4)[1:])
    with pytest.raises(DataError, match=r"step_000004.start_1.*something changed it since"):
        run.step(4)


def test_a_journal_that_cannot_be_closed_keeps_nothing_else_open():
    from r1mega.stages.rl import RLTrainer  # not above: the ranks that tests start need it not

    closed = []

    def fail():
        raise OSError("disk full")

    parts = {name: SimpleNamespace(close=functools.partial(closed.append, name)) for name in ("scorer", "engine")}
    with pytest.raises(OSError, match="disk full"):
        RLTrainer.close(SimpleNamespace(journal=SimpleNamespace(close=fail), **parts))
    assert sorted(closed) == ["engine", "scorer"]


def test_old_steps_go_once_no_checkpoint_needs_them(alone, tmp_path):
    run = Run(tmp_path, overdraw=2.0, max_staleness=2)
    for step in range(1, 9):
        run.step(step)
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
        shutil.rmtree(tmp_path / f"checkpoints/step_{step - 1:06d}", ignore_errors=True)
    names = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert names == ["step_000006", "step_000007", "step_000008"]  # what began in 6 may be unfinished after 7
    again = Run(tmp_path, run.progress(), 8, overdraw=2.0, max_staleness=2)
    assert facts(again.step(9)) == facts(run.step(9))


def test_a_checkpoint_without_its_journal_is_refused(alone, tmp_path):
    run = Run(tmp_path, overdraw=2.0, max_staleness=2)
    run.step(1)
    shutil.rmtree(tmp_path / "rollouts")
    with pytest.raises(CheckpointError, match="put RUN_DIR/rollouts back"):
        Run(tmp_path, run.progress(), 1, overdraw=2.0, max_staleness=2)
