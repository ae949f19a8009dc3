"""Pipeline files: nodes, edges that follow from paths, overrides, a moved dir, and what is refused."""

import json
import re
from pathlib import Path

import pytest

from r1mega.config.data_factory import DataFactoryStage
from r1mega.config.load import load_config
from r1mega.config.pipeline import check_pipeline, load_pipeline, paths_of
from r1mega.config.stages.evaluate import EvaluateStage
from r1mega.config.stages.rl import RLStage
from r1mega.errors import ConfigError

NANO = "configs/nano/r1.yaml"
FILE = """
name: two
dir: runs/nano
nodes:
  base: {config: %s/configs/nano/base.yaml}
  zero: {config: %s/configs/nano/zero.yaml, overrides: {steps: 7, rollout.temperature: 0.5, reward: {format: {weight: 0.3}}}}
"""


@pytest.fixture
def two(tmp_path):
    path = tmp_path / "r1.yaml"
    path.write_text(FILE % (Path.cwd(), Path.cwd()))
    return path


@pytest.mark.parametrize("path", sorted(Path("configs").rglob("r1.yaml")), ids=str)
def test_every_shipped_pipeline_loads_and_could_run(path):
    pipeline = load_pipeline(path)
    check_pipeline(pipeline, list(pipeline.nodes), dry_run=True)


def test_the_quickstart_is_the_same_on_any_machine_and_takes_a_number_of_ranks():
    """Sums are in another order with other threads or ranks: neither may depend on how many cores there are."""
    pipeline = load_pipeline(NANO)
    assert {node.config.threads for node in pipeline.nodes.values()} == {1}
    alone = {"base", "reward_helpful", "reward_harmless"}
    assert {name: node.ranks for name, node in pipeline.nodes.items()} == {
        name: 1 if name in alone else 2 for name in pipeline.nodes
    }
    assert {node.ranks for node in load_pipeline(NANO, ["ranks=1"]).nodes.values()} == {1}
    other = load_pipeline(NANO, ["ranks=4", "nodes.zero.ranks=3"])
    assert [other.nodes[name].ranks for name in ("base", "zero", "sft")] == [1, 3, 4]


def test_the_documentations_example_could_run(tmp_path):
    example = re.search(r"```yaml\n(.*?)```", Path("docs/pipeline.md").read_text(), re.DOTALL)[1]
    (tmp_path / "mine.yaml").write_text(example.replace("../configs", f"{Path.cwd()}/configs"))
    pipeline = load_pipeline(tmp_path / "mine.yaml")
    check_pipeline(pipeline, list(pipeline.nodes), dry_run=True)
    zero = pipeline.nodes["zero"]
    assert (zero.parents, zero.ranks, zero.config.steps, str(zero.config.run_dir)) == (
        ("base",),
        2,
        20,
        "runs/mine/zero",
    )


def test_a_moved_pipeline_moves_what_is_brought_to_it_too():
    pipeline = load_pipeline("configs/nano/claims/r1.yaml", ["dir=runs/claims/seed2", "overrides.seed=2"])
    check_pipeline(pipeline, list(pipeline.nodes), dry_run=True)
    assert {str(path.parent) for path in pipeline.external} == {"runs/claims/seed2/hacking"}
    assert {node.config.seed for node in pipeline.nodes.values()} == {2}


@pytest.mark.parametrize("path", sorted(Path("configs/deepseek_v3_671b").glob("zero_[0-9]*.yaml")), ids=str)
def test_a_layout_for_another_number_of_ranks_could_run(path, tmp_path):
    file = tmp_path / "r1.yaml"
    external = "external: {models: configs/deepseek_v3_671b/model, data: null}"
    file.write_text(
        f"name: large\ndir: {tmp_path}\n{external}\nnodes:\n  zero: {{config: {path.resolve()}, ranks: {path.stem[5:]}}}\n"
    )
    check_pipeline(load_pipeline(file), ["zero"], dry_run=True)


def test_edges_follow_from_paths(two):
    nodes = load_pipeline(two).nodes
    assert (nodes["base"].parents, nodes["zero"].parents) == ((), ("base",))
    assert {(item.key, str(item.path), item.owner) for item in nodes["zero"].inputs} == {
        ("model.path", "runs/nano/base/hf", "base"),
        ("data.prompts.0", "runs/nano/base/data/train.jsonl", "base"),
        ("evaluate.data", "runs/nano/base/data/eval.jsonl", "base"),
    }


def test_overrides_of_the_file_and_of_the_command_line(two):
    zero = load_pipeline(
        two, ["zero.rollout.temperature=0.7", "overrides.seed=5", "zero.observe.tensorboard=false"]
    ).nodes["zero"]
    assert (zero.config.steps, zero.config.rollout.temperature, zero.config.reward.format.weight) == (7, 0.7, 0.3)
    assert zero.config.seed == 5 and zero.config.observe.tensorboard is False
    assert load_pipeline(two, ["overrides.seed=5"]).nodes["base"].config.seed == 5


@pytest.mark.parametrize(
    "text", ["User: {{ question }} Assistant:", "[{{ question }}]", "7", "null", "a 'b' \"c\" 试 #"]
)
def test_a_text_in_the_files_overrides_stays_that_text(two, text):
    override = json.dumps({"data": {"template": text}}, ensure_ascii=False)
    two.write_text(two.read_text().replace("{steps: 7,", f"{{steps: 7, {override[1:-1]},"))
    assert load_pipeline(two).nodes["zero"].config.data.template == text


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*/r1.yaml")), ids=str)
def test_data_is_decontaminated_against_every_evaluation_set(path):
    """What any node of a shipped recipe is evaluated on, its data stages leave out."""
    configs = [node.config for node in load_pipeline(path).nodes.values()]
    evaluated = {
        task.data for config in configs if isinstance(config, EvaluateStage) for task in config.chosen.values()
    }
    evaluated |= {config.evaluate.data for config in configs if isinstance(config, RLStage) and config.evaluate.data}
    makers = [config for config in configs if isinstance(config, DataFactoryStage)]
    assert makers and evaluated
    for config in makers:
        assert evaluated <= set(config.decontaminate.files), config.run_dir


def test_a_moved_dir_takes_its_paths_along_and_no_others(two):
    pipeline = load_pipeline(two, ["dir=/elsewhere/x"])
    base, zero = (pipeline.nodes[name].config for name in ("base", "zero"))
    assert {str(path) for _, path in paths_of(zero)} == {
        "/elsewhere/x/zero", "/elsewhere/x/base/hf", "/elsewhere/x/base/data/train.jsonl",
        "/elsewhere/x/base/data/eval.jsonl",
    }  # fmt: skip
    assert {str(path) for _, path in paths_of(base)} == {"/elsewhere/x/base", "configs/nano/model"}
    unmoved = load_config(Path("configs/nano/base.yaml"))
    assert base == unmoved.model_copy(update={"run_dir": Path("/elsewhere/x/base")})
    assert pipeline.nodes["zero"].parents == ("base",)


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (("", ""), ["zerro.steps=1"], "did you mean zero"),
        (("", ""), ["steps=1"], "names a node first: base, zero"),
        (("", ""), ["zero.step=1"], r"unknown key step; did you mean steps"),
        (("ranks", "ranks"), ["zero.run_dir=runs/nano/base/x"], "nodes base and zero: run_dir .* not apart"),
        (("", ""), ["base.model.path=runs/nano/zero/hf"], "node base: model.path = runs/nano/zero/hf is made by zero, a later"),
        (("", ""), ["zero.model.path=runs/nano/zero/hf"], "is made by itself"),
        (("name: two", "nam: two"), [], r"r1\.yaml:2: unknown key nam; did you mean name\?"),
        (("base.yaml}", "base.yaml, rank: 2}"), [], r"r1\.yaml:5: nodes\.base\.rank = 2: extra inputs"),
        (("configs/nano/base.yaml", "configs/nano/bse.yaml"), [], "bse.yaml: cannot be read"),
    ],
)  # fmt: skip
def test_what_is_refused(two, change, overrides, message):
    two.write_text(two.read_text().replace(*change) if change[0] else two.read_text())
    with pytest.raises(ConfigError, match=message):
        load_pipeline(two, overrides)


def test_what_an_earlier_node_will_make_is_not_missing_but_its_model_counts(two):
    """Nothing was made: zero's layout and lengths are checked against the model that base will have made."""
    check_pipeline(load_pipeline(two), ["base", "zero"], dry_run=False)
    with pytest.raises(ConfigError, match=r"zero .*max_position_embeddings is\s+256"):
        check_pipeline(load_pipeline(two, ["zero.rollout.max_response_tokens=300"]), ["zero"], dry_run=False)
    with pytest.raises(ConfigError, match=r"zero .*parallel.ep = 3 does not divide"):
        check_pipeline(load_pipeline(two, ["zero.parallel.ep=3"]), ["zero"], dry_run=False)


def test_what_comes_from_elsewhere_is_missing_only_when_it_counts(two, tmp_path):
    two.write_text(two.read_text() + "external: {far/model: configs/nano/model, far/prompts.jsonl: null}\n")
    away = ["zero.model.path=far/model", "zero.data.prompts=[far/prompts.jsonl]"]
    check_pipeline(load_pipeline(two, away), ["zero"], dry_run=True)
    with pytest.raises(ConfigError, match="far/model.*config.json is missing(.|\n)*far/prompts.jsonl is missing"):
        check_pipeline(load_pipeline(two, away), ["zero"], dry_run=False)
    with pytest.raises(ConfigError, match="parallel.ep = 3 does not divide"):
        check_pipeline(load_pipeline(two, [*away, "zero.parallel.ep=3"]), ["zero"], dry_run=True)


def test_the_json_of_paths(tmp_path, two):
    """Keys of lists are numbers, and nothing but paths is found."""
    found = dict(paths_of(load_pipeline(two).nodes["zero"].config))
    assert found["data.prompts.0"] == Path("runs/nano/base/data/train.jsonl")
    assert all(isinstance(path, Path) for path in found.values()) and json.dumps(list(found))
