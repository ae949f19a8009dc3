"""Which experts the generator's routers chose, token by token: what router replay repeats in the update.

Two implementations of one router choose differently where two scores agree to the last bits (and, in low precision, in
more places): the trainer then computes another function than the one that sampled. Replaying the generator's choices
removes that ("rollout routing replay", R3, arXiv 2510.11370).

vLLM (0.32) returns routed experts itself from its second model runner, which wants Triton: on a GPU (`ReturnedRouting`). On a
CPU its routers' own capture hook is bound to a recorder that files the rows by request (`RoutingRecorder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from r1mega.config.model_files import HFConfig
from r1mega.errors import GenerationError, PlatformError
from r1mega.model.families import architecture_of


class Recorder(Protocol):
    """What a generator knows of its routers' choices."""

    def add(self, request_id: str, rows: np.ndarray | None) -> None:
        """[positions, layers, top-k] that came with an output of the engine core, if they did."""

    def clear(self) -> None:
        """Forget everything: the prefix cache was reset."""

    def take(self, request_id: str, num_positions: int) -> np.ndarray:
        """[num_positions, MoE layers, top-k] uint8 or uint16: the choices at a request's first positions, which are then
        forgotten. Raises GenerationError when some are not known.
        """


@dataclass(slots=True, eq=False)
class _Request:
    """(first position, rows [n, layers, top-k]) of each forward pass that a request took part in."""

    cached_keys: list[int]  # of the prompt's blocks that were in the prefix cache when it came
    passes: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def fill(self, out: np.ndarray, known: np.ndarray, shift: int = 0) -> None:
        """Write what is known of positions shift.. into out; a later pass (after a preemption) counts."""
        for first, rows in self.passes:
            begin, end = max(first - shift, 0), min(first - shift + len(rows), len(out))
            if begin < end:
                out[begin:end] = rows[begin - first + shift : end - first + shift]
                known[begin:end] = True


class RoutingRecorder:
    """Files the expert choices of every token that the generator processes. Bound to one vLLM model runner (V1, eager)."""

    def __init__(self, worker: Any, block_tokens: int):
        """block_tokens: of a KV-cache block, the unit in which the prefix cache shares.

        Raises GenerationError for a model without experts, PlatformError for a runner that this was not written for.
        """
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

        self._runner = runner = worker.model_runner
        if runner.vllm_config.use_v2_model_runner or not runner.vllm_config.model_config.enforce_eager:
            raise PlatformError(
                "rollout.router_replay reads the routers of vLLM's V1 model runner in eager mode, which this platform does "
                "not use; set rollout.router_replay=false"
            )
        self._block_tokens = block_tokens
        self._dtype = np.uint8 if runner.vllm_config.model_config.get_num_experts() <= 256 else np.uint16
        self._step: dict[int, torch.Tensor] = {}  # by the model's layer index
        self._requests: dict[str, _Request] = {}
        self._owners: dict[int, _Request] = {}  # who computed a prompt block
        capturer: Any = self  # has the one method that routers call
        try:
            bind_routed_experts_capturer(runner.model, capturer)
        except ValueError as error:
            raise GenerationError(f"rollout.router_replay: {error}") from error
        self._execute = runner.execute_model
        runner.execute_model = self._execute_and_file

    def capture(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        """Called by every router inside the forward pass; topk_ids: [tokens, top-k]."""
        self._step[layer_id] = topk_ids

    def add(self, request_id: str, rows: np.ndarray | None) -> None:
        """Nothing: the passes themselves are seen."""

    def clear(self) -> None:
        """See Recorder."""
        self._requests.clear()
        self._owners.clear()

    def take(self, request_id: str, num_positions: int) -> np.ndarray:
        """See Recorder."""
        request = self._requests.pop(request_id)
        out = np.empty((num_positions, *request.passes[0][1].shape[1:]), self._dtype)
        known = np.zeros(num_positions, dtype=bool)
        size = self._block_tokens
        for i, key in enumerate(request.cached_keys):
            block = slice(i * size, (i + 1) * size)
            self._owners[key].fill(out[block], known[block], shift=i * size)
        request.fill(out, known)
        if not known.all():
            raise GenerationError(f"the routing of position {int(known.argmin())} of request {request_id} is not known")
        return out

    def _execute_and_file(self, scheduler_output: Any, *arguments: Any, **options: Any) -> Any:
        self._step.clear()
        result = self._execute(scheduler_output, *arguments, **options)
        if scheduler_output.total_num_scheduled_tokens:
            self._file(scheduler_output)
        return result

    def _file(self, scheduled: Any) -> None:
        """Distribute the rows of the forward pass that has just run."""
        starts: dict[str, int] = {}
        for new in scheduled.scheduled_new_reqs:
            starts[new.req_id] = new.num_computed_tokens
            keys = _block_keys(new.prompt_token_ids, self._block_tokens)
            num_cached = new.num_computed_tokens // self._block_tokens
            self._requests[new.req_id] = request = _Request(keys[:num_cached])
            for key in keys[num_cached:]:
                self._owners.setdefault(key, request)
        again = scheduled.scheduled_cached_reqs
        starts.update(zip(again.req_ids, again.num_computed_tokens, strict=True))
        layers = [self._step[layer] for layer in sorted(self._step)]
        rows = torch.stack(layers, dim=1).cpu().numpy().astype(self._dtype)  # [tokens, layers, top-k]
        offset = 0
        for request_id in self._runner.input_batch.req_ids:
            count = scheduled.num_scheduled_tokens.get(request_id, 0)
            seen = self._requests.get(request_id)
            if seen is not None and count:  # None: ended while this step was in flight
                seen.passes.append((starts[request_id], rows[offset : offset + count]))
            offset += count
        if offset != scheduled.total_num_scheduled_tokens or len(rows) < offset:
            raise GenerationError(
                f"vLLM scheduled {scheduled.total_num_scheduled_tokens} tokens, its batch holds {offset}, its routers saw "
                f"{len(rows)}"
            )


def _block_keys(tokens: Sequence[int], size: int) -> list[int]:
    """A key for each whole block of a prompt that depends on all tokens up to its end, as the prefix cache's do."""
    keys, parent = [], 0
    for first in range(0, len(tokens) - size + 1, size):
        parent = hash((parent, *tokens[first : first + size]))
        keys.append(parent)
    return keys


@dataclass(slots=True, eq=False)
class _Rows:
    """A request's rows in one array that grows by half as it fills. What vLLM returns are views of the array of a whole step's
    tokens in pinned memory, which they would keep alive as long as any of its requests runs.
    """

    array: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    count: int = 0

    def add(self, rows: np.ndarray) -> None:
        """Copies them."""
        end = self.count + len(rows)
        if end > len(self.array):
            grown = np.empty((max(end, len(self.array) * 3 // 2), *rows.shape[1:]), rows.dtype)
            if self.count:
                grown[: self.count] = self.array[: self.count]
            self.array = grown
        self.array[self.count : end] = rows
        self.count = end


class ReturnedRouting:
    """Keeps what vLLM returns (`enable_return_routed_experts`): with each output the rows of the positions that were computed
    since the last one, or read from the prefix cache, of all of the model's layers. So a request that is ended from outside has
    its rows too: those of every position but its last token's.
    """

    def __init__(self, config: HFConfig):
        """Raises GenerationError for a model without experts."""
        model = architecture_of(config)
        self._layers = [layer for layer in range(model.num_layers) if model.has_experts(layer)]
        if model.experts is None or not self._layers:
            raise GenerationError("rollout.router_replay: the model has no experts")
        self._rows: dict[str, _Rows] = {}

    def add(self, request_id: str, rows: np.ndarray | None) -> None:
        """See Recorder."""
        if rows is not None:
            self._rows.setdefault(request_id, _Rows()).add(rows[:, self._layers])

    def clear(self) -> None:
        """See Recorder."""
        self._rows.clear()

    def take(self, request_id: str, num_positions: int) -> np.ndarray:
        """See Recorder."""
        rows = self._rows.pop(request_id, _Rows())
        if rows.count < num_positions:
            raise GenerationError(
                f"vLLM returned the routing of {rows.count} positions of request {request_id}, not of {num_positions}"
            )
        return rows.array[:num_positions].copy()
