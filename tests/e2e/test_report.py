"""The report as a browser shows it: headless Chromium, no network, plots drawn with the run's data."""

import re
import shutil
import subprocess

import pytest

from r1mega.observe.metrics import MetricsWriter
from r1mega.observe.report import write_report
from r1mega.observe.run import RunDirectory
from r1mega.observe.samples import SamplesWriter
from r1mega.types import Prompt, Response, Reward, RewardStatus, RolloutGroup

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian package chromium)")

ACCURACY = [0.125, 0.5, 0.25, 1.0]
LENGTH = [16.0, 24.0, 20.0, 32.0]


def dump_dom(page, profile):
    """The document after its scripts have run, in a browser that reaches no host (and has no network where the machine
    lets us take it away).
    """
    without_network = ["unshare", "--user", "--map-root-user", "--net"]
    allowed = False
    if shutil.which("unshare"):
        allowed = subprocess.run([*without_network, "true"], capture_output=True).returncode == 0
    command = [
        *(without_network if allowed else []), BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu",
        "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}",
        "--window-size=1300,2000", "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def plots(dom):
    """The DOM text of each plot by its id."""
    parts = re.split(r'<div class="plot[^"]*" id="([^"]+)"', dom)
    return {name: text.split("</figure>")[0] for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def line_points(plot):
    """Pixel positions of the points of each line in a plot."""
    paths = re.findall(r'<path class="js-line"[^>]* d="([^"]+)"', plot)
    lines = [[tuple(map(float, p.split(","))) for p in re.findall(r"[-\d.]+,[-\d.]+", path)] for path in paths]
    return [line for line in lines if len(line) > 1]  # the legend's strokes have one point


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    run.write_config({"stage": "zero", "steps": 4, "run_dir": "runs/zero", "model": {"path": "runs/base/hf"}})
    run.write_environment()
    run.write_status("finished", 4)
    prompt = Prompt("p", "1 + 1 = ?", ("2",), "math", "en", (1,))
    reward = Reward(1.1, {"accuracy": 1.0, "format": 1.0}, RewardStatus.OK)
    text = "<think> <img src=x onerror=\"document.title='owned'\"> </think> <answer> 2 </answer>"
    group = RolloutGroup(prompt, (Response((5, 6), (-0.1, -0.1), "stop"),), (text,), (reward,), 0)
    with MetricsWriter(run.path, tensorboard=False) as metrics, SamplesWriter(run.path) as samples:
        for step, (accuracy, length) in enumerate(zip(ACCURACY, LENGTH, strict=True), start=1):
            metrics.write(step, {
                "reward/accuracy": accuracy, "reward/format": 1.0, "reward/mean": accuracy + 0.1,
                "response/length_mean": length, "policy/kl": 0.01 * step, "policy/entropy": 1 / step,
                "logprob/diff_max": 3e-5 / step, "logprob/diff_mean": 1e-6, "expert/load_max_over_mean": 1.5,
                "response/reflection_fraction": 0.25, "response/mixed_language_fraction": 0.5,
                "time/rollout_seconds": 1.0, "time/update_seconds": 0.5, "time/step_seconds": 1.6,
            })  # fmt: skip
            samples.write(step, [group], 1)
    return run.path


@pytest.fixture(scope="module")
def dom(run_dir, tmp_path_factory):
    return dump_dom(write_report(run_dir), tmp_path_factory.mktemp("browser") / "profile")


@needs_browser
def test_plots_are_drawn_from_the_data(dom):
    drawn = plots(dom)
    expected = [
        "response-length", "accuracy", "reward", "reward-parts", "reflection", "language-mixing",
        "kl-from-the-reference", "entropy", "trainer-against-sampler", "expert-load", "time-by-phase",
    ]  # fmt: skip
    assert list(drawn) == expected
    for name, plot in drawn.items():
        assert 'class="main-svg"' in plot, f"{name} has no svg"
    for name, values in (("response-length", LENGTH), ("accuracy", ACCURACY)):
        (line,) = line_points(drawn[name])
        heights = [line[0][1] - y for _, y in line]
        scale = heights[-1] / (values[-1] - values[0])
        assert scale > 0, f"{name}: larger values are drawn higher"
        assert heights == pytest.approx([scale * (value - values[0]) for value in values], abs=0.6)
        widths = [b[0] - a[0] for a, b in zip(line, line[1:], strict=False)]
        assert widths == pytest.approx([widths[0]] * 3, abs=0.6) and widths[0] > 50
    assert len(line_points(drawn["reward-parts"])) == 2 and len(line_points(drawn["trainer-against-sampler"])) == 2
    assert drawn["time-by-phase"].count('class="point"') == 3 * 4, "rollout, update, other; four steps"


@needs_browser
def test_text_of_samples_stays_text(dom):
    assert "<title>owned" not in dom and "<img" not in dom.split("<main>")[1].split("<script>")[0]
    assert dom.count("&lt;img src=x onerror=") == 2


@needs_browser
def test_the_check_would_notice_a_page_without_plots(run_dir, tmp_path):
    """The same page with its plotly.js gone draws nothing: the tests above look at what the browser drew."""
    html = write_report(run_dir).read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(html.replace("Plotly.newPlot(", "Missing.newPlot("))
    assert not any("main-svg" in plot for plot in plots(dump_dom(broken, tmp_path / "profile")).values())
