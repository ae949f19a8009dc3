"""Preference parts: reward models that read a response and give one score (DeepSeek-R1, section on helpfulness and
harmlessness). Any Hugging Face sequence classifier with one label will do; the export of stage `reward_model` is one.

A reward model sees what it was trained on: exports carry their prompt template, others are asked through the chat
template of their tokenizer. Scores are computed in batches of what waits once the first of them is needed, sorted by content,
each distinct text once: what waits then decides on their rounding, the order in which it came does not.

A reward model larger than one device is sharded over the ranks (`train/reward_model.py`); its scores are computed in
`flush`, which every rank calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from r1mega import platform
from r1mega.checkpoint.hf import read_config
from r1mega.config.rewards import PreferenceReward
from r1mega.data.preferences import encode
from r1mega.data.tokenizer import load_tokenizer
from r1mega.errors import RewardError
from r1mega.model.hf_config import transformers_config
from r1mega.model.reward_head import READER
from r1mega.reward.extract import final_text
from r1mega.reward.parts import Batch, PartScore, ScoringItem, Waiting
from r1mega.types import RewardStatus

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Conversation = tuple[str, str]
"""(question, text of the response that is scored)."""
Forward = Callable[[Sequence[list[int]]], list[float]]
"""Token ids of sequences -> their scores."""


class RewardModel:
    """A sequence classifier on disk. Its weights are read when the first score is asked for; on a GPU they stay in host
    memory between batches, where the trainer and the generator need the room. forward: computes scores elsewhere.

    Raises RewardError at once for a directory that cannot be asked.
    """

    def __init__(
        self,
        directory: Path,
        *,
        batch_size: int,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        forward: Forward | None = None,
    ) -> None:
        self.directory, self._batch_size, self._max_tokens, self._dtype = Path(directory), batch_size, max_tokens, dtype
        self._forward = forward or self._forward_here
        self.config = read_config(self.directory)
        self.reader: dict[str, str] | None = self.config.get(READER)
        architecture = (self.config.get("architectures") or ["none"])[0]
        if not architecture.endswith("ForSequenceClassification"):
            raise RewardError(
                f"{directory}: a {architecture} has no head that scores; give an HF sequence classifier with one label "
                "(stage reward_model makes one)"
            )
        self._token_ids = self._by_chat_template() if self.reader is None else self._by_template(self.reader)
        self._model: PreTrainedModel | None = None

    def _by_template(self, reader: dict[str, str]) -> Callable[[str, str], list[int]]:
        tokenizer = load_tokenizer(self.directory)
        return lambda question, text: encode(tokenizer, reader["template"], question, text)

    def _by_chat_template(self) -> Callable[[str, str], list[int]]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        if not tokenizer.chat_template:
            raise RewardError(
                f"{self.directory}: the tokenizer has no chat template, so the form in which the model was trained to "
                f"read a conversation is unknown; add one, or the key {READER!r} with 'template' to config.json"
            )

        def token_ids(question: str, text: str) -> list[int]:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False)
            return tokenizer.encode(rendered, add_special_tokens=False)

        return token_ids

    def token_ids(self, question: str, text: str) -> list[int]:
        """One conversation as the model reads it."""
        return self._token_ids(question, text)

    def scores(self, conversations: Sequence[Conversation]) -> list[float | None]:
        """A score each, None for one of more than max_tokens tokens; equal ones have the same."""
        tokens = [tuple(self.token_ids(*conversation)) for conversation in conversations]
        order = sorted({ids for ids in tokens if len(ids) <= self._max_tokens}, key=lambda ids: (len(ids), ids))
        scores = dict(zip(order, self._forward([list(ids) for ids in order]), strict=True))
        return [scores.get(ids) for ids in tokens]

    def _forward_here(self, sequences: Sequence[list[int]]) -> list[float]:
        model, device, scores = self._loaded(), platform.current().device, []
        model.to(device)
        for first in range(0, len(sequences), self._batch_size):
            scores += self._score_batch(sequences[first : first + self._batch_size], model, device)
        if device.type != "cpu":
            model.to("cpu")
        return scores

    @torch.inference_mode()
    def _score_batch(self, sequences: Sequence[list[int]], model: PreTrainedModel, device: torch.device) -> list[float]:
        from transformers.modeling_layers import GenericForSequenceClassification

        pad = model.config.get_text_config().pad_token_id
        # without a token to fill a batch up with
        if pad is None and not isinstance(model, GenericForSequenceClassification) and len(sequences) > 1:
            return [self._score_batch([sequence], model, device)[0] for sequence in sequences]
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        longest = int(lengths.max())
        ids = torch.tensor([[*s, *[pad or 0] * (longest - len(s))] for s in sequences], device=device)
        mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
        if isinstance(model, GenericForSequenceClassification):
            # the last token by its place: transformers looks for the padding token, which may be a real one too
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(sequences), device=device), lengths - 1]
            return torch.nn.functional.linear(last.float(), model.score.weight.float())[:, 0].tolist()
        return model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()

    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            from transformers import AutoModelForSequenceClassification

            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.directory, config=transformers_config(self.directory), dtype=self._dtype, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
            if info["missing_keys"] or info["mismatched_keys"]:
                missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
                raise RewardError(
                    f"{self.directory}: the checkpoint lacks {', '.join(missing[:5])}: its scores would be noise"
                )
            if model.config.num_labels != 1:
                raise RewardError(f"{self.directory}: {model.config.num_labels} labels; a reward model has one")
            self._model = model.eval().requires_grad_(False)
        return self._model


class Preference:
    """value = sigmoid((score - shift) / scale), in (0, 1); 0 for a response without anything to read.

    reads: 'summary', the text after the reasoning without tags; or 'response', all of it.
    """

    def __init__(
        self,
        name: str,
        config: PreferenceReward,
        reads: Literal["summary", "response"],
        prompt_opens_think: bool = False,
        forward: Forward | None = None,
    ) -> None:
        self.name, self._config, self._reads, self._opens = name, config, reads, prompt_opens_think
        if config.model is None:
            raise RewardError(f"reward.{name}.model: no reward model is named")
        self._model = RewardModel(
            config.model,
            batch_size=config.batch_size,
            max_tokens=config.max_tokens,
            dtype=getattr(torch, config.dtype),
            forward=forward,
        )
        trained = (self._model.reader or {}).get("reads", reads)
        if trained != reads:
            raise RewardError(
                f"reward.{name}.model = {config.model} was trained to read the {trained}, {name} is judged on the "
                f"{reads}"
            )
        self._batch = Batch(self._score, collective=forward is not None)

    def score(self, item: ScoringItem) -> PartScore | Waiting:
        if not self._text(item).strip():
            return PartScore(0.0, f"no {self._reads} to read")
        return self._batch.add(item)

    def flush(self) -> None:
        """Score what waits where that takes all ranks; a collective call then."""
        if self._batch.collective:
            self._batch.flush()

    def _text(self, item: ScoringItem) -> str:
        return final_text(item.text, self._opens) if self._reads == "summary" else item.text

    def _score(self, items: Sequence[ScoringItem]) -> list[PartScore]:
        scores = self._model.scores([(item.prompt.question, self._text(item)) for item in items])
        return [self._part(score) for score in scores]

    def _part(self, score: float | None) -> PartScore:
        if score is None:
            limit = f"more than reward.{self.name}.max_tokens = {self._config.max_tokens} tokens"
            return PartScore(None, limit, RewardStatus.FAILED)
        if not math.isfinite(score):
            return PartScore(None, f"the reward model's score is {score}", RewardStatus.FAILED)
        value = 1.0 / (1.0 + math.exp(-max(min((score - self._config.shift) / self._config.scale, 500.0), -500.0)))
        return PartScore(value, f"score {score:.3f}")
