"""The report's numbers and HTML: what it says, leaves out, escapes and refuses."""

import json
import re
from html import unescape

import pytest

from r1mega.errors import DataError
from r1mega.observe.charts import build_charts, running_mean
from r1mega.observe.metrics import MetricsWriter
from r1mega.observe.performance import stragglers
from r1mega.observe.report import summary_cards, training_seconds, write_report
from r1mega.observe.run import RunDirectory

EVIL = "<script>alert('x')</script></pre>"


def write_run(path, lines):
    path.mkdir(exist_ok=True)
    with MetricsWriter(path, tensorboard=False) as writer:
        for line in lines:
            writer.write(line["step"], line)
    return path


def figures(html):
    """The plotly figures that the page draws, by id."""
    found = re.search(r"^const figures = (.*);$", html, re.MULTILINE).group(1)
    return {figure["id"]: figure for figure in json.loads(found)}


def body(html):
    """The page without plotly.js and the figures."""
    return re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)


def rl_line(step, **more):
    return {
        "step": step, "reward/accuracy": step / 10, "reward/mean": step / 10 + 0.1, "reward/format": 1.0,
        "response/length_mean": 20.0 + step, "policy/kl": 0.01 * step, "logprob/diff_max": 1e-5 * step,
        "logprob/diff_mean": 0.0, "time/rollout_seconds": 2.0, "time/update_seconds": 1.0, "time/step_seconds": 3.5,
    } | more  # fmt: skip


def test_first_two_charts_are_length_and_accuracy(tmp_path):
    write_run(tmp_path, [rl_line(step) for step in range(1, 6)])
    html = write_report(tmp_path).read_text()
    assert re.findall(r'class="plot" id="([^"]+)"', html)[:2] == ["response-length", "accuracy"]
    drawn = figures(html)
    assert drawn["accuracy"]["data"][0]["x"] == [1, 2, 3, 4, 5]
    assert drawn["accuracy"]["data"][0]["y"] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert drawn["trainer-against-sampler"]["layout"]["yaxis"]["type"] == "log"
    assert len(drawn["trainer-against-sampler"]["data"]) == 1, "zero has no logarithm"
    assert {trace["name"] for trace in drawn["reward-parts"]["data"]} == {"accuracy", "format"}
    phases = {trace["name"]: trace["y"] for trace in drawn["time-by-phase"]["data"]}
    assert phases == {"rollout": [2.0] * 5, "update": [1.0] * 5, "other": [0.5] * 5}
    assert "entropy" not in drawn and "reflection" not in drawn and 'id="samples"' not in html


def test_cards_average_the_ends():
    cards = {card.label: card for card in summary_cards([rl_line(step) for step in range(1, 11)], 20)}
    assert (cards["Accuracy"].before, cards["Accuracy"].value) == ("30.0%", "80.0%")
    assert (cards["Response length, tokens"].before, cards["Response length, tokens"].value) == ("23.0", "28.0")
    assert (cards["Steps"].value, cards["Steps"].note) == ("10", "of 20")
    assert (cards["Time in steps"].value, cards["Time in steps"].note) == ("35.0 s", "3.50 s a step")
    assert cards["Max log-prob difference"].value == "1.0e-04"


def test_cards_prefer_evaluations():
    lines = [{"step": 0, "eval/accuracy": 0.25}, rl_line(1), rl_line(2, **{"eval/accuracy": 0.75})]
    cards = {card.label: card for card in summary_cards(lines, None)}
    assert (cards["Accuracy"].before, cards["Accuracy"].value) == ("25.0%", "75.0%")
    assert "evaluation" in cards["Accuracy"].note and "training" in cards["Response length, tokens"].note


def test_evaluations_are_markers_with_intervals(tmp_path):
    ends = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.7}
    write_run(tmp_path, [{"step": 0, **ends}, rl_line(1), rl_line(2, **ends)])
    html = write_report(tmp_path).read_text()
    trace = figures(html)["accuracy"]["data"][1]
    assert (trace["mode"], trace["x"], trace["y"]) == ("markers", [0, 2], [0.5, 0.5])
    assert trace["error_y"]["array"] == pytest.approx([0.2, 0.2])
    assert trace["error_y"]["arrayminus"] == pytest.approx([0.1, 0.1])
    assert re.search(r"<th>eval/accuracy</th><td[^>]*>0.5</td><td[^>]*>0.5</td>", html)


def test_evaluations_of_their_own_file(tmp_path):
    write_run(tmp_path, [rl_line(1), rl_line(2, **{"eval/accuracy": 0.75})])
    lines = [{"step": 0, "eval/accuracy": 0.25}, {"step": 2, "eval/accuracy": 0.75}]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = write_report(tmp_path).read_text()
    marks = figures(html)["accuracy"]["data"][-1]
    assert (marks["x"], marks["y"]) == ([0, 2], [0.25, 0.75])
    assert figures(html)["kl-from-the-reference"]["data"][0]["x"] == [1, 2]
    assert "25.0% → </span>75.0%" in html and "step <b>2</b>" in html


def test_base_stage(tmp_path):
    times = {"time/step_seconds": 0.1, "time/update_seconds": 0.1}
    lines = [{"step": step, "train/loss": 4.0 / step, **times} for step in (20, 40, 60)]
    lines[-1]["probe/steps"] = 0.985
    html = write_report(write_run(tmp_path, lines)).read_text()
    assert {"loss", "time-by-phase", "skill-probes"} == set(figures(html))
    assert "0.2000 → </span>0.0667" in html and "98.5%" in html
    assert training_seconds(lines) == pytest.approx(6.0), "each line stands for 20 steps"


def test_everything_is_escaped(tmp_path):
    run = RunDirectory(write_run(tmp_path / "a<b>&", [rl_line(1, **{"reward/</script><b>": 1.0})]))
    run.write_config({"stage": EVIL, "steps": 2, "model": {"path": EVIL}})
    sample = {
        "prompt_id": "p", "question": EVIL, "answers": [EVIL], "response": f"<think> {EVIL} </think>", "tokens": 3,
        "finish_reason": "length", "reward": None, "parts": {}, "status": "failed",
    }  # fmt: skip
    run.samples.write_text("".join(json.dumps({"step": step, **sample}) + "\n" for step in (1, 5)))
    html = write_report(run.path).read_text()
    assert EVIL not in html and html.count("<script>") == html.count("</script>") == 2
    assert {trace["name"] for trace in figures(html)["reward-parts"]["data"]} >= {"</script><b>"}
    page = body(html)
    assert page.count("&lt;script&gt;") == 3 + 2 + 2 * 3, "title, head; config; three texts of two samples"
    assert EVIL in unescape(page)
    assert page.count('<span class="tag">&lt;think&gt;</span>') == 2
    assert "reward failed" in page and "truncated" in page


def test_samples_of_the_first_and_last_step(tmp_path):
    write_run(tmp_path, [rl_line(step) for step in (1, 2, 3)])
    sample = {"prompt_id": "p", "answers": ["4"], "tokens": 3, "finish_reason": "stop", "status": "ok"}
    with (tmp_path / "samples.jsonl").open("w") as file:
        for step in (1, 2, 3):
            for index in range(6):
                texts = {"question": f"question {step}.{index}", "response": f"response {step}.{index}"}
                scores = {"reward": 1.1, "parts": {"accuracy": float(step == 3), "format": 0.5}}
                file.write(json.dumps({"step": step, **sample, **texts, **scores}) + "\n")
    page = body(write_report(tmp_path).read_text())
    assert re.findall(r"question \d\.\d", page) == [f"question {s}.{i}" for s in (1, 3) for i in range(4)]
    assert page.count('class="good">correct') == 4 and page.count('class="bad">wrong') == 4
    assert "format 0.50" in page and "gold 4" in page


def test_a_run_that_goes_on(tmp_path):
    """A torn last line, values that were not finite, and a status of running are no obstacle."""
    write_run(tmp_path, [rl_line(1), rl_line(2, **{"policy/kl": float("nan")}), rl_line(3)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/me')
    run = RunDirectory(tmp_path)
    run.write_status("running", 3)
    run.write_environment(0)
    run.write_environment(2)
    html = write_report(tmp_path).read_text()
    assert figures(html)["kl-from-the-reference"]["data"][0]["y"] == [0.01, None, 0.03]
    assert '<span class="pill running">running</span>' in html and "from step 2" in html and "torch" in html


def test_nothing_to_report(tmp_path):
    with pytest.raises(DataError, match="no such run directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match="nothing to report yet"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="nothing to report yet"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = body(write_report(write_run(tmp_path, [rl_line(1)])).read_text())
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|\bsrc=|<link|@import|url\(", page)


def test_running_mean_is_centred():
    assert running_mean([1.0, 2.0, 6.0, None, 4.0, 8.0], 2) == [1.5, 3.0, 4.0, 5.0, 6.0, 6.0]
    assert running_mean([None], 4) == [None]


def test_one_chart_is_never_alone_in_half_a_row():
    charts = build_charts([rl_line(1, **{"response/reflection_fraction": 0.5})])
    rows = {}
    for chart in charts:
        rows.setdefault(chart.section, []).append(chart.wide)
    assert all(sum(not wide for wide in section) % 2 == 0 for section in rows.values()) and rows["Reasoning"] == [True]


def test_the_slowest_rank_is_named():
    lines = [
        {"step": step, "time/step_seconds": 9.0}
        | stragglers(
            {"rollout": [2, 2, 6, 2] if step < 4 else [3, 2, 2, 2], "update": [5, 5, 5, 5.1], "step": [9, 9, 9, 9]}
        )
        for step in range(1, 5)
    ]
    (card,) = [card for card in summary_cards(lines, 4) if card.label == "Slowest rank"]
    assert card.value == "rank 2"
    assert card.note == "rollout, in 3 of 4 steps; the slowest took 2.62 times the median"
    assert "Slowest rank and median" in [chart.title for chart in build_charts(lines)]
