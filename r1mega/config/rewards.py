"""What a reward is made of: one section a part, the workers, and the sandbox for programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from r1mega.config.schema import NonNegative, NonNegativeInt, Positive, PositiveInt, Section
from r1mega.config.validate import is_given

_MIB = 1 << 20

ACCURACY = {
    "math": "r1mega.reward.math:MathAccuracy",
    "choice": "r1mega.reward.choice:ChoiceAccuracy",
    "logic": "r1mega.reward.choice:ChoiceAccuracy",
    "reasoning_gym": "r1mega.reward.choice:ReasoningGymAccuracy",
    "instruction": "r1mega.reward.instruction:InstructionAccuracy",
    "code": "r1mega.reward.code_accuracy:CodeAccuracy",
}
"""Accuracy part by the prompt's kind. Each is imported when the first prompt of its kind is scored."""

WITHOUT_GOLD = frozenset({"general"})
"""Kinds of prompts whose answers no rule can verify: reward models and judges do."""

JUDGED_BY_KEYS = frozenset({"code", "instruction", "reasoning_gym"})
"""Kinds that are verified by tests, instructions or an entry of the line: what it says as `answer` is not read."""

LINE_CHECKS = {
    "code": "r1mega.reward.code_problem:problem_from",
    "instruction": "r1mega.reward.instruction:check_line",
    "reasoning_gym": "r1mega.reward.choice:check_line",
}
"""(keys of a line, "file:line") -> DataError for a line that cannot be judged; imported when the first of its kind is read."""

PATCH_KIND = "patch"
"""Prompts whose responses are judged by the benchmark's own harness, later and elsewhere."""


class AccuracyReward(Section):
    """Right or wrong, by the prompt's kind. Prompts of kind `general` have no such part."""

    weight: NonNegative = 1.0
    form: Literal["any", "boxed", "tag"] = "any"  # of a math answer: \boxed{}, <answer>, or the tag where there is one
    partial_credit: bool = False  # the share of tests or instructions met, instead of all or nothing
    timeout_seconds: Positive = 5.0  # hard limit of one symbolic comparison
    max_work: NonNegativeInt = 1  # arithmetic that an answer may leave undone: 1 takes 53 + 1 for 54, 0 does not


class FormatReward(Section):
    """Whether reasoning and answer stand between their tags."""

    weight: NonNegative = 0.1
    mode: Literal["strict", "graded"] = "strict"
    prompt_opens_think: bool = False  # the template already ends in <think>


class LanguageReward(Section):
    """The share of words in the wanted language."""

    weight: NonNegative = 0.0
    target: str | None = None  # None: the prompt's language


class OverlongReward(Section):
    """Soft overlong penalty: 0 up to max_response_tokens - buffer_tokens, then linearly to -1 (DAPO, section 3.4)."""

    weight: NonNegative = 0.0
    buffer_tokens: PositiveInt = 4096


class LengthReward(Section):
    """Length shaping: 1 up to free_tokens, then linearly down to 0 at max_response_tokens."""

    weight: NonNegative = 0.0
    free_tokens: NonNegativeInt = 4096


class RepetitionReward(Section):
    """Minus the share of repeated n-grams in the response."""

    weight: NonNegative = 0.0
    ngram: PositiveInt = 20


class NeuralReward(Section):
    """A part that is learned: only for prompts whose answer no rule can verify, and only late, since it can be hacked
    (paper: no neural reward on reasoning; preference rewards in the last 400 of the 1,700 steps)."""

    weight: NonNegative = 0.0
    from_step: PositiveInt = 1  # counts from this step on; paper: 1301 of 1700
    kinds: tuple[str, ...] = ("general",)  # prompts of these kinds


class PreferenceReward(NeuralReward):
    """A reward model: value = sigmoid((score - shift) / scale), so that no score outweighs the other parts."""

    model: Path | None = None  # an HF sequence classifier with one label; what stage `reward_model` exports is one
    backend: Literal["transformers", "megatron"] = "transformers"
    # transformers: whole on each rank; megatron: spread over the ranks in the trainer's layout (exports of the stage)
    shift: float = 0.0
    scale: Positive = 1.0
    batch_size: PositiveInt = 16  # of backend transformers
    microbatch_tokens: PositiveInt = 16384  # packing target of backend megatron
    max_tokens: PositiveInt = 4096  # of prompt and scored text; what is longer is not scored (excluded)
    dtype: Literal["float32", "bfloat16"] = "float32"


class JudgeReward(NeuralReward):
    """A generative judge: a rubric prompt, a parsed verdict, several votes."""

    engine: Literal["endpoint", "policy"] = "endpoint"  # an OpenAI-compatible server, or the colocated generator
    url: str | None = None  # of the endpoint, up to and with /v1
    model: str | None = None  # its name there
    api_key_env: str | None = None  # the environment variable that holds its key
    verdict: Literal["score", "yes_no", "choice"] = "score"
    # score: a number from low to high; yes_no; choice: A or B against the prompt's first answer, or its key `reference`
    low: float = 1.0
    high: float = 10.0
    prompt: str | None = None  # Jinja2 with {{ question }}, {{ response }}, {{ reference }}, {{ first }} and
    # {{ second }} (choice: A and B), {{ low }}, {{ high }}; None: the verdict's own rubric
    reads: Literal["summary", "response"] = "summary"
    votes: PositiveInt = 1
    aggregate: Literal["majority", "mean"] = "majority"
    temperature: NonNegative = 0.7
    max_tokens: PositiveInt = 1024  # of a judgement
    timeout_seconds: Positive = 120.0  # of one request
    max_retries: NonNegativeInt = 4  # after a time-out, 429 or a failure of the server
    num_concurrent: PositiveInt = 16
    extra: dict[str, Any] = {}  # further keys of the request's body


class CustomReward(Section):
    """A part of one's own; docs/extending.md."""

    part: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]  # module:Class, a `reward.parts.Part`
    weight: NonNegative = 1.0
    kinds: tuple[str, ...] | None = None  # prompts of these kinds; None: all
    from_step: PositiveInt = 1  # counts from this step on
    settings: dict[str, Any] = {}  # the class's keyword arguments


class RewardPool(Section):
    """Where rewards are computed that may hang or die."""

    executor: Literal["auto", "processes", "mpi"] = "auto"
    # processes: workers of this rank; mpi: spawned by MPI over all its hosts; auto: mpi when it spans several
    num_workers: PositiveInt = 1  # worker processes a rank, for what needs sympy
    memory_bytes: PositiveInt = 1 << 30  # a worker
    max_retries: NonNegativeInt = 2
    max_pending: PositiveInt = 4096  # back-pressure: submissions wait beyond it


class SandboxConfig(Section):
    """Where and within which limits programs run. A task's own time and memory limits come first."""

    url: str | None = None  # a SandboxFusion service; None: this machine's sandbox
    python: Path | None = None  # interpreter for answers; None: the system's
    libraries: tuple[Path, ...] = ()  # directories bound read-only onto the answers' sys.path
    require_cgroup: bool = False  # refuse to run without a memory cgroup, instead of watching memory by polling
    wall_seconds: Positive = 10.0
    cpu_seconds: PositiveInt = 6  # a process
    memory_bytes: PositiveInt = 512 * _MIB
    output_bytes: PositiveInt = _MIB
    num_processes: PositiveInt = 32
    num_concurrent: PositiveInt = 4  # programs at once a rank


class RewardConfig(Section):
    """Reward = sum of weight * part. A part with weight 0 is not computed (accuracy and format always are)."""

    accuracy: AccuracyReward = AccuracyReward()
    format: FormatReward = FormatReward()
    language: LanguageReward = LanguageReward()
    overlong: OverlongReward = OverlongReward()
    length: LengthReward = LengthReward()
    repetition: RepetitionReward = RepetitionReward()
    helpfulness: PreferenceReward = PreferenceReward()  # reads the final summary only (paper)
    harmlessness: PreferenceReward = PreferenceReward()  # reads the whole response (paper)
    judge: JudgeReward = JudgeReward()
    custom: dict[str, CustomReward] = {}  # by name, as in the metric reward/NAME
    pool: RewardPool = RewardPool()
    sandbox: SandboxConfig = SandboxConfig()

    def problems(self, max_response_tokens: int) -> Iterator[str]:
        """What cannot work across keys."""
        taken = RewardConfig.model_fields.keys() - {"custom"} | {"mean", "std", "excluded_fraction"}
        for name in self.custom:
            if name in taken or not name.isidentifier():
                yield f"reward.custom.{name}: the name of a part must be a word, and none of {', '.join(sorted(taken))}"
        if self.overlong.weight > 0 and self.overlong.buffer_tokens >= max_response_tokens:
            yield (
                f"reward.overlong.buffer_tokens = {self.overlong.buffer_tokens} must be below "
                f"rollout.max_response_tokens = {max_response_tokens}"
            )
        if self.length.weight > 0 and self.length.free_tokens >= max_response_tokens:
            yield (
                f"reward.length.free_tokens = {self.length.free_tokens} must be below "
                f"rollout.max_response_tokens = {max_response_tokens}"
            )
        for name, part in (("helpfulness", self.helpfulness), ("harmlessness", self.harmlessness)):
            if part.weight > 0 and (part.model is None or not is_given(part.model / "config.json")):
                yield (
                    f"reward.{name}.model = {part.model}: no HF sequence classifier there (config.json); stage "
                    "reward_model makes one"
                )
            if part.weight > 0 and part.backend == "megatron" and part.microbatch_tokens < part.max_tokens:
                yield (
                    f"reward.{name}.microbatch_tokens = {part.microbatch_tokens} does not hold the longest text, "
                    f"max_tokens = {part.max_tokens}; raise it"
                )
        judge = self.judge
        if judge.weight > 0 and judge.engine == "endpoint" and (judge.url is None or judge.model is None):
            yield "reward.judge: engine = endpoint wants url (http://host:port/v1) and model"
        if judge.weight > 0 and judge.low >= judge.high:
            yield f"reward.judge: low = {judge.low} must be below high = {judge.high}"
        if judge.weight > 0 and judge.prompt is not None and "{{" not in judge.prompt:
            yield "reward.judge.prompt is no Jinja2 text: it must hold {{ question }} and {{ response }}"
