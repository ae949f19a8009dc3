"""Prompts -> groups of scored responses. Each response goes to the reward pool while the others are still generated."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from r1mega.config.schema import RolloutConfig
from r1mega.data.tokenizer import Tokenizer, response_text
from r1mega.errors import CheckpointError
from r1mega.observe.trace import PhaseTimer
from r1mega.rollout.journal import Place, RolloutJournal, Segment
from r1mega.rollout.open_groups import NEVER, Member, OpenGroup
from r1mega.types import (
    Completion,
    Cut,
    GenerationRequest,
    Prompt,
    Refill,
    Response,
    Reward,
    RolloutGroup,
    SamplingSettings,
)


class Scorer(Protocol):
    """Scores responses, one ticket each; `reward.compose.RewardScorer` is the one for training."""

    def submit(self, prompt: Prompt, response: Response, text: str) -> int: ...
    def flush(self) -> None: ...
    def result(self, ticket: int) -> Reward: ...


class StreamingEngine(Protocol):
    """What sampling asks of a `GenerationEngine`."""

    def stream(
        self, requests: Sequence[GenerationRequest], cut: Cut | None = None, refill: Refill | None = None
    ) -> Generator[Completion]: ...


MoreGroups = Callable[[], Sequence[OpenGroup]]
"""Further groups for a generator that has room, [] once there are none."""


@dataclass(slots=True)
class StepCut:
    """Where a step leaves responses unfinished. decide: by the fewest tokens that a response of this rank has from this step, of
    those that it samples and of those that it holds (NEVER: of none), the most that a response may have of it (None: not known
    yet), and whether any rank samples still. scores: it reads the rewards of groups whose responses are all finished: those are
    waited for before. length, is_sampling: what it said. surplus: tokens sampled in vain.
    """

    every: int
    decide: Callable[[int, int], tuple[int | None, bool]]
    scores: bool = False
    length: int | None = None
    is_sampling: bool = True
    surplus: int = 0

    def reached(self, fewest: int, held: int) -> bool:
        self.length, self.is_sampling = self.decide(fewest, held)
        return self.length is not None


class GroupSampler:
    """Samples `group_size` responses a prompt and scores them. journal: keeps what is sampled, and gives what an earlier start had."""

    def __init__(
        self,
        engine: StreamingEngine,
        tokenizer: Tokenizer,
        scorer: Scorer,
        sampling: SamplingSettings,
        group_size: int,
        timer: PhaseTimer,
        journal: RolloutJournal | None = None,
    ):
        self._engine, self._tokenizer, self._scorer, self._timer = engine, tokenizer, scorer, timer
        self._sampling, self._group_size, self._journal = sampling, group_size, journal

    def sample(
        self, groups: Sequence[OpenGroup], policy_version: int, more: MoreGroups | None = None
    ) -> list[RolloutGroup]:
        """The groups, and those that `more` gave, whole, in the order of their slots. A group's seed alone (with the weights)
        determines its responses.
        """
        sampled = sorted(self.advance(groups, policy_version, more=more), key=lambda group: group.slot)
        return [group.closed(policy_version) for group in sampled]

    def holds(self, step: int, seed: int) -> bool:
        """See `RolloutJournal.holds`."""
        return self._journal is not None and self._journal.holds(step, seed)

    def open(
        self, prompt: Prompt, seed: int, born: int = 0, slot: int = 0, owner: int = 0, index: int = 0
    ) -> OpenGroup:
        """A group of which nothing is sampled yet; see there."""
        return OpenGroup(index, prompt, seed, born, slot, owner, [Member() for _ in range(self._group_size)])

    def advance(
        self,
        groups: Sequence[OpenGroup],
        policy_version: int,
        cut: StepCut | None = None,
        more: MoreGroups | None = None,
    ) -> list[OpenGroup]:
        """Samples what the groups' responses lack and scores those that are finished. cut: ends it before all are. more: groups of
        which nothing is sampled yet, asked for while the generator has room. Returns all.
        """
        groups, tickets = list(groups), dict[int, int]()
        with self._timer.phase("rollout"):
            self._replay(groups, policy_version)
            self._stream(groups, policy_version, cut, tickets, more)
            while cut is not None and cut.length is None:  # what was sampled again came out longer: held ones go on
                for member in (member for group in groups for member in group.members):
                    member.is_held = False
                self._stream(groups, policy_version, cut, tickets)
            if cut is not None and cut.length is not None:
                cut.surplus = sum(m.cut(cut.length) for group in groups for m in group.members)
            self._write_unfinished(groups, policy_version)
        with self._timer.phase("reward"):
            self._score(groups, policy_version, tickets)
        return groups

    def _replay(self, groups: Sequence[OpenGroup], version: int) -> None:
        """This step's segments as far as an earlier start sampled them."""
        if self._journal is not None:
            self._journal.begin_step(version + 1)
        for group in groups:
            for index, member in enumerate(group.members):
                member.clock, member.is_held = 0, False
                found = None if member.is_finished else self._take(version + 1, group, index)
                if found is not None:
                    self._restore(member, found, version)
                    member.is_held = not member.is_finished

    def _take(self, step: int, group: OpenGroup, index: int) -> Segment | None:
        if self._journal is None:
            return None
        return self._journal.take(Place(step, group.seed, index), len(group.members[index].token_ids))

    def recall(self, group: OpenGroup, through: int) -> None:
        """What steps up to this one sampled of a group, from the journal. CheckpointError when a part of it is missing."""
        for index, member in enumerate(group.members):
            for step in range(group.born, through + 1):
                if member.is_finished:
                    break
                if (found := self._take(step, group, index)) is not None:
                    self._restore(member, found, step - 1)
                else:
                    raise CheckpointError(
                        f"step {through}'s unfinished response {index} to prompt {group.prompt.id} lacks the tokens of step "
                        f"{step} (with rollout.top_p, top_k or min_p: or which ids they were drawn from, which older programs did not "
                        "write): put RUN_DIR/rollouts back beside the checkpoints, or use another run_dir"
                    )

    def _restore(self, member: Member, segment: Segment, version: int) -> None:
        member.add(segment.response, version)
        if member.is_finished:
            member.text, member.reward = self._text(member), segment.reward

    def _text(self, member: Member) -> str:
        return response_text(self._tokenizer, member.response(-1))

    def _stream(
        self,
        groups: list[OpenGroup],
        version: int,
        cut: StepCut | None,
        tickets: dict[int, int],
        more: MoreGroups | None = None,
    ) -> None:
        """Until it is known where the step is cut, or no generator has anything to sample but what it holds. What `more` gives is
        added to the groups.
        """
        requests, asked = self._requests(groups)
        held = min((m.clock for group in groups for m in group.members if m.is_held), default=NEVER)

        def ask(fewest: int) -> bool:
            if cut is None:
                return False
            if cut.scores:
                self._settle(groups, version, tickets)
            with self._timer.phase("rollout_wait"):  # for other generators: the time is theirs
                return cut.reached(fewest, held)

        if ask(0 if requests or more else NEVER):
            return

        def refill() -> list[GenerationRequest]:
            taken = more() if more is not None else ()
            groups.extend(taken)
            further, of = self._requests(taken)
            asked.extend(of)
            return further

        # where a response that was held goes on the engine does not count what it has of the step: the cut is found later
        engine_cut = None if cut is None else Cut(cut.every, ask)
        refilled = None if more is None else refill
        stream = self._engine.stream(requests, engine_cut, refilled)  # also of none: others may share its passes
        try:
            for done in stream:
                group = asked[done.request_index]
                member = group.members[done.sample_index]
                member.add(done.response, version)
                if member.is_finished:
                    self._submit_finished(group, done.sample_index, version, tickets)
        except Exception as error:
            stream.throw(error)  # raises it: the engine tells those that share its passes
        while cut is not None and cut.length is None and cut.is_sampling:  # other generators are still at it
            ask(NEVER)

    def _submit_finished(self, group: OpenGroup, index: int, version: int, tickets: dict[int, int]) -> None:
        member = group.members[index]
        if self._journal is not None:
            self._journal.write(Place(version + 1, group.seed, index), member.new(), member.begun)
        with self._timer.phase("reward"):
            member.text = self._text(member)
            tickets[id(member)] = self._scorer.submit(group.prompt, member.response(version), member.text)

    def _requests(self, groups: Sequence[OpenGroup]) -> tuple[list[GenerationRequest], list[OpenGroup]]:
        """What is to be sampled, and of which group each is. A group that is all to be sampled is one request."""
        requests: list[GenerationRequest] = []
        asked: list[OpenGroup] = []
        for group in groups:
            ask = functools.partial(GenerationRequest, group.prompt.token_ids, seed=group.seed, sampling=self._sampling)
            open_members = [i for i, m in enumerate(group.members) if not m.is_finished and not m.is_held]
            if len(open_members) == len(group.members) and not any(m.token_ids for m in group.members):
                made = [ask(num_samples=len(group.members))]
            else:
                made = [
                    ask(num_samples=1, first_sample=i, begun=tuple(group.members[i].token_ids)) for i in open_members
                ]
            requests += made
            asked += [group] * len(made)
        return requests, asked

    def _write_unfinished(self, groups: Sequence[OpenGroup], version: int) -> None:
        if self._journal is not None:
            for group in groups:
                for index, member in enumerate(group.members):
                    if not member.is_finished and not member.is_held:
                        self._journal.write(Place(version + 1, group.seed, index), member.new(), member.begun)
            self._journal.finish_step()

    def _settle(self, groups: Sequence[OpenGroup], version: int, tickets: dict[int, int]) -> None:
        """The rewards of groups whose responses are all finished, while others are still sampled."""
        with self._timer.phase("reward"):
            done = [group for group in groups if all(member.is_finished for member in group.members)]
            for place, _, member in self._submit(done, version, tickets):
                member.reward = self._scorer.result(tickets.pop(id(member)))
                self._write_reward(place, member)

    def _score(self, groups: Sequence[OpenGroup], version: int, tickets: dict[int, int]) -> None:
        """The rewards of all that is finished, also where it was read without one. Tickets of responses that were cut are given up."""
        waiting = self._submit(groups, version, tickets)
        self._scorer.flush()
        rewards = {key: self._scorer.result(ticket) for key, ticket in tickets.items()}
        for place, _, member in waiting:
            member.reward = rewards[id(member)]
            self._write_reward(place, member)
        if self._journal is not None:
            self._journal.finish_step()

    def _write_reward(self, place: Place, member: Member) -> None:
        if self._journal is not None and member.clock and member.reward is not None:
            self._journal.write_reward(place, member.reward)

    def _submit(
        self, groups: Sequence[OpenGroup], version: int, tickets: dict[int, int]
    ) -> list[tuple[Place, Prompt, Member]]:
        """The finished responses that have no reward; each has a ticket then."""
        waiting = [
            (Place(version + 1, group.seed, index), group.prompt, member)
            for group in groups
            for index, member in enumerate(group.members)
            if member.is_finished and member.reward is None
        ]
        for _, prompt, member in waiting:
            if id(member) not in tickets:
                tickets[id(member)] = self._scorer.submit(prompt, member.response(version), member.text)
        return waiting


def request_seed(run_seed: int, step: int, slot: int) -> int:
    """The seed of the request in place `slot` (counted over all ranks and refill rounds) of a step, in [0, 2^63)."""
    return random.Random(f"{run_seed}/{step}/{slot}").getrandbits(63)


def sampling_settings(rollout: RolloutConfig, tokenizer: Tokenizer, *, trains: bool) -> SamplingSettings:
    """As a config's `rollout` says. trains: what is sampled is compared with log-probs of the trainer, which then have to be over
    the ids that each token was drawn from."""
    return SamplingSettings(
        rollout.temperature, rollout.top_p, rollout.max_response_tokens, *stop_settings(rollout.stop, tokenizer),
        top_k=rollout.top_k, min_p=rollout.min_p or None,
        max_kept=rollout.max_kept_ids if trains and rollout.cuts_vocabulary else None,
    )  # fmt: skip


def stop_settings(stop: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(stop token ids, stop strings): texts that are one token of the vocabulary become ids (no detokenising while
    sampling), the others stay strings; the end tokens of model and tokenizer always stop.
    """
    ids = list(tokenizer.end_token_ids)
    strings = []
    for text in stop:
        # in running text the tag may or may not follow a space: both spellings must be one and the same token
        pieces = {tuple(tokenizer.encode(form)) for form in (text, f" {text}")}
        if all(len(piece) == 1 for piece in pieces):
            ids += [piece[0] for piece in pieces]
        else:
            strings.append(text)
    return tuple(sorted(set(ids))), tuple(strings)
