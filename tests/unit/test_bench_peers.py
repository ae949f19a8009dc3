"""The comparison with TRL: its arguments, what it makes of the two sides' figures, and the inputs that both get."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))  # as a script finds its neighbours

from r1mega.config.load import load_config
from r1mega.data.prompts import load_prompts
from r1mega.data.tokenizer import load_tokenizer
from tools import bench_peers, peer_side


def step(seconds, cpu, tokens=100):
    """What a side says of a step of which half is sampling."""
    parts = {"rollout": 0.5, "log-probs": 0.1, "update": 0.3, "the rest": 0.1, "step": 1.0}
    return {"times": {k: {"wall": seconds * v, "cpu": cpu * v} for k, v in parts.items()}, "tokens": tokens}


def test_the_best_layouts_of_both_are_compared_by_pairs():
    theirs = ((1.0, 3.0), (1.4, 3.2), (9.0, 3.1))
    rounds = [
        {"r1mega 1x1": step(2, 1), "r1mega 2x1": step(1, 2), "trl 1x1": step(s, c), "trl 1x2": step(10, 1)}
        for s, c in theirs
    ]
    summary = {"workload": "small", "trl": "1.16.0", "rounds": rounds}
    assert [bench_peers.best(rounds, library) for library in ("r1mega", "trl")] == ["r1mega 2x1", "trl 1x1"]
    pair = ("r1mega 2x1", "trl 1x1")
    assert bench_peers.ratios(rounds, "step", "wall", *pair) == pytest.approx([1.0, 1.4, 9.0])
    assert bench_peers.ratios(rounds, "step", "cpu", *pair) == pytest.approx([1.5, 1.6, 1.55])
    lines = bench_peers.table(summary).splitlines()
    assert "3 rounds" in lines[0] and "100 sampled tokens" in lines[0]
    assert "r1mega 1x1 / 2.000 / 1.000, r1mega 2x1 / 1.000 / 2.000" in lines[1]
    assert lines[3].split() == ["r1mega", "2x1", "trl", "1x1", "ratio"] * 2
    assert lines[-3].split() == ["step", "1.000", "1.400", "1.40", "2.000", "3.100", "1.55"]
    assert all("by wall time: holds" in line for line in lines[-2:])
    slow = [{"r1mega 1x1": step(1, 2), "trl 1x1": step(1.25, 9)}]
    missed, held = bench_peers.table(summary | {"rounds": slow}).splitlines()[-2:]
    assert "step" in missed and "missed" in missed and "rollout" in held and "holds" in held


def test_several_processes_take_one_step():
    both = bench_peers.together([step(1, 2, 30), step(3, 1, 70)])
    assert both["tokens"] == 100 and both["times"]["step"] == {"wall": 3.0, "cpu": 3.0}
    assert [peer_side.share([1, 2, 3, 4], rank, 2) for rank in range(2)] == [[1, 2], [3, 4]]


def test_who_is_stopped_ends_with_the_tool():
    """At SIGTERM too, which Python would end by without a word to its children."""
    code = f"""if True:
        import subprocess, sys, time
        sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(Path(bench_peers.__file__).parent)!r}]
        import bench_peers

        class Side(bench_peers.Side):
            def __init__(self):
                self._processes = [subprocess.Popen(["cat"], stdin=subprocess.PIPE, text=True)]
                self._signal(bench_peers.signal.SIGSTOP)

        def compare(*_):
            with Side() as side:
                print(side._processes[0].pid, flush=True)
                time.sleep(60)

        bench_peers.install, bench_peers.compare, sys.argv = lambda venv: None, compare, ["bench_peers.py", "small"]
        bench_peers.main()
    """
    tool = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(tool.stdout.readline())
    tool.terminate()
    assert tool.wait(30) == 143
    assert not Path(f"/proc/{child}").exists(), "it was waited for"


@pytest.fixture
def stand_in(tmp_path):
    """In the place of Python: a script that runs as a side's processes; it gets its rank as $RANK."""

    def side(script, layout="1x1"):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        return bench_peers.Side("trl", layout, python, tmp_path)

    return side


def test_a_rank_that_does_not_start_ends_those_that_wait_for_it(stand_in, tmp_path):
    """Of which the first says nothing until a timeout of its own."""
    script = (
        f"echo $$ > {tmp_path}/$RANK; [ $RANK = 1 ] || exec sleep 50; until [ -s {tmp_path}/0 ]; do sleep 0.1; done; "
    )
    begun = time.monotonic()
    with pytest.raises(SystemExit, match="trl 2x1 ended with 3:\nthe reason"):
        stand_in(script + "echo the reason >&2; exit 3", "2x1")
    assert time.monotonic() - begun < 45
    waiting = int((tmp_path / "0").read_text())
    assert not Path(f"/proc/{waiting}").exists()


def test_who_died_while_others_took_their_step_is_named(stand_in):
    with stand_in("echo '\"ready\"'; exec sleep 50") as side:
        (process,) = side._processes
        process.kill()
        process.wait()
        with pytest.raises(SystemExit, match="trl 1x1 ended with -9"):
            side.step()


def test_arguments(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    options = bench_peers.arguments([])
    assert options.workloads == ["small", "smollm2"] and options.ours == options.theirs == ["1x1", "1x2", "2x1"]
    for cores, layouts in ((1, ["1x1"]), (6, ["1x1", "1x6", "2x3"])):  # of which not all have a share of smollm2
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert bench_peers.arguments([]).theirs == layouts
    assert bench_peers.arguments(["small", "--ours", "8x1"]).ours == ["8x1"]
    assert options.venv == tmp_path / f"r1mega/trl-{bench_peers.TRL}"
    assert bench_peers.arguments(["smollm2", "--rounds", "2", "--ours", "2x1"]).ours == ["2x1"]
    wrong = (
        (["big"], "no workload 'big'"),
        (["--rounds", "0"], "at least 1"),
        (["--ours", "2"], "'2' is not processes x threads"),
        (["small", "--theirs", "3x1"], "cannot be divided among 3"),
    )
    for words, message in wrong:
        with pytest.raises(SystemExit):
            bench_peers.arguments(words)
        assert message in capsys.readouterr().err


def test_without_trl_it_is_skipped_by_name(capsys, tmp_path, monkeypatch):
    """pip cannot install it: there is no such version."""
    monkeypatch.setattr(bench_peers, "install", lambda venv: "No matching distribution found for trl")
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", "--venv", str(tmp_path / "venv")])
    bench_peers.main()
    said = capsys.readouterr().out
    assert said.startswith(f"skipped: TRL {bench_peers.TRL}") and "No matching distribution" in said


def test_installing_says_why_it_failed(tmp_path, monkeypatch):
    """An interpreter whose every call fails, in the place of this one."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho one\necho the reason >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert bench_peers.install(tmp_path / "venv") == "the reason"


def test_both_sides_get_the_same_prompts_and_lengths(tmp_path):
    """r1mega's config is accepted, its tokens are those of transformers' tokenizer, and all lengths fit."""
    from transformers import AutoTokenizer

    workload = bench_peers.WORKLOADS["small"]
    bench_peers.make_inputs(workload, tmp_path, 2, 1)
    config = load_config(tmp_path / "zero.yaml")
    prompts = load_prompts(config.data, load_tokenizer(tmp_path / "model"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    questions = [json.loads(line)["question"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [list(p.token_ids) for p in prompts] == theirs(questions)["input_ids"]
    assert {len(p.token_ids) for p in prompts} == {workload.prompt_tokens}
    assert (theirs.pad_token_id, theirs.eos_token_id) == (0, 1)
    spec = json.loads((tmp_path / "spec.json").read_text())
    assert [len(row) for row in spec["lengths"]] == [256, 256] and set(spec["lengths"][0]) == {32}
    assert config.rollout.num_prompts * config.rollout.group_size == 256 and config.steps == 2
    assert 256 % spec["trl_batch"] == 0


def test_the_long_tail_is_one():
    workload = bench_peers.WORKLOADS["smollm2"]
    import synthetic

    draw = synthetic.draw_lengths(workload.max_tokens, float(workload.mean), workload.cv, None)
    lengths = [draw(seed) for seed in range(1600)]
    assert max(lengths) == 512 and 100 < sum(lengths) / 1600 < 130
    assert sorted(lengths)[800] < 90, "half of the responses are short"


def test_a_stopwatch_counts_what_is_inside(monkeypatch):
    now = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(peer_side, "CLOCKS", {name: (lambda name=name: now[name]) for name in now})

    class Trainer:
        def work(self, wall, *, cpu):
            now["wall"] += wall
            now["cpu"] += cpu
            return wall

    watch, trainer = peer_side.Stopwatch(), Trainer()
    watch.around(trainer, "work", "update")
    with watch.timed("step"):
        assert trainer.work(2.0, cpu=1.0) == 2.0
        now["wall"] += 1.0
    seconds = watch.taken()
    assert seconds == {"update": {"wall": 2.0, "cpu": 1.0}, "step": {"wall": 3.0, "cpu": 1.0}}
    assert peer_side.differences(seconds["step"], seconds["update"]) == {"wall": 1.0, "cpu": 0.0}
    assert watch.taken() == {}
