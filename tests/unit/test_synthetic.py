"""Inputs of the throughput benchmark: every shipped config of a stage that it can run, and the lengths that it draws."""

import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1mega.config.load import load_config
from r1mega.errors import ConfigError
from r1mega.types import Completion, GenerationRequest, Response, SamplingSettings
from tools import synthetic

CONFIGS = sorted(
    path
    for path in Path("configs").glob("*/*.yaml")
    if (path.parent / "model").is_dir() and any(f"stage: {name}\n" in path.read_text() for name in
                                               ("zero", "reasoning_rl", "align", "sft", "distill"))
)  # fmt: skip


def asked(path, **changes):
    return SimpleNamespace(
        **{
            "config": path,
            "prompt_tokens": None,
            "mean": None,
            "cv": 0.0,
            "lengths": None,
            "dir": Path("none"),
            "steps": 2,
        }
        | changes
    )


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_shipped_config_is_accepted(path):
    """On the processes that its layout wants, without weights or data, and without what only a GPU can compute again."""
    written = load_config(path)
    recompute = written.model.recompute
    if "moe_act" in recompute:  # between grouped products: Transformer Engine's
        recompute = tuple(module for module in recompute if module != "moe_act")
    loaded = written.model_copy(update={"model": written.model.model_copy(update={"recompute": recompute})})
    source, hf = synthetic.architecture_of(loaded, path)
    assert (source.parent.name == "student") == (loaded.stage == "distill")
    inputs = synthetic.sizes(asked(path), loaded, hf)
    config = synthetic.synthetic_config(loaded, inputs, None)
    layout, rollout = config.parallel, getattr(config, "rollout", None)
    world = math.lcm(
        layout.tp * layout.pp * layout.cp * (layout.dp or 1),
        layout.ep * layout.etp * layout.pp,
        rollout.tp if rollout else 1,
    )
    synthetic.check(config, inputs, source.parent, world)
    assert not inputs.directory.exists()


def test_a_layout_that_does_not_fit_is_refused_before_anything_starts():
    path = Path("configs/moonlight_16b/zero.yaml")
    loaded = load_config(path, ["parallel.ep=7"])
    source, hf = synthetic.architecture_of(loaded, path)
    inputs = synthetic.sizes(asked(path), loaded, hf)
    with pytest.raises(ConfigError, match="parallel.ep = 7"):
        synthetic.check(synthetic.synthetic_config(loaded, inputs, None), inputs, source.parent, 7)


def test_lengths_have_the_mean_and_the_spread_asked_for():
    lengths = synthetic.draw_lengths(10**6, 500.0, 0.8, None)
    drawn = [lengths(seed) for seed in range(20000)]
    assert statistics.mean(drawn) == pytest.approx(500, rel=0.03)
    assert statistics.stdev(drawn) / statistics.mean(drawn) == pytest.approx(0.8, rel=0.05)
    assert lengths(7) == lengths(7), "a seed has one length: ranks of a generator must agree"
    assert max(synthetic.draw_lengths(600, 500.0, 0.8, None)(seed) for seed in range(1000)) == 600
    assert {synthetic.draw_lengths(80, None, 0.0, None)(seed) for seed in range(9)} == {80}


def test_lengths_of_a_file(tmp_path):
    file = tmp_path / "lengths"
    file.write_text("3 5\n8\n")
    lengths = synthetic.draw_lengths(8, None, 0.0, file)
    assert {lengths(seed) for seed in range(99)} == {3, 5, 8}
    for content in ("3 9", "0", "", "two"):
        file.write_text(content)
        with pytest.raises(ConfigError, match="lengths"):
            synthetic.draw_lengths(8, None, 0.0, file)
    with pytest.raises(ConfigError, match="mean"):
        synthetic.draw_lengths(8, 9.0, 0.0, None)


def test_each_sample_ends_at_its_own_length_and_comes_back_to_its_place():
    class Engine:
        """Answers in reverse order, with as many tokens as it was told, saying what else it was told."""

        def stream(self, requests, cut=None, refill=None):
            assert all(
                r.num_samples == 1 and r.sampling.stop_token_ids == () == r.sampling.stop_strings for r in requests
            )
            for index in reversed(range(len(requests))):
                request = requests[index]
                response = Response(request.prompt_token_ids * request.sampling.max_tokens, (), "length")
                yield Completion(index, 0, response)

    sampling = SamplingSettings(max_tokens=50, stop_token_ids=(2,), stop_strings=("end",))
    requests = [GenerationRequest((token,), 3, 100 + token, sampling) for token in (7, 8)]
    engine = synthetic.PacedEngine(Engine(), lambda seed: 1 + seed % 40)
    done = list(engine.stream(requests))
    assert sorted((c.request_index, c.sample_index) for c in done) == [(i, j) for i in range(2) for j in range(3)]
    assert all(set(c.response.token_ids) == {7 + c.request_index} for c in done)
    assert len({len(c.response.token_ids) for c in done}) > 2


def test_other_files_are_not_swept_away(tmp_path):
    (tmp_path / "mine").write_text("")
    path = Path("configs/nano/zero.yaml")
    loaded = load_config(path)
    _, hf = synthetic.architecture_of(loaded, path)
    inputs = synthetic.sizes(asked(path, dir=tmp_path), loaded, hf)
    with pytest.raises(ConfigError, match="other files"):
        synthetic.write_inputs(loaded, inputs)
    assert (tmp_path / "mine").exists()
