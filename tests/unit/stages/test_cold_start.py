"""The ways of asking: shares, examples and beginnings of responses in the tokens; what is too long with its examples."""

import contextlib
import json
from collections import Counter
from types import SimpleNamespace

import pytest

from r1mega.config.load import load_config
from r1mega.data import nano_tokenizer
from r1mega.data.filters import Candidate
from r1mega.data.prompts import load_prompts
from r1mega.errors import DataError
from r1mega.observe.trace import PhaseTimer
from r1mega.platform import groups
from r1mega.stages import cold_start
from r1mega.stages.cold_start import pose
from r1mega.stages.data_factory import DataFactory
from r1mega.types import Completion, Response, Reward, RewardStatus

EXAMPLE = json.dumps({"question": "a 5", "response": "<think> try a 5 yes </think> <answer> 5 </answer>"})


@pytest.fixture
def ask(tmp_path):
    """A function: prompts posed by configs/nano/cold_start.yaml with overrides; 100 short questions and a long one."""
    nano_tokenizer.train_tokenizer(tmp_path)
    (tmp_path / "example.jsonl").write_text(EXAMPLE)
    questions = [f"which of a {i % 10} b 1" for i in range(100)] + ["which of " + "a 5 " * 20]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"question": q, "answer": "1", "id": str(i)}) + "\n" for i, q in enumerate(questions))
    )
    ways = f"prompting=[{{share: 3}},{{share: 1,response_prefix: <think>}},{{share: 1,few_shot: {tmp_path}/example.jsonl}}]"

    def posed(*overrides):
        config = load_config("configs/nano/cold_start.yaml", [
            f"model.path={tmp_path}", f"data.prompts=[{tmp_path}/p.jsonl]", ways, *overrides,
        ])  # fmt: skip
        factory = DataFactory(config, None)
        return factory.tokenizer, pose(config, factory, load_prompts(config.data, factory.tokenizer))

    return posed


def test_ways_and_their_shares(ask):
    tokenizer, posed = ask()
    assert len(posed) == 101
    ways = Counter(p.source for p in posed)
    assert abs(ways["prompting 1"] - 60.6) < 15 and min(ways.values()) > 8 and len(ways) == 3
    for p in posed:
        text = tokenizer.decode(list(p.prompt.token_ids))
        assert text.endswith("Assistant: <think>" if p.source == "prompting 2" else "Assistant:")
        assert text.startswith("User: a 5 Assistant: <think> try a 5 yes") == (p.source == "prompting 3")
        assert tuple(p.prompt.token_ids[len(p.prompt.token_ids) - len(p.prefix) :]) == p.prefix
    assert [p.source for p in posed] == [p.source for p in ask()[1]] != [p.source for p in ask("seed=2")[1]]


def test_too_long_with_its_examples(ask, tmp_path, caplog):
    """The long question fits by itself, and not behind the example."""
    limit = ["data.max_prompt_tokens=50", f"prompting=[{{few_shot: {tmp_path}/example.jsonl}}]"]
    assert len(ask(limit[0], "prompting=[{share: 1}]")[1]) == 101
    with pytest.raises(DataError, match="prompt 100 has .* tokens with its examples, data.max_prompt_tokens is 50"):
        ask(*limit)
    _, posed = ask(*limit, "data.on_long_prompt=skip")
    assert [p.prompt.id for p in posed] == [str(i) for i in range(100)]
    assert "1 prompts longer than data.max_prompt_tokens with their examples were skipped" in caplog.text
    with pytest.raises(DataError, match="no prompt is left"):
        ask("data.max_prompt_tokens=20", limit[1], "data.on_long_prompt=skip")


@pytest.mark.parametrize("tokens", [255, 256])
def test_a_rewriting_must_leave_room_for_its_prompt(tokens, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
    overrides = [f"rewrite.model.path={tmp_path}", f"rewrite.model.max_tokens={tokens}"]
    problems = list(load_config("configs/nano/cold_start.yaml", overrides).problems({}, 1))
    assert any("leaves no room for a prompt in the model's context of 256" in p for p in problems) == (tokens == 256)


def test_a_judge_that_is_the_policy_verifies_what_was_rewritten(ask, tmp_path, monkeypatch):
    """The generator is built again for it, asked once for all, and gone afterwards."""
    config = load_config("configs/nano/cold_start.yaml", [
        f"model.path={tmp_path}", f"data.prompts=[{tmp_path}/p.jsonl]", "reward.judge.weight=1", "reward.judge.engine=policy",
        "reward.judge.kinds=[math]", "reward.judge.prompt='{{ question }} {{ response }}'", "reward.pool.num_workers=1",
    ])  # fmt: skip
    factory, asked = DataFactory(config, None), []

    def generate(requests):
        asked.append(len(requests))
        return [(Response((5,), (0.0,), "stop"),) for _ in requests]

    @contextlib.contextmanager
    def engine(*_):
        yield SimpleNamespace(generate=generate)
        asked.append("closed")

    monkeypatch.setattr(factory, "engine", engine)
    prompts = {p.id: p for p in load_prompts(config.data, factory.tokenizer)[:3]}
    text = " <think> a </think> <answer> 1 </answer>"
    candidates = [Candidate(f"{i}/0", i, p.question, text, "math", None, "nano", "", 0) for i, p in prompts.items()]
    groups.init_distributed()
    try:
        verified = cold_start._verified(config, factory, prompts, candidates)
    finally:
        groups.destroy()
    assert asked == [3 * config.reward.judge.votes, "closed"]
    assert [c.id for c in verified] == [c.id for c in candidates] and all(c.tokens > 3 for c in verified)
    assert not any(c.scored for c in verified), "one token is no verdict"
    assert all(c.parts["accuracy"] == 1.0 for c in verified)


def test_samples_are_cut_as_the_rollout_says_and_nothing_is_recorded_of_it(ask, tmp_path, monkeypatch):
    """No update compares them with anything."""
    cut = [
        "rollout.top_p=0.8",
        "rollout.top_k=5",
        "rollout.min_p=0.1",
        "rollout.group_size=2",
        "data.max_prompt_tokens=512",
    ]
    _, posed = ask(*cut)
    config = load_config("configs/nano/cold_start.yaml", [f"model.path={tmp_path}", *cut])
    runtime = SimpleNamespace(
        config=config, run_dir=tmp_path / "run", rank=0, is_main=True, timer=PhaseTimer(), barrier=lambda: None, signalled=False,
        stop_requested=lambda: False, write_metrics=lambda *_: None, begin=lambda *_: None,
        progress=lambda **_: contextlib.nullcontext(),
    )  # fmt: skip
    factory, asked = DataFactory(config, runtime), []

    def stream(requests):
        for index, request in enumerate(requests):
            asked.append(request.sampling)
            yield Completion(index, 0, Response((5,), (0.0,), "stop"))

    reward = Reward(1.0, {}, RewardStatus.OK)
    scorer = SimpleNamespace(submit=lambda *_: 0, result=lambda _: reward, flush=lambda: None)
    engine = SimpleNamespace(stream=stream)
    monkeypatch.setattr(factory, "scorer", lambda **_: contextlib.nullcontext((engine, scorer)))
    groups.init_distributed()
    try:
        assert factory.sample(posed[:2])
    finally:
        groups.destroy()
    assert len(asked) == 4
    assert {(s.top_p, s.top_k, s.min_p, s.max_kept) for s in asked} == {(0.8, 5, 0.1, None)}
