"""The pipeline's report: the picture's layout, the ladder from evaluations, phases, cards, and what it refuses."""

import json
import re

import pytest

from r1mega.errors import DataError
from r1mega.observe.dag import HEIGHT, WIDTH, lay_out
from r1mega.observe.lineage import Attempt, Lineage, write_lineage
from r1mega.observe.pipeline_report import overall_state, phase_seconds, read_ladder, write_pipeline_report
from tests.unit.observe.test_report_html import EVIL, body, figures, rl_line, write_run

RECIPE = {
    "base": [], "zero": ["base"], "cold_start": ["zero"], "cold_start_sft": ["base", "cold_start"],
    "reasoning_rl": ["base", "cold_start_sft"], "data": ["base", "reasoning_rl"], "sft": ["base", "data"],
    "align": ["base", "sft"], "distill": ["base", "data"],
}  # fmt: skip


def evaluation(step, accuracy):
    bounds = {"eval/accuracy_low": accuracy - 0.1, "eval/accuracy_high": accuracy + 0.1}
    return {"step": step, "eval/accuracy": accuracy, "eval/length_mean": 20.0 + step, **bounds}


@pytest.fixture
def pipeline(tmp_path):
    """base, zero and an evaluation that has not run; zero has metrics, evaluations, lineage, and a data card."""

    def node(name, parents, inputs):
        return {"name": name, "stage": name, "run_dir": str(tmp_path / name), "config": "c", "ranks": 1, "parents": parents,
                "inputs": inputs}  # fmt: skip

    start = [{"key": "model.path", "path": str(tmp_path / "base/hf"), "owner": "base"}]
    nodes = [node("base", [], []), node("zero", ["base"], start), node("evaluate", ["zero", "base"], start)]
    (tmp_path / "pipeline.json").write_text(json.dumps({"name": EVIL, "source": "r1.yaml", "nodes": nodes}))
    (tmp_path / "base").mkdir()
    run = write_run(
        tmp_path / "zero", [rl_line(step, **{"tokens/rollout": 100, "tokens/update": 300}) for step in (1, 2)]
    )
    (run / "evaluations.jsonl").write_text(
        "".join(json.dumps(evaluation(s, a)) + "\n" for s, a in ((0, 0.25), (2, 0.75)))
    )
    (run / "data").mkdir()
    (run / "data" / "card.md").write_text(f"what came in {EVIL}")
    attempt = Attempt("2026-01-01T10:00:00+0000", "abc", "2026-01-01T10:01:30+0000", 0)
    write_lineage(run, Lineage("zero", "zero", "finished", "f" * 64, {}, {}, {}, (attempt,)))
    return tmp_path


def test_boxes_do_not_meet_and_lines_go_around_them():
    picture = lay_out(RECIPE)
    boxes = {box.name: box for box in picture.boxes}
    assert set(boxes) == set(RECIPE)
    for name, box in boxes.items():
        assert 0 <= box.x <= picture.width - WIDTH and 0 <= box.y <= picture.height - HEIGHT
        assert all(boxes[parent].x + WIDTH < box.x for parent in RECIPE[name])
        for other in picture.boxes:
            assert other is box or abs(other.x - box.x) >= WIDTH or abs(other.y - box.y) >= HEIGHT
    for parent, child, line in picture.lines:
        x, y = map(int, re.match(r"M(\d+),(\d+)", line).groups())
        level = re.search(r"L(\d+),(\d+)", line)
        end = int(level[1]) if level else x
        crossed = [b.name for b in picture.boxes if x < b.x + WIDTH and b.x < end and b.y <= y <= b.y + HEIGHT]
        assert crossed == [], (parent, child)
    assert {(parent, child) for parent, child, _ in picture.lines} == {(p, c) for c, ps in RECIPE.items() for p in ps}


def test_ladder_from_evaluations_inside_training(pipeline):
    rungs = read_ladder(pipeline)
    assert [(r.name, r.accuracy, r.length) for r in rungs] == [("base", 0.25, 20.0), ("zero", 0.75, 22.0)]
    assert rungs[0].measured == "before the first step of zero"


def test_an_evaluation_stage_counts_instead(pipeline):
    (pipeline / "evaluate").mkdir()
    results = [
        {"name": name, "path": str(pipeline / name / "hf"), "tasks": {"fresh": {"metrics": evaluation(0, accuracy)}}}
        for name, accuracy in (("zero", 0.9), ("base", 0.1))
    ]
    (pipeline / "evaluate" / "results.json").write_text(json.dumps({"checkpoints": results}))
    assert [(r.name, r.task, r.accuracy) for r in read_ladder(pipeline)] == [
        ("base", "fresh", 0.1),
        ("zero", "fresh", 0.9),
    ]
    drawn = figures(write_pipeline_report(pipeline).read_text())["ladder"]["data"]
    assert [(trace["name"], trace["x"], trace["y"]) for trace in drawn] == [("fresh", ["base", "zero"], [0.1, 0.9])]
    (pipeline / "evaluate" / "results.json").write_text("[]")
    with pytest.raises(DataError, match="results.json: not the results"):
        read_ladder(pipeline)


ANSWERED = {  # four prompts: which of two responses each checkpoint has right; None: not judged
    "base": [(1, 0), (0, 0), (0, 0), (None, 0)],
    "zero": [(1, 1), (1, 0), (0, 0), (1, 1)],
}


def write_answers(pipeline, answered):
    """An evaluation's files: the summary, each checkpoint's rows, and rewards in both of the places that keep them."""
    checkpoints = []
    for name, prompts in answered.items():
        folder = pipeline / "evaluate" / name / "fresh"
        folder.mkdir(parents=True)
        rows = [
            {"prompt_id": f"p{i}", "question": f"{i} + 1 = ?", "golds": [str(i + 1)], "kind": "math",
             "texts": [f"<answer> {name} {i} {k} </answer>{EVIL}" for k in range(2)], "lengths": [7, 9], "truncated": [False, True],
             "correct": [None if v is None else bool(v) for v in verdicts]}
            for i, verdicts in enumerate(prompts)
        ]  # fmt: skip
        (folder / "result.json").write_text(json.dumps({"rows": rows}))
        graded = [
            {"step": 1, "prompt_id": f"p{i}", "index": k, "value": value, "parts": {"accuracy": float(value or 0)}, "reason": "",
             "status": "ok" if value is not None else "failed"}
            for i, verdicts in enumerate(prompts) for k, value in enumerate(verdicts)
        ]  # fmt: skip
        later = [line for line in graded if line["index"]]
        drawn = [line if not line["index"] else {k: line[k] for k in ("step", "prompt_id", "index")} for line in graded]
        for kind, lines in (("samples", drawn), ("grades", later)):
            (folder / f"{kind}-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        entry = {"metrics": {}, "file": f"{name}/fresh/result.json"}
        checkpoints.append({"name": name, "path": str(pipeline / name / "hf"), "tasks": {"fresh": entry}})
    results = {"checkpoints": checkpoints[::-1]}  # the pipeline's order counts, not the evaluation's
    (pipeline / "evaluate" / "results.json").write_text(json.dumps(results))
    return pipeline / "evaluate"


def test_one_prompt_through_the_recipe(pipeline):
    """The one on which all do most nearly as on all: of p0, p1, p2 (p3 is not judged everywhere) base has 1/6 right, zero 1/2;
    squares of the distances: 1/9 + 1/4, 1/36 + 0, 1/36 + 1/4.
    """
    evaluation = write_answers(pipeline, ANSWERED | {"base": [*ANSWERED["base"][:3], (None, None)]})
    page = body(write_pipeline_report(pipeline).read_text())
    assert page.count('id="walk"') == 1 and "1 + 1 = ?" in page and "gold 2" in page and "prompt p1" in page
    assert re.findall(r'data-checkpoint="(\w+)"', page) == ["base", "zero"]
    base, zero = page.split('data-checkpoint="')[1:]
    zero = zero.split("<h2")[0]
    assert "0 of 2 right" in base and "1 of 2 right" in zero
    assert re.findall(r"(?:base|zero) 1 (\d)", base) == ["0", "1"] == re.findall(r"zero 1 (\d)", zero)
    assert re.findall(r"(correct|wrong|reward [\d.]+|\d tokens|truncated)<", zero) == [
        "correct", "reward 1.00", "7 tokens", "wrong", "reward 0.00", "9 tokens", "truncated"
    ]  # fmt: skip
    assert EVIL not in page
    assert "the first" not in base
    file = evaluation / "zero/fresh/result.json"
    rows = json.loads(file.read_text())["rows"]
    for row in rows:
        row |= {key: row[key] * 3 for key in ("texts", "lengths", "truncated", "correct")}
    file.write_text(json.dumps({"rows": rows}))
    assert "3 of 6 right; the first 4 of 6<" in write_pipeline_report(pipeline).read_text()
    del rows[-1]["truncated"]
    file.write_text(json.dumps({"rows": rows}))
    with pytest.raises(DataError, match=r"zero/fresh/result.json: a row has no truncated"):
        write_pipeline_report(pipeline)
    file.write_text("{}")
    with pytest.raises(DataError, match=r"zero/fresh/result.json: not the results file"):
        write_pipeline_report(pipeline)


def test_no_prompt_where_there_is_nothing_to_compare(pipeline):
    """One checkpoint, or samples that were removed, or none judged by all: the page is there without that part."""
    evaluation = write_answers(pipeline, ANSWERED)
    (evaluation / "zero/fresh/result.json").unlink()
    assert 'id="walk"' not in write_pipeline_report(pipeline).read_text()
    summary = json.loads((evaluation / "results.json").read_text())
    (evaluation / "results.json").write_text(json.dumps({"checkpoints": summary["checkpoints"][1:]}))
    assert 'id="walk"' not in write_pipeline_report(pipeline).read_text()


def test_page(pipeline):
    html = write_pipeline_report(pipeline).read_text()
    page = body(html)
    assert EVIL not in html and "&lt;script&gt;" in page and "what came in" in page
    assert set(figures(html)) == {"ladder", "time", "zero-response-length", "zero-accuracy", "zero-reward-parts"}
    assert {t["name"]: t["y"] for t in figures(html)["time"]["data"]} == {
        "rollout": [4 / 60], "update": [2 / 60], "other": [pytest.approx(1 / 60)]
    }  # fmt: skip
    assert "1 min 30 s" in page and "exit code 0" in page and "f" * 64 in page
    assert '<td class="number">200</td><td class="number">600</td>' in page
    assert '<g class="not started"' in page and '<g class="finished"' in page
    assert (pipeline / "zero" / "report.html").exists(), "each stage's own report is made too"


def test_rl_stages_stand_side_by_side(pipeline):
    """Language mixing with and without the reward against it in one chart; what only one of them measured is in none."""
    description = json.loads((pipeline / "pipeline.json").read_text())
    description["nodes"].append(description["nodes"][1] | {"name": "language", "run_dir": str(pipeline / "language")})
    (pipeline / "pipeline.json").write_text(json.dumps(description))
    mixed = "response/mixed_language_fraction"
    write_run(pipeline / "language", [rl_line(step, **{mixed: 0.0}) for step in (1, 2, 3)])
    assert "stages-mixed-language-fraction" not in figures(write_pipeline_report(pipeline).read_text())
    write_run(pipeline / "zero", [rl_line(step, **{mixed: step / 10}) for step in (1, 2)])
    drawn = figures(write_pipeline_report(pipeline).read_text())["stages-mixed-language-fraction"]["data"]
    assert [(t["name"], t["x"], t["y"]) for t in drawn] == [
        ("zero", [1, 2], [0.1, 0.2]),
        ("language", [1, 2, 3], [0.0] * 3),
    ]


def test_states():
    assert overall_state(["finished", "finished"]) == "finished"
    assert overall_state(["finished", "running", "not started"]) == "running"
    assert overall_state(["failed", "running"]) == "failed"
    assert overall_state(["finished", "not started"]) == "unfinished"


def test_phases_of_steps_between_lines():
    lines = [{"step": 10, "time/update_seconds": 1.0, "time/step_seconds": 1.5, "time/evaluate_seconds": 3.0}]
    assert phase_seconds(lines) == {"update": 10.0, "evaluate": 30.0, "other": 5.0}


def test_no_pipeline(tmp_path):
    with pytest.raises(DataError, match="not a pipeline's directory"):
        write_pipeline_report(tmp_path)
