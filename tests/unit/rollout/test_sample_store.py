"""Samples on disk: what a kill leaves, what several ranks wrote, and what must not be mixed."""

import json

import pytest

from r1mega.errors import ConfigError, DataError
from r1mega.rollout.draw import GradedSample, Sample
from r1mega.rollout.store import SampleStore
from r1mega.types import Prompt, Reward, RewardStatus

PROMPTS = [Prompt(name, f"{name}?", ("1",), "math", None, (1, 2, place)) for place, name in enumerate("ab")]
OK, FAILED = RewardStatus.OK, RewardStatus.FAILED


def graded(prompt, index, value=1.0, status=OK):
    sample = Sample(prompt.id, index, f"text {index} é\n", 5, index == 0)
    return GradedSample(sample, Reward(value, {"accuracy": value} if status == OK else {}, status, "because"))


def write(store, *results):
    with store.opened():
        for result in results:
            store.write_sample(result.sample)
            store.write_grade(result)


def test_ranks_and_starts_add_up(tmp_path):
    """Two ranks, then a start with one, find each other's samples; both records come back as they were."""
    all_of_them = [graded(PROMPTS[0], 0), graded(PROMPTS[1], 0, 0.0), graded(PROMPTS[0], 1)]
    write(SampleStore(tmp_path, 0, PROMPTS), all_of_them[0])
    write(SampleStore(tmp_path, 1, PROMPTS), all_of_them[1])
    write(SampleStore(tmp_path, 0, PROMPTS), all_of_them[2])
    samples, grades = SampleStore(tmp_path, 0, PROMPTS).read()
    assert samples == {(g.sample.prompt_id, g.sample.index): g.sample for g in all_of_them}
    assert grades == {(g.sample.prompt_id, g.sample.index): g.reward for g in all_of_them}
    assert set(SampleStore(tmp_path, 0, PROMPTS[1:]).read()[0]) == {("b", 0)}, "other prompts were asked for earlier"


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_cut_short_costs_that_line_alone(tmp_path, cut):
    write(SampleStore(tmp_path, 0, PROMPTS), graded(PROMPTS[0], 0), graded(PROMPTS[0], 1))
    path = tmp_path / "samples-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    store = SampleStore(tmp_path, 0, PROMPTS)
    left = {("a", 0)} if cut > 1 else {("a", 0), ("a", 1)}
    assert set(store.read()[0]) == set(store.read()[1]) == left
    write(store, graded(PROMPTS[1], 0))
    assert set(store.read()[0]) == left | {("b", 0)}


def test_a_failed_grade_is_tried_again_and_then_counts(tmp_path):
    store = SampleStore(tmp_path, 0, PROMPTS)
    write(store, graded(PROMPTS[0], 0, None, FAILED))
    assert store.read()[1] == {} and len(store.read()[0]) == 1
    assert store.read(failed=True)[1]["a", 0].status == FAILED, "what is left at the end is reported"
    with SampleStore(tmp_path, 1, PROMPTS).opened():
        pass
    with store.opened():
        store.write_grade(graded(PROMPTS[0], 0, 1.0))
    for asked in (False, True):
        assert store.read(failed=asked)[1]["a", 0].value == 1.0


def test_a_sample_may_be_kept_with_its_grade_or_not_at_all(tmp_path):
    store = SampleStore(tmp_path, 0, PROMPTS)
    together = [graded(PROMPTS[0], 0), graded(PROMPTS[1], 0, None, FAILED)]
    with store.opened():
        for one in together:
            store.write_sample(one.sample, one.reward)
        store.write_sample(graded(PROMPTS[0], 1).sample)
    assert not list(tmp_path.glob("grades-*")) and len(store.read()[0]) == 3
    assert store.read_graded() == {("a", 0): together[0], ("b", 0): together[1]}
    assert set(store.read()[1]) == {("a", 0)}, "what failed is for the next start"
    path = tmp_path / "samples-00000.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:1]) + b'{"prompt_id": "b", "index"')
    assert set(store.read()[0]) == set(store.read()[1]) == {("a", 0)}


def test_lines_are_written_at_once_and_synced_now_and_then(tmp_path, monkeypatch):
    """Each is in the file when the call returns; of lines that come close together the later ones share a sync."""
    now, synced = [100.0], []
    store = SampleStore(tmp_path, 0, PROMPTS)
    with store.opened():
        store.write_sample(graded(PROMPTS[1], 0).sample)  # the file itself is made durable too
        monkeypatch.setattr("r1mega.rollout.store.time.monotonic", lambda: now[0])
        store.sync()
        monkeypatch.setattr("r1mega.files.os.fsync", lambda descriptor: synced.append(len(store.read()[0])))
        for index, pause in enumerate((9.0, 0.01, 0.01, 0.3, 9.0, 0.01)):
            now[0] += pause
            store.write_sample(graded(PROMPTS[0], index).sample)
            assert len(store.read()[0]) == index + 2
        assert synced == [2, 5, 6]
    assert synced == [2, 5, 6, 7]


def test_other_settings_and_prompts_are_refused(tmp_path):
    store = SampleStore(tmp_path / "unit", 0, PROMPTS)
    store.check_settings({"temperature": 0.6, "seed": 0}, write=True)
    store.check_settings({"temperature": 0.6, "seed": 0}, write=True)
    with pytest.raises(ConfigError, match=r"temperature: 0\.6 -> 1\.0"):
        store.check_settings({"temperature": 1.0, "seed": 0}, write=True)
    assert json.loads((tmp_path / "unit" / "settings.json").read_text())["temperature"] == 0.6
    write(store, graded(PROMPTS[0], 0))
    other = Prompt("a", "another?", ("1",), "math", None, (9, 9))
    with pytest.raises(DataError, match="prompt a was another one when it was sampled"):
        SampleStore(tmp_path / "unit", 0, [other]).read()
