"""Evaluation and generation from a checkpoint on disk, by both engines.

The model (conftest) was taught one completion, so its accuracy is known without asking it: the share of prompts whose
gold is what it always answers.
"""

import dataclasses
import json
import shutil

import pytest

from r1mega.config.rewards import RewardConfig
from r1mega.config.schema import EvaluateConfig
from r1mega.data.template import render
from r1mega.data.tokenizer import load_tokenizer
from r1mega.errors import CheckpointError, ConfigError, DataError
from r1mega.evaluate.result import merge_results, read_result
from r1mega.evaluate.run import evaluate_checkpoint, evaluate_prompts, generate_text
from r1mega.evaluate.source import checkpoint_names, context_length, find_checkpoint
from r1mega.evaluate.table import format_table
from r1mega.observe.registry import find_metric
from r1mega.reward.compose import RewardScorer
from r1mega.rollout.engine import EngineSettings
from r1mega.rollout.sampler import stop_settings
from r1mega.rollout.transformers_engine import TransformersEngine
from r1mega.types import Prompt, SamplingSettings
from tests.unit.evaluate.taught_model import COMPLETION

pytestmark = pytest.mark.heavy

ENGINES = ("transformers", "vllm")


def golds(data):
    return [json.loads(line)["answer"] for line in data.read_text().splitlines()]


def test_find_checkpoint(run_dir, tmp_path):
    source = find_checkpoint(run_dir)
    assert source.path == run_dir / "hf" and find_checkpoint(run_dir / "hf") == source
    assert (source.template, source.stop, source.max_tokens) == ("nano", ("</answer>",), 48)
    assert source.reward == RewardConfig.model_validate({"format": {"weight": 0.5}})
    step = run_dir / "checkpoints" / "step_000010"
    step.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="neither an HF directory"):
        find_checkpoint(step)
    (step / "hf").symlink_to(run_dir / "hf")
    assert find_checkpoint(step).path == step / "hf" and find_checkpoint(step).template == "nano"
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match="no such directory"):
        find_checkpoint(tmp_path / "nowhere")
    shutil.copytree(run_dir / "hf", tmp_path / "alone")
    assert find_checkpoint(tmp_path / "alone").template == "r1_zero"
    (tmp_path / "config.yaml").write_text("rollout: 3")
    with pytest.raises(ConfigError, match="not the config of a run"):
        find_checkpoint(tmp_path / "alone")


@pytest.mark.parametrize("engine", ENGINES)
def test_accuracy_of_a_model_that_always_answers_3(run_dir, data, tmp_path, engine):
    output = tmp_path / "result.json"
    result = evaluate_checkpoint(run_dir, data, num_samples=2, temperature=0.2, output=output, engine=engine)
    expected = sum(gold == "3" for gold in golds(data)) / 24
    assert 0 < expected < 1, "the prompts tell nothing"
    metrics = result.metrics()
    assert metrics["eval/accuracy"] == metrics["eval/consensus"] == pytest.approx(expected)
    assert metrics["eval/format"] == 1.0 and metrics["eval/truncated_fraction"] == 0.0
    assert all(find_metric(name) for name in metrics)
    assert [row.correct for row in result.rows] == [(gold == "3",) * 2 for gold in golds(data)]
    assert all(row.answers == ("3", "3") and row.consensus == "3" for row in result.rows)
    assert read_result(output) == dataclasses.replace(result, settings=read_result(output).settings)
    assert json.loads(output.read_text())["settings"]["template"] == "nano"
    assert f"pass@1             {expected:.4f}" in format_table(result)


@pytest.mark.parametrize("engine", ENGINES)
def test_generate_text(run_dir, engine):
    texts = generate_text(run_dir, "what ?", num_samples=2, temperature=0.05, engine=engine, seed=1)
    assert [text.strip() for text in texts] == [COMPLETION] * 2
    cut = generate_text(run_dir, "what ?", temperature=0.05, max_tokens=2, engine=engine)
    assert len(cut) == 1 and COMPLETION.startswith(cut[0].strip()) and len(cut[0].strip()) < len(COMPLETION)


def test_samples_depend_on_the_prompt_and_seed_alone(run_dir, data):
    """At a high temperature, where samples differ: a part of the prompts, or ranks that share them, get the same."""
    tokenizer = load_tokenizer(run_dir / "hf")
    path = run_dir / "hf"
    engine = TransformersEngine(EngineSettings(path, 192, weights="checkpoint", tokenizer_path=path))
    lines = [json.loads(line) for line in data.read_text().splitlines()][:6]
    prompts = [
        Prompt(x["id"], x["question"], (x["answer"],), "math", None,
               tuple(tokenizer.encode_prompt(render("nano", x["question"])))) for x in lines
    ]  # fmt: skip
    stop_ids, stop_strings = stop_settings(("</answer>",), tokenizer)
    sampling = SamplingSettings(max_tokens=16, stop_token_ids=stop_ids, stop_strings=stop_strings)
    config = EvaluateConfig(num_samples=2, temperature=3.0, top_p=1.0, seed=5)
    with RewardScorer(RewardConfig(), max_response_tokens=16) as scorer:

        def evaluate(subset, settings=config):
            return evaluate_prompts(engine, tokenizer, subset, settings, scorer, sampling)

        whole = evaluate(prompts)
        parts = [evaluate(prompts[rank::2]) for rank in range(2)]
        other = evaluate(prompts, config.model_copy(update={"seed": 6}))
    assert len({text for row in whole.rows for text in row.texts}) > 6, "the samples do not differ"
    assert set(merge_results(parts).rows) == set(whole.rows)
    assert merge_results(parts).metrics() == whole.metrics()
    assert [row.texts for row in other.rows] != [row.texts for row in whole.rows]
    assert whole.settings["temperature"] == 3.0 and whole.settings["max_tokens"] == 16


def test_bad_requests_are_refused_before_an_engine_is_built(run_dir, data, tmp_path):
    with pytest.raises(ConfigError, match="num_samples = 0"):
        evaluate_checkpoint(run_dir, data, num_samples=0)
    with pytest.raises(ConfigError, match="top_p = 1.5"):
        evaluate_checkpoint(run_dir, data, top_p=1.5)
    with pytest.raises(ConfigError, match="max_tokens = 500: the longest prompt leaves"):
        evaluate_checkpoint(run_dir, data, max_tokens=500)
    with pytest.raises(ConfigError, match="its directory does not exist"):
        evaluate_checkpoint(run_dir, data, output=tmp_path / "nowhere" / "result.json")
    with pytest.raises(DataError, match="no such file"):
        evaluate_checkpoint(run_dir, tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match="the longest prompt fills"):
        generate_text(run_dir, "1 " * 300)


def test_context_with_yarn(tmp_path):
    """Qwen's form of YaRN (32,768 positions, factor 4) leaves 131,072 to attend to; DeepSeek-V3's names the product."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    for positions, expected in ((32768, 131072), (163840, 163840)):
        (tmp_path / "config.json").write_text(
            json.dumps({"max_position_embeddings": positions, "rope_scaling": scaling, "model_type": "qwen2"})
        )
        assert context_length(tmp_path) == expected
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="context length is unknown"):
        context_length(tmp_path)


def test_names_of_checkpoints(tmp_path):
    paths = [tmp_path / "a" / "zero" / "hf", tmp_path / "a" / "base" / "hf"]
    assert checkpoint_names(paths) == ["zero", "base"]
    paths.append(tmp_path / "b" / "zero" / "checkpoints" / "hf")
    assert checkpoint_names(paths) == ["a-zero", "a-base", "b-zero"]
    with pytest.raises(ConfigError, match="named twice"):
        checkpoint_names([paths[0], paths[0]])
