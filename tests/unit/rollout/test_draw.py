"""Drawing single samples: what is asked of the engine, which grade belongs to which sample, bounds and stops."""

import pytest

from r1mega.rollout.draw import Draw, draw_samples
from r1mega.types import Completion, Prompt, Response, Reward, RewardStatus, SamplingSettings

KINDS = {"a": "math", "b": "patch", "c": "math"}
PROMPTS = [Prompt(name, f"{name}?", ("1",), kind, None, (place, 7)) for place, (name, kind) in enumerate(KINDS.items())]
DRAWS = [Draw(prompt, index, 10 * place + index, (7,)) for place, prompt in enumerate(PROMPTS) for index in range(4)]
SETTINGS = SamplingSettings(max_tokens=3)


class Words:
    """A tokenizer whose tokens are numbers; 0 ends a response."""

    eos_token_id, end_token_ids = 0, (0,)

    def decode(self, token_ids):
        return " ".join(map(str, token_ids))


class Engine:
    """Answers [seed, eos], the last request first; every third is cut."""

    def __init__(self):
        self.closed, self.calls = False, []

    def stream(self, requests):
        self.calls.append(len(requests))
        try:
            for index in reversed(range(len(requests))):
                request = requests[index]
                assert request.num_samples == 1 and request.sampling is SETTINGS
                cut = request.seed % 3 == 0
                token_ids = (request.seed, 5, 5) if cut else (request.seed, 0)
                yield Completion(index, 0, Response(token_ids, (0.0,) * len(token_ids), "length" if cut else "stop"))
        finally:
            self.closed = True


class Scorer:
    """Value: the first token. Knows how many wait."""

    def __init__(self):
        self.waiting, self.most = {}, 0

    def submit(self, prompt, response, text):
        assert prompt.kind != "patch"
        ticket = (prompt.id, response.token_ids[0])
        self.waiting[ticket] = Reward(float(response.token_ids[0]), {}, RewardStatus.OK, text)
        self.most = max(self.most, len(self.waiting))
        return ticket

    def result(self, ticket):
        return self.waiting.pop(ticket)


def test_every_sample_with_its_own_grade():
    engine, scorer, seen = Engine(), Scorer(), []
    graded = list(draw_samples(engine, Words(), scorer, DRAWS, SETTINGS, on_sample=seen.append, max_ungraded=3))
    assert [g.sample for g in graded] == seen and scorer.most == 4 and engine.closed
    assert [(s.prompt_id, s.index) for s in seen] == [draw.key for draw in reversed(DRAWS)]
    for draw, (sample, reward) in zip(reversed(DRAWS), ((g.sample, g.reward) for g in graded), strict=True):
        cut = draw.seed % 3 == 0
        assert sample.text == (f"7 {draw.seed} 5 5" if cut else f"7 {draw.seed}"), (
            "with its prefix, without the end token"
        )
        assert (sample.length, sample.truncated) == (3 if cut else 2, cut)
        if draw.prompt.kind == "patch":
            assert reward.status == RewardStatus.UNJUDGED and reward.value is None
        else:
            assert reward.value == draw.seed and reward.reason == sample.text
    unscored = list(draw_samples(Engine(), Words(), None, DRAWS, SETTINGS))
    assert [g.sample for g in unscored] == seen and {g.reward.status for g in unscored} == {RewardStatus.UNJUDGED}


def test_the_engine_is_called_without_draws_too():
    """Generators that share experts pass the model together: one that did not come would keep the others waiting."""
    engine = Engine()
    assert list(draw_samples(engine, Words(), Scorer(), [], SETTINGS)) == [] and engine.calls == [0]


def test_a_scorer_that_needs_the_generator_waits_for_its_end():
    engine = Engine()

    class Judge(Scorer):
        def result(self, ticket):
            assert engine.closed
            return super().result(ticket)

    assert len(list(draw_samples(engine, Words(), Judge(), DRAWS, SETTINGS, max_ungraded=10**9))) == len(DRAWS)


def test_an_error_of_the_scorer_ends_the_stream():
    """The engine must be free when the error arrives: it is closed on the way out."""
    engine = Engine()

    class Broken(Scorer):
        def submit(self, prompt, response, text):
            raise RuntimeError("no such kind")

    with pytest.raises(RuntimeError, match="no such kind"):
        try:
            list(draw_samples(engine, Words(), Broken(), DRAWS, SETTINGS))
        finally:
            assert engine.closed


def test_what_is_drawn_before_a_stop_is_graded():
    engine, seen = Engine(), []
    graded = list(
        draw_samples(
            engine, Words(), Scorer(), DRAWS, SETTINGS, on_sample=seen.append, should_stop=lambda: len(seen) == 5
        )
    )
    assert len(seen) == 5 and [g.sample for g in graded] == seen and engine.closed
