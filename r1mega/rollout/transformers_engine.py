"""`GenerationEngine` on transformers' own model code: slow, simple, and independent of vLLM. For cross-checks.

It samples itself instead of calling `generate`, which can seed a batch but not each sample.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from r1mega.errors import GenerationError, WeightSyncError
from r1mega.model.hf_config import transformers_config
from r1mega.platform.watchdog import tick
from r1mega.rollout.engine import EngineSettings, check_requests, continued_seed, in_order, read_config
from r1mega.rollout.kept import KeptLists, check_kept
from r1mega.rollout.stop_strings import StopStrings
from r1mega.types import Completion, Cut, GenerationRequest, Refill, Response, SamplingSettings
from r1mega.weights.digest import tensor_digest
from r1mega.weights.layout import is_ignored, tensor_shapes, weight_dtype
from r1mega.weights.transfer import checkpoint_tensors

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class TransformersEngine:
    """Keeps one transformers model on the CPU, rebuilt at every `update_weights`. One request at a time."""

    def __init__(self, settings: EngineSettings):
        """Raises GenerationError, ConfigError as `VllmEngine` does for a bad model directory."""
        self.settings = settings
        self.config = read_config(settings)
        self._shapes = tensor_shapes(self.config)
        self._names = tuple(self._shapes)
        self._dtype = getattr(torch, settings.dtype)
        self._stop_strings = StopStrings(settings.tokenizer_path)
        self._model: Any = None
        if settings.weights == "checkpoint":
            self.update_weights(checkpoint_tensors(settings.model_path))

    def generate(self, requests: Sequence[GenerationRequest]) -> list[tuple[Response, ...]]:
        """See GenerationEngine."""
        return in_order(requests, self.stream(requests))

    def stream(
        self, requests: Sequence[GenerationRequest], cut: Cut | None = None, refill: Refill | None = None
    ) -> Generator[Completion]:
        """See GenerationEngine. All responses are finished: one request at a time, the last would get its first token late."""
        self._check_ready()
        has_tokenizer = self.settings.tokenizer_path is not None
        first, requests = 0, requests or (refill() if refill is not None else ())
        while requests:
            check_requests(requests, self.settings.max_model_len, self.config["vocab_size"], has_tokenizer)
            for index, request in enumerate(requests, first):
                for sample_index, response in self._samples(request):
                    tick("generator step")
                    yield Completion(index, sample_index, response)
            first += len(requests)
            requests = refill() if refill is not None else ()

    @torch.no_grad()
    def prompt_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """See GenerationEngine."""
        self._check_ready()
        results = []
        for sequence in sequences:
            tokens = torch.tensor([list(sequence)])
            log_probs = self._model(tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            results.append(tuple(log_probs.gather(1, tokens[0, 1:, None])[:, 0].tolist()))
        return results

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See GenerationEngine."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        tensors = {
            name: tensor.detach().to(weight_dtype(name, self._dtype)).clone()
            for name, tensor in named_tensors
            if not is_ignored(name, self.config)
        }
        self._model = None
        problems = [f"{name}: missing" for name in self._names if name not in tensors]
        problems += [f"{name}: the model has no such tensor" for name in tensors if name not in self._shapes]
        problems += [
            f"{name}: shape {list(tensor.shape)}, expected {list(self._shapes[name])}"
            for name, tensor in tensors.items()
            if self._shapes.get(name, tensor.shape) != tensor.shape
        ]
        if problems:
            raise WeightSyncError(
                f"{len(problems)} tensors cannot be loaded into the generator:\n  " + "\n  ".join(problems)
            )
        config = transformers_config(self.settings.model_path)
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # annotated as a pair, of which it is one
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=self._dtype, output_loading_info=True
        )
        tied = {"lm_head.weight"} if self.config.get("tie_word_embeddings") else set()
        lost = (set(report["missing_keys"]) - tied) | set(report["unexpected_keys"]) | set(report["mismatched_keys"])
        if lost:
            raise WeightSyncError(f"transformers did not load {sorted(map(str, lost))}")
        self._model = model.eval()

    def weights_digest(self) -> Mapping[str, int]:
        """See GenerationEngine. Read from the model at every call."""
        self._check_ready()
        state = self._model.state_dict()
        return {name: tensor_digest(_read(state, name)) for name in self._names}

    def sleep(self, *, keep_weights: bool = True) -> None:
        """Nothing to free but the weights: the KV cache lives for one request only."""
        if not keep_weights:
            self._model = None

    def wake_up(self) -> None:
        """See `sleep`."""

    def close(self) -> None:
        """See GenerationEngine."""
        self._model = None

    @torch.no_grad()
    def _samples(self, request: GenerationRequest) -> Iterator[tuple[int, Response]]:
        """Decodes all samples of a request as one batch; a finished one leaves it."""
        sampling, first, num_begun = request.sampling, request.first_sample, len(request.begun)
        alive = list(range(request.num_samples))
        generators = [torch.Generator().manual_seed(continued_seed(request, first + i)) for i in alive]
        tokens: list[list[int]] = [list(request.begun) for _ in alive]
        log_probs: list[list[float]] = [[] for _ in alive]
        kept = [KeptLists() for _ in alive]
        inputs = torch.tensor([[*request.prompt_token_ids, *request.begun]] * request.num_samples)
        cache = None
        while alive:
            output = self._model(inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            distribution = sampling_log_probs(output.logits[:, -1].float(), sampling)
            drawn = [_draw(row, sampling, generators[i]) for row, i in zip(distribution, alive, strict=True)]
            keep = []
            for row, (i, token) in enumerate(zip(alive, drawn, strict=True)):
                tokens[i].append(token)
                log_probs[i].append(float(distribution[row, token]))
                if sampling.max_kept is not None:
                    ids = distribution[row].isfinite().nonzero()[:, 0].numpy()
                    check_kept(len(ids), sampling, self.config["vocab_size"])
                    kept[i].add(ids)
                reason = self._finish_reason(tokens[i], sampling)
                if reason is None:
                    keep.append(row)
                else:
                    lists = None if sampling.max_kept is None else kept[i].finished()
                    yield first + i, Response(tuple(tokens[i][num_begun:]), tuple(log_probs[i]), reason, kept=lists)
            if len(keep) < len(alive):
                cache.batch_select_indices(torch.tensor(keep, dtype=torch.long))
            alive, inputs = [alive[row] for row in keep], torch.tensor([[drawn[row]] for row in keep])

    def _finish_reason(self, tokens: list[int], sampling: SamplingSettings) -> str | None:
        if tokens[-1] in sampling.stop_token_ids:
            return "stop"
        stops = sampling.stop_strings
        if stops and tokens[-1] in self._stop_strings.candidates(stops) and self._stop_strings.matches(tokens, stops):
            return "stop"
        return "length" if len(tokens) == sampling.max_tokens else None

    def _check_ready(self) -> None:
        if self._model is None:
            raise GenerationError(
                "the generator holds no weights (none were loaded, the last load failed, or it was "
                "closed): call update_weights first"
            )


def sampling_log_probs(logits: torch.Tensor, sampling: SamplingSettings) -> torch.Tensor:
    """[rows, vocabulary] log-probs of the distribution that `sampling` draws from; greedy: that of temperature 1.

    min_p: of those whose probability is at least that share of the highest; of these the top_k likeliest, and those as likely as the
    last; top_p: of these the smallest set of most likely ones whose probability reaches top_p (Holtzman et al. 2020).
    """
    if sampling.temperature == 0:
        return logits.log_softmax(-1)
    log_probs = (logits / sampling.temperature).log_softmax(-1)
    if sampling.min_p:
        least = log_probs.amax(-1, keepdim=True) + math.log(sampling.min_p)
        log_probs = log_probs.masked_fill(log_probs < least, float("-inf")).log_softmax(-1)
    if (most := sampling.most_kept) is not None and most < log_probs.shape[-1]:
        last = log_probs.topk(most, dim=-1).values[:, -1:]
        log_probs = log_probs.masked_fill(log_probs < last, float("-inf")).log_softmax(-1)
    if sampling.top_p < 1:
        ordered, indices = log_probs.exp().sort(dim=-1, descending=True)
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        log_probs = log_probs.masked_fill(dropped.gather(-1, indices.argsort(-1)), float("-inf")).log_softmax(-1)
    return log_probs


def _draw(log_probs: torch.Tensor, sampling: SamplingSettings, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(log_probs.argmax())
    return int(torch.multinomial(log_probs.exp(), 1, generator=generator))


def _read(state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """An HF tensor out of transformers' parameters, where gate_up_proj is [E, 2I, H] and down_proj [E, H, I]."""
    match = _EXPERT.fullmatch(name)
    if name in state or match is None:
        return state[name]
    prefix, expert, kind = match[1], int(match[2]), match[3]
    if kind == "down":
        return state[f"{prefix}.down_proj"][expert]
    gate, up = state[f"{prefix}.gate_up_proj"][expert].chunk(2)
    return gate if kind == "gate" else up
