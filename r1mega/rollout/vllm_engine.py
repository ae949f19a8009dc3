"""vLLM in the trainer's process, behind `GenerationEngine`.

The engine core is driven directly: requests go to it as token ids, and finished tokens and log-probs come back without
vLLM's front end (detokeniser, output aggregation), which costs more than the model when the model is small.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
import torch.distributed as dist

from r1mega.checkpoint.hf import HFTensors
from r1mega.errors import FreshProcessNeeded, GenerationError, PlatformError, StragglerError
from r1mega.platform.generator import vllm_platform
from r1mega.platform.watchdog import tick
from r1mega.rollout.engine import EngineSettings, check_requests, continued_seed, in_order, read_config
from r1mega.rollout.routing import Recorder, ReturnedRouting, RoutingRecorder
from r1mega.rollout.stop_strings import StopStrings
from r1mega.rollout.vllm_arguments import check_settings, keep_config_classes_apart, vllm_arguments
from r1mega.rollout.vllm_groups import (
    SharedPasses,
    destroy_vllm_groups,
    ensure_process_group,
    rank_within,
    shared_names,
)
from r1mega.rollout.vllm_samples import Sample, core_request, fewest_tokens, sampling_params
from r1mega.types import UNFINISHED, Completion, Cut, GenerationRequest, Refill, Response
from r1mega.weights.layout import GeneratorRank, generator_layout, tensor_shapes
from r1mega.weights.transfer import (
    ReloadTarget,
    finish_writing,
    parameters_to_write,
    read_weights,
    reload_weights,
    sum_digests,
)

StepOutputs = list[Any]
"""vLLM's EngineCoreOutput of each sample that a step went on with."""


class VllmEngine:
    """One rank of a vLLM generator.

    Experts may be spread over several attention groups (`EngineSettings.ep` > tp), each with requests of its own. Their ranks
    then call `stream`, `generate` and `prompt_log_probs` together, with no request where a group has none: a group that is done
    goes on with empty passes until the others are.

    On a CPU the same weights, requests and seeds give bitwise the same tokens and log-probs in a new process with the
    same number of threads: nothing of one `stream` call (prefix cache, random state) reaches the next. On a GPU that
    holds only with VLLM_BATCH_INVARIANT=1 in the environment (vLLM then uses slower kernels): without it a sum's order
    depends on what else is in the batch.
    """

    _num_open = 0  # engines of this process; they share vLLM's process groups
    _has_built = False

    def __init__(self, settings: EngineSettings):
        """Builds the engine. Raises GenerationError, ConfigError or PlatformError for what vLLM could not run, and
        FreshProcessNeeded where a process can build one only and this one has."""
        self.settings = settings
        self.tp, self.ep, self.fp8 = settings.tp, settings.ep, settings.quantization == "fp8"
        self.fp8_cache = settings.kv_cache_dtype != "auto"
        self.config = read_config(settings)
        self._platform = vllm_platform()
        check_settings(settings, self.config, self._platform)
        if VllmEngine._has_built and not self._platform.SEVERAL_ENGINES_A_PROCESS:
            error = GenerationError if VllmEngine._num_open else FreshProcessNeeded
            raise error(
                f"{settings.model_path}: vLLM on a GPU builds one engine a process, and this process has had one "
                "(its memory pools and CUDA graphs outlive it); generate with another model in another process"
            )
        self._platform.prepare_environment()
        ensure_process_group()
        self._platform.apply_patches()
        world_size, rank = dist.get_world_size(), dist.get_rank()
        for key, size in (("tp", settings.tp), ("ep", settings.ep)):
            if world_size % size:
                raise GenerationError(f"rollout.{key}={size} does not divide the {world_size} processes")
        VllmEngine._has_built = True  # also if it fails half-way
        self._llm_engine = self._build()
        VllmEngine._num_open += 1
        self._core = self._llm_engine.engine_core
        # EngineCore.shutdown (vllm/v1/engine/core.py), which would run when the client is collected, destroys the
        # default process group: the trainer's. `close` takes down what belongs to this engine.
        self._core._finalizer.detach()
        self._shared_passes = SharedPasses.of_this_rank() if settings.ep > settings.tp else None
        self._worker = self._llm_engine.model_executor.driver_worker.worker
        self._dtype = getattr(torch, settings.dtype)
        place = GeneratorRank(settings.tp, rank % settings.tp, settings.ep, rank % settings.ep, self.fp8)
        self._target = ReloadTarget(
            self._worker,
            self._platform,
            self.config,
            generator_layout(self.config, place),
            tensor_shapes(self.config, self.fp8),
            self._dtype,
            self.fp8,
        )
        self._shared = shared_names(self.config, place)
        self._recorder: Recorder | None = None
        if settings.return_routed_experts and self._platform.RETURNS_ROUTED_EXPERTS:
            self._recorder = ReturnedRouting(self.config)
        elif settings.return_routed_experts:
            self._recorder = RoutingRecorder(self._worker, self._platform.kv_block_tokens(self.config))
        self._stop_strings = StopStrings(settings.tokenizer_path)
        self._digest: dict[str, int] | None = None
        self._restore: Callable[[], None] | None = None  # while it is asleep: what undoes that
        self._is_busy = False
        self._next_id = 0
        if settings.weights == "checkpoint":
            with self.parameters_for_writing() as parameters:
                read_weights(self._target, HFTensors(settings.model_path), parameters)

    def _build(self) -> Any:
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        settings = self.settings
        if self.config.get("model_type") == "kimi_k2":
            keep_config_classes_apart()
        arguments = vllm_arguments(settings, self.config, self._platform)
        gc.collect()
        gc.freeze()  # vLLM collects five times as it builds: not through all that is here already; `close` undoes it
        set_num_threads = torch.set_num_threads
        try:
            with _own_random_state(), self._without("freeze"):
                with rank_within(max(settings.tp, settings.ep)):
                    config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
                if settings.ep > settings.tp and config.use_v2_model_runner:
                    raise PlatformError(
                        f"rollout.ep={settings.ep} over generators of rollout.tp={settings.tp} keeps them in step by empty passes, which "
                        "vLLM's V1 model runner alone makes; unset VLLM_USE_V2_MODEL_RUNNER, or set rollout.ep to 1 or rollout.tp"
                    )
                return LLMEngine.from_vllm_config(config, disable_log_stats=True)
        except (ValueError, AssertionError, NotImplementedError, RuntimeError) as error:
            raise GenerationError(
                f"vLLM could not be built for {settings.model_path} (dtype {settings.dtype}, "
                f"tp {settings.tp}, ep {settings.ep}, dcp {settings.dcp}): {error}"
            ) from error
        finally:
            torch.set_num_threads = set_num_threads  # vLLM's CPU worker replaces it by a warning

    @contextlib.contextmanager
    def _without(self, *names: str) -> Iterator[None]:
        """Inside, these functions of `gc` do nothing, where a process has engines one after the other. vLLM freezes what it has
        built, and to be rid of it thaws and collects everything: twice half a second, and in a fork a copy of all that is imported.
        """
        functions = {name: getattr(gc, name) for name in names if self._platform.SEVERAL_ENGINES_A_PROCESS}
        try:
            for name in functions:
                setattr(gc, name, lambda *_: 0)
            yield
        finally:
            for name, function in functions.items():
                setattr(gc, name, function)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[tuple[Response, ...]]:
        """See GenerationEngine."""
        return in_order(requests, self.stream(requests))

    def stream(
        self, requests: Sequence[GenerationRequest], cut: Cut | None = None, refill: Refill | None = None
    ) -> Generator[Completion]:
        """See GenerationEngine."""
        self._check_ready()
        running: dict[str, Sample] = {}
        known: list[GenerationRequest] = []
        steps = self._steps()
        self._is_busy = True
        try:
            with self._telling(steps):
                self._forget()
                self._submit(requests, known, running)
            for passes in itertools.count(1):
                with self._telling(steps):
                    while refill is not None and self._has_room(len(running)):
                        if not (more := refill()):
                            refill = None
                        self._submit(more, known, running)
                outputs = next(steps, None)
                if outputs is None:
                    break
                with self._telling(steps):  # also of what is thrown into it
                    finished = self._finished(outputs, known, running)
                    yield from finished
                if cut is None or passes % cut.every or not (running or self._shared_passes is not None):
                    continue
                with self._telling(steps):
                    is_reached = cut.reached(fewest_tokens(running))
                if is_reached:
                    break
            for state in running.values():
                yield state.completion(UNFINISHED, None)
        finally:
            self._core.abort_requests(list(running))
            # until the core has dropped what was aborted or finished: the next call starts clean
            deque(steps, maxlen=0)
            self._is_busy = False

    def _finished(
        self, outputs: StepOutputs, known: Sequence[GenerationRequest], running: dict[str, Sample]
    ) -> list[Completion]:
        """Adds a step's tokens to the samples that run; those that are complete, which run no longer."""
        finished = []
        for output in outputs:
            state = running.get(output.request_id)
            if state is None:
                continue  # a step that was in flight when its sample was aborted
            if self._recorder is not None:
                self._recorder.add(output.request_id, output.routed_experts)
            reason = state.advance(output, self._stop_strings, self.config["vocab_size"])
            if reason is None:
                continue
            del running[output.request_id]
            if not output.finished:
                self._core.abort_requests([output.request_id])
            routed = None
            if self._recorder is not None:
                num_prompt = len(known[state.request_index].prompt_token_ids)
                routed = self._recorder.take(output.request_id, num_prompt + len(state.token_ids) - 1)
            finished.append(state.completion(reason, routed))
        return finished

    def prompt_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """See GenerationEngine."""
        from vllm import SamplingParams

        self._check_ready()
        steps, results = self._steps(), dict[int, tuple[float, ...]]()
        with self._telling(steps):
            self._check_sequences(sequences)
            self._forget()
            params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
            waiting = {self._add(list(sequence), params): index for index, sequence in enumerate(sequences)}
        for output in itertools.chain.from_iterable(steps):
            asked = waiting.get(output.request_id)
            if asked is not None and output.new_prompt_logprobs_tensors is not None:
                results[asked] = tuple(output.new_prompt_logprobs_tensors.logprobs[:, 0].tolist())
        return [results[index] for index in range(len(sequences))]

    def _check_sequences(self, sequences: Sequence[Sequence[int]]) -> None:
        """Raises GenerationError for the first of which there are no log-probs."""
        limit, vocab_size = self.settings.max_model_len, self.config["vocab_size"]
        for index, sequence in enumerate(sequences):
            if not 2 <= len(sequence) < limit:
                raise GenerationError(
                    f"sequence {index} has {len(sequence)} tokens; prompt_log_probs wants 2 to {limit - 1}"
                )
            if not 0 <= min(sequence) <= max(sequence) < vocab_size:
                raise GenerationError(f"sequence {index} has a token outside the vocabulary of {vocab_size}")

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See GenerationEngine. May be called asleep: the KV cache stays freed."""
        self._drop_weights()
        self._hold(reload_weights(self._target, named_tensors, self.settings.bucket_bytes))

    @contextlib.contextmanager
    def parameters_for_writing(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """See WritableEngine. May be called asleep, as `update_weights`."""
        self._drop_weights()
        yield parameters_to_write(self._target)
        self._hold(finish_writing(self._target))

    def _drop_weights(self) -> None:
        """Before others are written; until `_hold` generating is an error."""
        self._check_open()
        self._digest = None
        self._platform.wake_weights(self._llm_engine, self._restore is not None)

    def _hold(self, digest: dict[str, int]) -> None:
        """New weights, and this rank's digest of them."""
        self._forget()
        for names, all_reduce in self._shared:
            digest = sum_digests(digest, names, all_reduce)
        self._digest = digest

    def weights_digest(self) -> Mapping[str, int]:
        """See GenerationEngine. Read back at the end of the last `update_weights`."""
        self._check_open()
        if self._digest is None:
            raise GenerationError("the generator holds no weights: call update_weights first")
        return self._digest

    def sleep(self, *, keep_weights: bool = True) -> None:
        """See GenerationEngine. Idempotent."""
        self._check_open()
        if self._restore is None:
            self._forget()
            self._restore = self._platform.free_memory(self._llm_engine, self._worker, keep_weights)
            if not keep_weights:
                self._digest = None

    def wake_up(self) -> None:
        """See GenerationEngine. Idempotent."""
        self._check_open()
        if self._restore is not None:
            self._restore()
            self._restore = None

    def close(self) -> None:
        """See GenerationEngine. Idempotent."""
        if self._llm_engine is not None:
            self._check_open()
            with self._without("unfreeze", "collect"):
                self._core.engine_core.model_executor.shutdown()
                self._core.engine_core.scheduler.shutdown()
            worker = weakref.ref(self._worker)
            self._llm_engine = self._restore = None
            del self._core, self._worker, self._target
            gc.collect()  # engine, scheduler and model refer to each other; what was here before `_build` is not gone through
            gc.unfreeze()
            if worker() is not None:
                gc.collect()  # somebody had frozen this engine too
            VllmEngine._num_open -= 1
            if VllmEngine._num_open == 0:
                destroy_vllm_groups()

    def _has_room(self, num_running: int) -> bool:
        """For another sample, and none waits for it: the KV cache may hold fewer than `max_num_seqs`."""
        return num_running < self.settings.max_num_seqs and not len(self._core.engine_core.scheduler.waiting)

    def _submit(
        self, requests: Sequence[GenerationRequest], known: list[GenerationRequest], running: dict[str, Sample]
    ) -> None:
        """Adds requests to those of the stream (`known`), and all of their samples to the engine core's queue, in order, and to
        `running`.
        """
        has_tokenizer = self.settings.tokenizer_path is not None
        check_requests(requests, self.settings.max_model_len, self.config["vocab_size"], has_tokenizer)
        first = len(known)
        known += requests
        for request_index, request in enumerate(requests, first):
            sampling = request.sampling
            candidates = self._stop_strings.candidates(sampling.stop_strings)
            params = sampling_params(request, self.config["vocab_size"])
            prompt = [*request.prompt_token_ids, *request.begun]
            for sample_index in range(request.first_sample, request.first_sample + request.num_samples):
                seeded = copy(params)
                seeded.seed = continued_seed(request, sample_index)
                identifier = self._add(prompt, seeded)
                begun = list(request.begun)
                running[identifier] = Sample(request_index, sample_index, sampling, candidates, begun)

    def _add(self, prompt: list[int], params: Any) -> str:
        self._next_id += 1
        identifier = str(self._next_id)
        self._core.add_request(core_request(identifier, prompt, params))
        return identifier

    def _steps(self) -> Generator[StepOutputs]:
        """Steps of the engine core, a token of every running sample each, until it holds no request any more, nor does the core of
        any attention group that shares this one's experts. A step is one pass of the model in every group, for those without
        requests over a made-up token."""
        scheduler = self._core.engine_core.scheduler
        while (is_busy := scheduler.has_requests()) or self._shared_passes is not None:
            if self._shared_passes is not None:
                goes_on, failed = self._shared_passes.go_on(is_busy)
                if failed is not None:
                    self._drop_requests()
                    raise GenerationError(
                        f"the generator of rank {failed} failed, and this one shares experts with it (rollout.ep="
                        f"{self.ep}): what it was sampling is given up; the log of rank {failed} says why"
                    )
                if not goes_on:
                    return
            tick("generator step")
            with _own_random_state():
                if is_busy:
                    outputs = self._core.get_output().outputs
                else:
                    self._core.execute_dummy_batch()
                    outputs = []
            yield outputs

    @contextlib.contextmanager
    def _telling(self, steps: Generator[StepOutputs]) -> Iterator[None]:
        """Inside, which is between passes, an error ends the samples of all attention groups that share experts: the others learn it
        before their next pass, and say which rank it was. (Of an error within a pass they learn by their time-out.)
        """
        try:
            yield
        except Exception as error:
            if self._shared_passes is not None:
                steps.close()
                try:
                    self._shared_passes.tell_failure()
                    self._drop_requests()
                except StragglerError as other:
                    error.add_note(str(other))
            raise

    def _drop_requests(self) -> None:
        """Of a generator that shares its passes; all that do call it after the same one."""
        self._core.abort_requests(list(self._core.engine_core.scheduler.requests))
        deque(self._steps(), maxlen=0)

    def _forget(self) -> None:
        """Drops the prefix cache, and what is known of it: its content is history, which a resumed run does not have.

        Raises GenerationError when vLLM could not: what it holds was computed by older weights.
        """
        if not self._llm_engine.reset_prefix_cache():
            scheduler = self._core.engine_core.scheduler
            raise GenerationError(
                f"vLLM did not drop its prefix cache: {scheduler.get_num_unfinished_requests()} requests "
                "still hold blocks of it, and answers from it would be those of older weights. End "
                "every request of this engine before weights change; if none is open, close the "
                "engine and build another one"
            )
        if self._recorder is not None:
            self._recorder.clear()

    def _check_open(self) -> None:
        if self._llm_engine is None:
            raise GenerationError("the generator has been closed")
        if self._is_busy:
            raise GenerationError("a stream of this generator is still open: exhaust or close it first")

    def _check_ready(self) -> None:
        self._check_open()
        if self._restore is not None:
            raise GenerationError("the generator is asleep: call wake_up first")
        if self._digest is None:
            raise GenerationError(
                "the generator holds no weights (none were loaded, or the last load failed): call update_weights first"
            )


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    """Keeps vLLM's draws from the global generators (seeding at start-up, a seed a step for unseeded rows) apart from
    the trainer's: otherwise what the trainer draws would depend on how long the responses were."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
