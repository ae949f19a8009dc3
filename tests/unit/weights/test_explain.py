"""`r1mega reshard explain`: sums against the single copies, closed forms for DeepSeek-V3, and its cost at 2,048."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from r1mega.cli import app
from r1mega.errors import ConfigError
from r1mega.weights.explain import Bandwidth, summarize
from r1mega.weights.plan import GeneratorLayout, Plan
from r1mega.weights.trainer_layout import TrainerLayout
from tests.unit.weights.brute_force import MOE

pytestmark = pytest.mark.heavy

DEEPSEEK_V3 = {  # config.json as published
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "first_k_dense_replace": 3,
    "moe_layer_freq": 1, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
    "moe_intermediate_size": 2048, "intermediate_size": 18432, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "num_attention_heads": 128, "num_key_value_heads": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "vocab_size": 129280, "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
    "n_group": 8, "topk_group": 4, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
}  # fmt: skip
ATTENTION = 7168 * (1536 + 576) + 1536 + 512 + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
EXPERT = 3 * 7168 * 2048
OUTSIDE = 2 * 129280 * 7168 + 7168
LAYERS = 61 * (ATTENTION + 2 * 7168) + 3 * 3 * 7168 * 18432 + 58 * (257 * EXPERT + 256 * 7168)
NUM_PARAMETERS = OUTSIDE + LAYERS + 58 * 256  # the last: expert biases


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    path = tmp_path / "zero.yaml"
    path.write_text(f"""
stage: zero
run_dir: {tmp_path}/run
model: {{path: {tmp_path}/model}}
data: {{prompts: [{tmp_path}/prompts.jsonl]}}
""")
    return path


def test_the_closed_form_is_the_published_size():
    assert round(NUM_PARAMETERS / 1e9) == 671


def test_sums_are_those_of_the_single_copies():
    trainer, generator = TrainerLayout(8, 2, 2, 1, 2, 1, (0, 0, 1, 1)), GeneratorLayout(8, 2)
    plan = Plan(MOE, trainer, generator, model_dtype=torch.bfloat16, bucket_bytes=1024, ranks_per_node=4)
    summary = summarize(plan, Bandwidth(100.0, 1000.0))
    kept, pairs = np.zeros(8), np.zeros((8, 8))
    staged: dict[int, np.ndarray] = {}
    loads: dict[int, np.ndarray] = {}  # bucket -> [sent, received][inside, between][rank]
    for copy in plan.copies():
        size, source, target = copy.overlap.num_bytes, copy.source, copy.target
        if source == target:
            kept[source] += size
            continue
        pairs[source, target] += size
        link = int(source // 4 != target // 4)
        load = loads.setdefault(copy.bucket, np.zeros((2, 2, 8)))
        load[0, link, source] += size
        load[1, link, target] += size
        staged.setdefault(copy.bucket, np.zeros(8))[[source, target]] += size
    assert (summary.kept == kept).all() and (summary.pairs == pairs).all()
    assert summary.num_buckets == len(loads) > 3
    total = sum(loads.values())
    assert (summary.sent == total[0]).all() and (summary.received == total[1]).all()
    assert summary.peak_buffer_bytes == max((staged[b] + staged.get(b - 1, np.zeros(8))).max() for b in staged)
    seconds = [max(load[:, 0].max() / 1000, load[:, 1].max() / 100) for load in (total, *loads.values())]
    assert summary.seconds == pytest.approx((seconds[0], sum(seconds[1:])))
    assert summary.seconds[0] <= summary.seconds[1]
    assert summary.fan_in.tolist() == [sum(pairs[s, t] > 0 for s in range(8)) for t in range(8)]


def test_bytes_of_deepseek_v3_are_those_of_its_parameters():
    """One replica on 8 ranks with the experts spread: attention and outside parts are whole on each for tp 1."""
    trainer = TrainerLayout(8, 1, 8, 1, 1, 1, (0,) * 61)
    plan = Plan(DEEPSEEK_V3, trainer, GeneratorLayout(8, 1, 8), model_dtype=torch.bfloat16, bucket_bytes=1 << 29)
    summary = summarize(plan, Bandwidth(1e9, 1e9))
    whole = NUM_PARAMETERS - 58 * 256 * EXPERT
    each = 2 * (whole + 58 * 32 * EXPERT) + 2 * 58 * 256  # the biases have 4 bytes
    assert (summary.kept == each).all() and not summary.pairs.any()  # the trainer's experts lie where they are wanted
    plan = Plan(DEEPSEEK_V3, trainer, GeneratorLayout(8, 1, 1), model_dtype=torch.bfloat16, bucket_bytes=1 << 29)
    summary = summarize(plan, Bandwidth(1e9, 1e9))
    assert (summary.received.sum(axis=0) == 2 * 58 * 224 * EXPERT).all()
    assert (summary.fan_in == 7).all()


MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss, file=sys.stderr)
"""
"""Runs a command from a small process: a child's peak memory starts at that of the process which started it."""


@pytest.mark.parametrize("gpus", [256, pytest.param(512, marks=pytest.mark.slow), 2048])
def test_planning_for_the_largest_clusters_is_quick_and_small(config, gpus):
    """The whole command, imports included: under 60 s of CPU and 2 GB."""
    pp = 8 if gpus == 256 else 16
    counts = [61 // (pp - 1)] * (pp - 1) if pp == 16 else [8] * 7
    counts = f"parallel.layers_per_stage={[*counts, 61 - sum(counts)]}"  # uneven: the last stage has the head too
    ep = min(gpus // pp, 64)
    layout = ["parallel.tp=8", f"parallel.pp={pp}", f"parallel.ep={ep}", counts, "rollout.tp=16"]
    command = [sys.executable, "-m", "r1mega", "reshard", "explain", str(config), *layout, "--gpus", str(gpus),
               "--bandwidth", "50"]  # fmt: skip
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    text, (cpu_seconds, peak_kilobytes) = measured.stdout, map(float, measured.stderr.splitlines()[-1].split())
    assert cpu_seconds < 60 and peak_kilobytes < 2e6
    assert f"{gpus} on {gpus // 8} nodes of 8" in text
    moved = float(re.search(r"lower bound +([\d.]+) TB", text)[1])
    per_rank = 2 * (LAYERS + OUTSIDE) / 16  # a little more: what is not cut
    assert 0.9 * gpus * per_rank < moved * 1e12 < 1.1 * gpus * per_rank


@pytest.mark.parametrize(("overrides", "message"), [
    (["parallel.tp=3"], "parallel.tp"),
    (["rollout.tp=3"], "rollout.tp"),
    (["parallel.dp=2", "parallel.tp=8", "--gpus", "8"], "parallel.dp"),
    (["parallel.tp=8", "--gpus", "12"], "12 processes"),
    (["parallel.etp=32", "--fp8"], "FP8 block"),
])  # fmt: skip
def test_what_does_not_fit_is_said(config, overrides, message):
    result = CliRunner().invoke(app, ["reshard", "explain", str(config), *overrides])
    assert isinstance(result.exception, ConfigError), result.output
    assert message in str(result.exception)


@pytest.mark.parametrize("name", ["evaluate", "rejection_sampling", "sft"])
def test_a_stage_that_updates_no_generator_is_refused_by_name(name):
    result = CliRunner().invoke(app, ["reshard", "explain", f"configs/nano/{name}.yaml"])
    assert isinstance(result.exception, ConfigError), result.output
    assert f"stage {name} is no RLStage" in str(result.exception)


def test_the_generators_own_layout_is_told(config):
    """Whole experts over the ranks of a generator, or of several."""

    def generator(*overrides: str) -> str:
        result = CliRunner().invoke(app, ["reshard", "explain", str(config), "parallel.ep=8", *overrides])
        return next(line for line in result.output.splitlines() if line.startswith("generator"))

    assert generator("--gpus", "8").endswith(" 8 x (tp 1, experts cut by tp)")
    assert generator("rollout.tp=4", "rollout.ep=4", "rollout.dp=2").endswith(" 2 x (tp 4, whole experts over ep 4)")
    spread = generator("rollout.tp=2", "rollout.ep=8", "rollout.dp=4")
    assert spread.endswith("4 x (tp 2, whole experts over ep 8, 4 generators share them)")
    result = CliRunner().invoke(app, ["reshard", "explain", str(config), "rollout.dp=2", "--gpus", "8"])
    assert "rollout.dp = 2 with rollout.tp = 1 wants 2 processes, not 8" in str(result.exception)


def test_fp8_halves_the_bytes(config):
    texts = [CliRunner().invoke(app, ["reshard", "explain", str(config), "parallel.ep=8", "--gpus", "8", *more]).output
             for more in ([], ["--fp8"])]  # fmt: skip
    units = {"GB": 1e9, "TB": 1e12}
    means = [re.search(r"receives +[^/]+/ ([\d.]+) (.B)", text).groups() for text in texts]
    wide, narrow = (float(value) * units[unit] for value, unit in means)
    assert 1.95 < wide / narrow < 2.02  # two decimals; scales are 1 / 4096 of the bytes, nothing else is received


def test_sizes_are_those_beside_the_config_while_the_model_is_not_there(config):
    """As shipped: configs/NAME/model/config.json."""
    found = [CliRunner().invoke(app, ["reshard", "explain", str(config), *more, "--gpus", "1"]).output
             for more in ([], ["model.path=not/downloaded"])]  # fmt: skip
    assert found[0].splitlines()[0] == found[1].splitlines()[0] == f"{'model':<28}{config.parent}/model/config.json"
    (config.parent / "model" / "config.json").unlink()
    result = CliRunner().invoke(app, ["reshard", "explain", str(config)])
    assert isinstance(result.exception, ConfigError) and "is missing" in str(result.exception)


def test_the_shipped_config_of_deepseek_v3():
    """512 GPUs: 1,342 GB over 32 ranks a generator are 42 GB; what is not cut comes on top."""
    text = CliRunner().invoke(app, ["reshard", "explain", "configs/deepseek_v3_671b/zero.yaml", "--gpus", "512"]).output
    assert "generator                   16 x (tp 32" in text
    kept, received = (
        float(re.search(rf"{key} +[^/]+/ ([\d.]+) .B", text)[1]) for key in (r"communication\)", "receives"))  # fmt: skip
    assert 42 < kept / 1000 + received < 45
