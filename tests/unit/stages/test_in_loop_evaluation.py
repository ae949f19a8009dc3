"""Evaluations in the loop: what they ask of the rewards, and what one that goes wrong costs."""

import contextlib
import json
import re
from types import SimpleNamespace

import pytest

from r1mega.config.load import load_config
from r1mega.data import nano_tokenizer
from r1mega.data.tokenizer import load_tokenizer
from r1mega.errors import GenerationError
from r1mega.platform import groups
from r1mega.reward.compose import RewardScorer, Verdicts
from r1mega.rollout.sampler import sampling_settings
from r1mega.stages import in_loop_evaluation
from r1mega.stages.in_loop_evaluation import Evaluation
from r1mega.stages.runtime import Runtime
from r1mega.types import Completion, Response

pytestmark = pytest.mark.heavy


class Engine:
    """Says `answer` to everything; it is busy meanwhile, and may be asked for nothing else."""

    def __init__(self, tokenizer, answer):
        self.response = Response((*tokenizer.encode(answer),), (0.0,) * len(tokenizer.encode(answer)), "stop")
        self.busy, self.broken, self.runtime = False, None, None

    def stream(self, requests):
        self.busy = True
        assert self.runtime._doing == "evaluate"  # what the watchdog is told
        for sampling in (
            request.sampling for request in requests
        ):  # cut by evaluate.top_p alone, and nothing is recorded
            assert (sampling.top_p, sampling.top_k, sampling.min_p, sampling.max_kept) == (0.9, None, None, None)
        for index, _ in enumerate(requests):
            yield Completion(index, 0, self.response)
            if self.broken:
                raise self.broken
        self.busy = False

    def generate(self, requests):
        raise AssertionError("the judge was asked in an evaluation")


@pytest.fixture
def evaluate(tmp_path):
    """A function: an evaluation of prompts of these kinds under a run whose judge is the policy; its notes, its engine."""
    nano_tokenizer.train_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    groups.init_distributed()
    scorers = []

    def made(*kinds):
        lines = [{"question": f"a {i % 10}", "answer": "5", "id": str(i), "kind": kind} for i, kind in enumerate(kinds)]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = load_config("configs/nano/zero.yaml", [
            f"model.path={tmp_path}", f"run_dir={tmp_path}", f"data.prompts=[{tmp_path}/p.jsonl]",
            f"evaluate.data={tmp_path}/p.jsonl", "evaluate.num_prompts=null", "reward.judge.weight=1",
            "reward.judge.engine=policy", "reward.pool.num_workers=1", "rollout.top_p=0.8", "rollout.top_k=5", "rollout.min_p=0.1",
            "evaluate.top_p=0.9",
        ])  # fmt: skip
        engine, notes = Engine(tokenizer, " <think> a </think> <answer> 5 </answer>"), []
        runtime = engine.runtime = object.__new__(Runtime)
        runtime.is_main, runtime.run_dir, runtime.note, runtime._doing = True, tmp_path, notes.append, "between"
        phases = SimpleNamespace(within=lambda phase: contextlib.nullcontext())
        scorer = RewardScorer(config.reward, max_response_tokens=64, engine=engine, tokenizer=tokenizer)
        scorers.append(scorer)
        sampling = sampling_settings(config.rollout, tokenizer, trains=True)
        assert sampling.max_kept == 1024
        return Evaluation(config, runtime, engine, tokenizer, scorer, sampling, phases, 0), notes, engine

    yield made
    for scorer in scorers:
        scorer.close()
    groups.destroy()


def test_a_judge_that_is_the_policy_is_not_asked(evaluate, monkeypatch):
    """Of 300 responses the first 44 are graded while the generator still streams."""
    waits = []
    monkeypatch.setattr(in_loop_evaluation, "wait_for_all", lambda *wait: waits.append(wait))
    evaluation, notes, _ = evaluate(*["math", "general"] * 150)
    metrics = evaluation.run(3)
    assert waits == [("rollout", "the evaluation after step 3")], "generators may end hours apart"
    assert metrics["eval/prompts"] == 300 and metrics["eval/accuracy"] == 1.0 and metrics["eval/format"] == 1.0
    (note,) = notes
    length = metrics["eval/length_mean"]
    assert re.fullmatch(
        rf"evaluation after step 3: accuracy 1\.000 \(0\.9\d\d to 1\.000\), {length:.1f} tokens a response", note
    )


def test_the_ranks_of_a_generator_share_the_grading(evaluate, monkeypatch):
    """`tests/dist/test_samples.py` has several of them."""
    shared = []
    monkeypatch.setattr(in_loop_evaluation, "share_scoring", lambda scorer, tp: shared.append((scorer, tp)) or scorer)
    evaluation, _, _ = evaluate("math")
    assert evaluation.run(1)["eval/accuracy"] == 1.0
    assert [(type(scorer), tp) for scorer, tp in shared] == [(Verdicts, 1)]


def test_waiting_for_saves_is_saving():
    runtime, seen = object.__new__(Runtime), []
    runtime._doing, runtime._store = (
        "between",
        SimpleNamespace(wait=lambda: seen.append(runtime._doing), background_seconds=0.0),
    )
    runtime._save_seconds = 0.0
    runtime._finish_saves()
    assert (seen, runtime._doing) == (["save"], "between")


def test_prompts_that_nothing_verifies(evaluate):
    evaluation, notes, _ = evaluate("general", "general")
    metrics = evaluation.run(3)
    assert "eval/accuracy" not in metrics and metrics["eval/format"] == 1.0
    assert notes == ["evaluation after step 3: no response could be judged"]


@pytest.mark.parametrize("error", [GenerationError("the generator is broken"), OSError("the generator is broken")])
def test_an_evaluation_that_fails_costs_nothing_else(evaluate, caplog, tmp_path, error):
    """The next one is graded as if it had not been, and nothing of it is kept."""
    evaluation, _, engine = evaluate("math", "math")
    before = evaluation.run(1)
    engine.broken = error
    assert evaluation.run(2) == {"eval/failed": 1.0}
    assert "the evaluation after step 2 failed; training goes on. rank 0: the generator is broken" in caplog.text
    assert not evaluation._scorer._pending
    engine.broken = None
    assert evaluation.run(3) == before
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]
