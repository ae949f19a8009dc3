"""Records that pass between the stages, in the order in which the data flows, and what the stages ask of a generator.

    Prompt -> GenerationRequest -> Response -> Reward -> RolloutGroup -> TrainingSample -> (train/packing.py) Microbatch

The examples are of one prompt, "2 + 2?", two responses, one of them right.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file, rendered and tokenised.

    answers: the accepted golds (at least one for verifiable kinds). language: target language of the chain of thought
    (ISO 639-1) or None. metadata: the other keys of the line (tests, constraints, ...), untouched.

    Example: Prompt("gsm8k-7", "2 + 2?", ("4",), "math", "en", token_ids=(1, 17, 9, 17, 30))
    """

    id: str
    question: str
    answers: tuple[str, ...]
    kind: str
    language: str | None
    token_ids: tuple[int, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How to sample. stop_token_ids end a response and belong to it; max_tokens bounds it (tokens).

    What is drawn from is cut in the order min_p (of at least so much of the likeliest one's probability), top_k, top_p; None: not.
    max_kept: responses tell what was kept (`Response.kept`), which is bounded by it as by top_k. Beside the bound a generator may keep
    ids as likely as the last one (on a CPU it does, on a GPU it cuts to the bound): they are told too, and are an error where there is
    no room for them (`rollout.kept`).

    Example: SamplingSettings(temperature=1.0, top_p=1.0, max_tokens=2048, stop_token_ids=(2,))
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    top_k: int | None = None
    min_p: float | None = None
    max_kept: int | None = None

    @property
    def most_kept(self) -> int | None:
        """The smaller of top_k and max_kept; ids as likely as the last one: kept on a CPU, cut to the bound on a GPU. None: no bound."""
        return min((bound for bound in (self.top_k, self.max_kept) if bound is not None), default=None)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`num_samples` responses to one prompt. The seed alone (with the sampling settings) determines them.

    first_sample: the number of the first one; the others follow. begun: tokens of a response that was left unfinished, which this
    one (num_samples is 1) goes on from: they count in max_tokens and for stop strings, and are not sampled again.

    Example: GenerationRequest((1, 17, 9, 17, 30), num_samples=2, seed=5, sampling=SamplingSettings(max_tokens=2048))
    """

    prompt_token_ids: tuple[int, ...]
    num_samples: int
    seed: int
    sampling: SamplingSettings
    first_sample: int = 0
    begun: tuple[int, ...] = ()


@dataclass(slots=True)
class Cut:
    """When a generator leaves responses unfinished. `reached` is asked after every `every` passes of the model while samples
    run, and where generators share their passes as long as one of any of them does, with the fewest new tokens that one of
    its own has (`NEVER` of rollout/open_groups.py where none runs); at True the stream yields what each has so far (UNFINISHED) and
    ends. A generator may ask later, or never, and so sample more than is wanted: who asked takes what he wants of it.

    Example: Cut(64, lambda fewest: fewest >= 512) ends a stream once all samples are finished or have 512 new tokens
    """

    every: int
    reached: Callable[[int], bool]


Refill = Callable[[], Sequence[GenerationRequest]]
"""Further requests of a stream, [] once there are none. Asked before a pass of the model while the generator has room for a
sample and none waits; their indices count on from those that came before.
"""


UNFINISHED = "unfinished"
"""The finish reason of a response that a `Cut` ended."""


@dataclass(frozen=True, slots=True, eq=False)
class KeptIds:
    """The ids that were drawn from, token by token of a response, where the sampler cut the vocabulary.

    counts: [tokens] int32; ids: [sum of counts] int32, the tokens' lists one after the other, each strictly increasing, with the
    token itself in it. A count of 0: the whole vocabulary.

    Example: of three tokens, of which the second was certain: KeptIds(array([2, 1, 3]), array([4, 21, 4, 2, 7, 9]))
    """

    counts: np.ndarray
    ids: np.ndarray

    @classmethod
    def whole(cls, num_tokens: int) -> KeptIds:
        """Of tokens that were drawn from the whole vocabulary."""
        return cls(np.zeros(num_tokens, np.int32), np.zeros(0, np.int32))

    @classmethod
    def of(cls, lists: Sequence[np.ndarray]) -> KeptIds:
        """A list a token."""
        counts = np.array([len(one) for one in lists], dtype=np.int32)
        return cls(counts, np.concatenate([np.zeros(0, np.int32), *lists]).astype(np.int32))

    def __len__(self) -> int:
        return len(self.counts)

    def __add__(self, more: KeptIds) -> KeptIds:
        return KeptIds(np.concatenate([self.counts, more.counts]), np.concatenate([self.ids, more.ids]))

    def first(self, num_tokens: int) -> KeptIds:
        counts = self.counts[:num_tokens]
        return KeptIds(counts, self.ids[: counts.sum()])

    def without_first(self, num_tokens: int) -> KeptIds:
        return KeptIds(self.counts[num_tokens:], self.ids[self.counts[:num_tokens].sum() :])


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response. log_probs: of each sampled token under the distribution it was drawn from.

    finish_reason: 'stop' (a stop token or string) or 'length' (max_tokens reached: truncated). policy_versions: the one that
    sampled each token; empty: the version of its group. A generator returns the tokens after `GenerationRequest.begun` only. routed_experts: [prompt +
    response - 1, MoE layers, top-k], the experts that the generator chose at each position it processed, when router
    replay asks for them. kept: with `SamplingSettings.max_kept`; log_probs are over these ids.

    Example: Response(token_ids=(21, 4, 2), log_probs=(-0.11, -0.69, -0.02), finish_reason="stop")
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: str
    routed_experts: np.ndarray | None = field(default=None, repr=False, compare=False)
    policy_versions: tuple[int, ...] = ()
    kept: KeptIds | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished response and where it belongs: `requests[request_index]`, its sample number `sample_index`.

    Example: Completion(0, 1, response) is the second response to the first request
    """

    request_index: int
    sample_index: int
    response: Response


class GenerationEngine(Protocol):
    """A generator in the trainer's process: `VllmEngine` for training, `TransformersEngine` as the cross-check.

    Temperature 0 is greedy, with the log-probs of temperature 1. Every rank of a generator's tensor-parallel group makes the same calls with the same
    arguments; data-parallel ranks are independent of each other, but where they share experts (`rollout.ep` > `rollout.tp`): then
    all of them generate together, each its own requests, or none.
    """

    def generate(self, requests: Sequence[GenerationRequest]) -> list[tuple[Response, ...]]:
        """The responses to each request, in order. Raises GenerationError for a request that cannot be served."""

    def stream(
        self, requests: Sequence[GenerationRequest], cut: Cut | None = None, refill: Refill | None = None
    ) -> Generator[Completion]:
        """Yields each response as soon as it is finished; leaving the loop early cancels the rest. cut: may end it before.
        refill: what comes when there is room.
        """

    def prompt_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Log-probs of tokens 1.. of each sequence given those before, at temperature 1 (len - 1 values each)."""

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces all weights by full HF-named tensors. Raises WeightSyncError naming what is missing or wrong."""

    def weights_digest(self) -> Mapping[str, int]:
        """Digest (r1mega.weights.digest) of every HF tensor as the generator's own parameters hold it."""

    def sleep(self, *, keep_weights: bool = True) -> None:
        """Frees the KV cache (and, on a GPU, the weights' device memory). Generating then is an error.

        keep_weights: False when all weights are replaced before the next generation: a GPU then drops them instead of
        copying them to host memory and back, and on any platform generating is an error until `update_weights`.
        """

    def wake_up(self) -> None:
        """Undoes `sleep`."""

    def close(self) -> None:
        """Releases all memory; the engine cannot be used again."""


class Deal(Protocol):
    """Has items worked on in blocks, perhaps by several processes, and returns the results in the items' order."""

    def __call__(self, work: Callable[[Sequence[T]], list[U]], items: Sequence[T]) -> list[U]: ...


def by_itself(work: Callable[[Sequence[T]], list[U]], items: Sequence[T]) -> list[U]:
    """A `Deal` of one process."""
    return work(items)


@runtime_checkable
class WritableEngine(GenerationEngine, Protocol):
    """A generator whose own parameters can be written in place: `VllmEngine`. tp, ep: of its layout. fp8: its linear layers hold
    e4m3 blocks and their scales. fp8_cache: it keeps keys and values in 8 bits.
    """

    tp: int
    ep: int
    fp8: bool
    fp8_cache: bool

    def parameters_for_writing(self) -> AbstractContextManager[Mapping[str, torch.Tensor]]:
        """This rank's parameters by the generator's names, all of which are to be filled inside the `with`; at its end they are
        made ready for generation and digested. Left by an error, the generator holds no weights.

        Example: `with engine.parameters_for_writing() as parameters: exchange.run(sources, parameters)`. Raises WeightSyncError
        for parameters that the generator's layout does not cover.
        """


class RewardStatus(enum.StrEnum):
    """A status is not a score: only `OK` carries a value that may be trained on."""

    OK = "ok"
    FAILED = "failed"  # the infrastructure failed (worker died, time-out not caused by the answer); excluded
    UNJUDGED = "unjudged"  # a judge gave no parsable verdict; excluded


@dataclass(frozen=True, slots=True)
class Reward:
    """value: weighted sum of parts (None unless status is OK); parts: unweighted, by name; reason: for a person.

    Example: Reward(1.1, {"accuracy": 1.0, "format": 1.0}, RewardStatus.OK), and of a judge that could not be reached
    Reward(None, {"format": 1.0}, RewardStatus.FAILED, "judge: no answer within 120 s")
    """

    value: float | None
    parts: Mapping[str, float]
    status: RewardStatus
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The responses to one prompt, their texts and rewards, and the (last) policy version that sampled them. slot: its place among
    the groups of its step, over all generators and rounds of sampling.

    Example: RolloutGroup(prompt, (right, wrong), ("4", "5"), (Reward(1.1, ...), Reward(0.1, ...)), policy_version=11), in step 12
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    texts: tuple[str, ...]
    rewards: tuple[Reward, ...]
    policy_version: int
    slot: int = 0


@dataclass(frozen=True, slots=True)
class SampleSummary:
    """What every rank knows of a sample of the step, whichever has its tokens; the fields are those of `TrainingSample`.

    num_tokens: of prompt and response; generator: which one has it (the ranks of all count from 0); has_routing: whether
    it carries routed experts; num_kept: ids in its lists of kept ones, 0 where it carries none.

    Example: of the sample below, made by the only generator: SampleSummary(0, 0, 8, 5, 1.0, 1.1, opens_group=True)
    """

    generator: int
    slot: int
    num_tokens: int
    prompt_length: int
    advantage: float
    reward: float
    opens_group: bool = False
    has_routing: bool = False
    num_kept: int = 0

    @property
    def response_length(self) -> int:
        return self.num_tokens - self.prompt_length


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSample:
    """One response ready for the update.

    token_ids: [prompt + response] int32; advantage: the same for every response token; sampler_log_probs: [response]
    float32, as the generator reported them (of token_ids[prompt_length:]). routed_experts, kept: see `Response`. slot: of its group.
    reward: its value; opens_group: the first sample of a prompt, the others follow it.

    Example: of the group above, mean 0.6 and standard deviation 0.5: TrainingSample(array([1, 17, 9, 17, 30, 21, 4, 2]), 5,
    advantage=1.0, sampler_log_probs=array([-0.11, -0.69, -0.02])), and -1.0 for the other
    """

    token_ids: np.ndarray
    prompt_length: int
    advantage: float
    sampler_log_probs: np.ndarray
    routed_experts: np.ndarray | None = None
    slot: int = 0
    reward: float = 0.0
    opens_group: bool = False
    kept: KeptIds | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def response_length(self) -> int:
        return self.num_tokens - self.prompt_length

    def summary(self, generator: int = 0) -> SampleSummary:
        """What other ranks are told of it."""
        return SampleSummary(
            generator, self.slot, self.num_tokens, self.prompt_length, self.advantage, self.reward, self.opens_group,
            self.routed_experts is not None, 0 if self.kept is None else len(self.kept.ids),
        )  # fmt: skip
