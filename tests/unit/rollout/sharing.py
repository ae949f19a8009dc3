"""Generators that share experts, with what a step asks of them: unequal work, work that is shared, a cut, errors of one of them.

Every rank of a job calls these together.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from r1mega.errors import GenerationError
from r1mega.observe.trace import PhaseTimer
from r1mega.rollout.open_groups import NEVER
from r1mega.rollout.sampler import GroupSampler, StepCut
from r1mega.types import GenerationRequest, Prompt, Reward, RewardStatus, SamplingSettings


class Words:
    """A tokenizer whose tokens are numbers."""

    eos_token_id, end_token_ids = 0, (0,)

    def decode(self, token_ids):
        return " ".join(map(str, token_ids))


class Scorer:
    def submit(self, prompt, response, text):
        return 0

    def flush(self): ...

    def result(self, ticket):
        return Reward(1.0, {}, RewardStatus.OK)


def sample_together(engine) -> None:
    """Steps with and without a cut say what the engine says of each prompt alone, or the first tokens of it. Of the
    generators that share experts the first has a group, and where they are the job's first ones two more, of which it learns as it
    goes on; the others have nothing.
    """
    sampling = SamplingSettings(temperature=1.0, max_tokens=9)
    prompts = [Prompt(str(i), "", ("",), "math", None, tuple(range(3 + i, 12 + 2 * i))) for i in range(3)]
    alone = [engine.generate([GenerationRequest(prompt.token_ids, 2, 5, sampling)])[0] for prompt in prompts]
    sampler = GroupSampler(engine, Words(), Scorer(), sampling, 2, PhaseTimer())
    has_work = dist.get_rank() % engine.ep < engine.tp
    is_slower = dist.get_rank() < engine.ep
    asked = []

    def decide(fewest, held):
        known = torch.tensor(min(fewest, held))
        dist.all_reduce(known, dist.ReduceOp.MIN)
        asked.append(fewest)
        return (4 if known >= 4 else None), bool(known < NEVER)

    for cut in (None, StepCut(2, decide)):
        groups = [sampler.open(prompt, 5) for prompt in prompts]
        waiting = groups[1:] if is_slower and has_work else []
        found = sampler.advance(
            groups[:1] if has_work else [], 0, cut, more=lambda waiting=waiting: [waiting.pop(0)] if waiting else []
        )
        assert len(found) == has_work * (3 if is_slower else 1) and not waiting
        for group in found:
            for member, whole in zip(group.members, alone[prompts.index(group.prompt)], strict=True):
                tokens = tuple(member.token_ids)
                assert tokens == whole.token_ids[: len(tokens)] and len(tokens) == min(
                    len(whole.token_ids), 4 if cut else 9
                )
                assert max(abs(a - b) for a, b in zip(member.log_probs, whole.log_probs, strict=False)) < 1e-4
    everyone = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, len(asked))
    assert len(set(everyone)) == 1 and (has_work or asked[1:] == [NEVER] * (len(asked) - 1))


def fail_apart(engine, requests) -> list[str]:
    """What each rank says where the last one fails: over a request, a sequence, what is asked for more, and what takes a response."""
    fails = dist.get_rank() == dist.get_world_size() - 1
    bad = dataclasses.replace(requests[0], prompt_token_ids=())

    def refill():
        raise GenerationError("no more")

    def taking():
        stream = engine.stream(requests)
        for _ in stream:
            if fails:
                stream.throw(GenerationError("not taken"))

    calls = (
        lambda: engine.generate([bad] if fails else requests),
        lambda: engine.prompt_log_probs([(1,)] if fails else [(1, 2, 3)]),
        lambda: list(engine.stream(requests, refill=refill if fails else None)),
        taking,
    )
    said = []
    for call in calls:
        try:
            call()
        except GenerationError as error:
            said.append(str(error))
    return said
