"""Config files: includes, overrides, and errors that say where and what to do."""

import re
from pathlib import Path

import pytest

from r1mega.config.load import dump_config, load_config
from r1mega.config.schema import Stage
from r1mega.errors import ConfigError

ZERO = """
stage: zero
run_dir: runs/x
model: {path: m}
data:
  prompts: [p.jsonl]
rollout:
  top_p: 0.9
"""


def write(directory, text, name="zero.yaml"):
    path = directory / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "path", sorted({*Path("configs").rglob("*.yaml")} - {*Path("configs").rglob("r1.yaml")}), ids=str
)
def test_every_shipped_config_loads_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    assert isinstance(config, Stage)
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize("page", ["tutorial", "configuration"])
def test_every_config_that_the_documentation_shows_loads(page, tmp_path):
    write(tmp_path, "seed: 1\n", "common.yaml")
    (tmp_path / "here").mkdir()
    blocks = re.findall(r"```yaml\n(.*?)```", Path(f"docs/{page}.md").read_text(), re.DOTALL)
    configs = [text for text in blocks if re.search(r"^stage:", text, re.MULTILINE)]
    assert configs
    for text in configs:
        assert load_config(write(tmp_path / "here", text)).stage == "zero"


def test_overrides_win_over_the_file_and_the_file_over_its_includes(tmp_path):
    write(tmp_path, "seed: 5\nrollout: {top_p: 0.5, group_size: 4}\n", "common.yaml")
    path = write(tmp_path, "include: common.yaml\n" + ZERO)
    config = load_config(path, ["rollout.num_prompts=3", "optimizer.lr=1e-4", "data.prompts=[a.jsonl,b.jsonl]"])
    assert (config.seed, config.rollout.group_size, config.rollout.top_p) == (5, 4, 0.9)
    assert (config.rollout.num_prompts, config.optimizer.lr) == (3, 1e-4)
    assert config.data.prompts == (Path("a.jsonl"), Path("b.jsonl"))


def test_the_later_include_wins(tmp_path):
    write(tmp_path, "seed: 1\nsteps: 1\n", "a.yaml")
    write(tmp_path, "seed: 2\n", "b.yaml")
    config = load_config(write(tmp_path, "include: [a.yaml, b.yaml]\n" + ZERO))
    assert (config.seed, config.steps) == (2, 1)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            ZERO.replace("top_p", "top_pp"),
            [],
            r"zero\.yaml:8: unknown key rollout\.top_pp; did you mean rollout\.top_p\?",
        ),
        (ZERO, ["lr=3"], r"command line: unknown key lr; there is optimizer\.lr"),
        (ZERO, ["rolout.top_p=1"], r"command line: unknown key rolout; did you mean rollout\?"),
        (ZERO.replace("0.9", "lots"), [], r"zero\.yaml:8: rollout\.top_p = 'lots': .*number"),
        (ZERO, ["rollout.top_p=1.5"], r"command line: rollout\.top_p = 1\.5: .*less than or equal to 1"),
        (
            ZERO.replace("stage: zero", "stage: zer0"),
            [],
            r"zero\.yaml:2: stage is 'zer0'; it must be one of base, zero",
        ),
        (ZERO.replace("stage: zero", "stage: nowhere:Mine"), [], r"zero\.yaml:2: stage is .*No module named 'nowhere'"),
        (ZERO.replace("stage: zero", "stage: json:dumps"), [], r"zero\.yaml:2: .* no subclass of r1mega\.config"),
        (ZERO.replace("stage: zero", "stage: r1mega.config.schema:Stage"), [], r"zero\.yaml:2: .*has no function run"),
        (ZERO.replace("stage: zero", "stage: {a: b}"), [], r"zero\.yaml:2: stage is \{'a': 'b'\}; it must be one of"),
        (ZERO.replace("run_dir: runs/x\n", ""), [], "run_dir is missing"),
        (ZERO + "\n  - broken", [], r"zero\.yaml:\d+: not YAML"),
        (
            ZERO,
            ["seed=1", "data.template={{ question }}"],
            r"command line: 'data\.template=\{\{ question \}\}': not YAML \(found unhashable key",
        ),
        (ZERO, ["optimizer.beta1=1"], r"optimizer\.beta1 = 1: .*less than 1"),
        (ZERO, ["novalue"], r"'novalue' is not of the form key\.sub=value"),
        ("include: zero.yaml\n" + ZERO, [], "includes itself"),
        ("include: gone.yaml\n" + ZERO, [], r"gone\.yaml: cannot be read"),
        ("include: 3\n" + ZERO, [], r"zero\.yaml:1: include must be a file name or a list"),
        ("- a list", [], "must be a mapping"),
        (ZERO + "seed: 1\nseed: 2\n", [], r"zero\.yaml:10: seed was given at line 9 already"),
        (ZERO.replace("[p.jsonl]", "p.jsonl"), [], r"zero\.yaml:6: data\.prompts = 'p\.jsonl': must be a list"),
        (ZERO, ["run_dir=${nowhere}/x"], "Interpolation key 'nowhere' not found"),
    ],
)
def test_errors_name_place_and_remedy(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text), overrides)


def test_a_date_stays_the_text_that_was_written(tmp_path):
    text = "stage: evaluate\nrun_dir: x\nmodel: {path: m}\ntasks:\n  livecodebench: {data: d.jsonl, since: 2024-08-01, until: 2025-01-31}\n"
    config = load_config(write(tmp_path, text), ["tasks.livecodebench.until=2025-02-01"])
    assert (config.tasks["livecodebench"].since, config.tasks["livecodebench"].until) == ("2024-08-01", "2025-02-01")


def test_interpolation_sees_what_overrides_say(tmp_path):
    write(tmp_path, "run_dir: runs/y\nmodel: {path: '${run_dir}/hf'}\n", "common.yaml")
    path = write(tmp_path, "include: [common.yaml]\n" + ZERO.replace("model: {path: m}\n", ""))
    assert load_config(path).model.path == Path("runs/x/hf")
    assert load_config(path, ["run_dir=z"]).model.path == Path("z/hf")


def test_files_that_include_each_other(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "include: ../zero.yaml\n", "other.yaml")
    with pytest.raises(ConfigError, match="includes itself"):
        load_config(write(tmp_path, "include: sub/other.yaml\n" + ZERO))


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="bad.yaml: cannot be read"):
        load_config(tmp_path / "bad.yaml")


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="nothing.yaml: cannot be read"):
        load_config(tmp_path / "nothing.yaml")
