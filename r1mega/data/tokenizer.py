"""One small tokenizer interface over sentencepiece and Hugging Face tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from r1mega.config.model_files import tokenizer_code_problem, trusts_remote_code
from r1mega.errors import DataError
from r1mega.types import Response

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tiktoken.model",  # Moonlight; it wants the Python file beside it
    "chat_template.jinja",
)
"""Files that make up a tokenizer in an HF directory; copied along with exported checkpoints."""
_END_FILES = ("generation_config.json", "config.json")


class Tokenizer(Protocol):
    """Text <-> token ids. `encode` adds no special tokens; `encode_prompt` begins as a fresh document does: with one bos, the
    template's own where it writes one.

    eos_token_id: the end of a text in training. end_token_ids: what ends a response, that and those of the model's
    generation_config.json (a chat model ends its turns by another token than its documents).
    """

    bos_token_id: int | None
    eos_token_id: int | None
    end_token_ids: tuple[int, ...]
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def encode_prompt(self, text: str) -> list[int]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...
    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str: ...


class SentencePieceTokenizer:
    """A bare `tokenizer.model`."""

    def __init__(self, path: Path):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.bos_token_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_token_id = self._model.eos_id() if self._model.eos_id() >= 0 else None
        self.vocab_size = self._model.vocab_size()
        self.end_token_ids = _end_token_ids(path.parent, self)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        if self.bos_token_id is None:
            return self.encode(text)
        return [self.bos_token_id, *self.encode(text.removeprefix(self._model.id_to_piece(self.bos_token_id)))]

    def decode(self, token_ids: Sequence[int]) -> str:
        unknown = self._model.unk_id()  # a model's vocabulary may be padded beyond the tokenizer's
        return self._model.decode([i if i < self.vocab_size else unknown for i in token_ids])

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """A bare sentencepiece model has no chat template: DataError."""
        raise DataError("this tokenizer has no chat template: give 'question' and 'response' instead of 'messages'")


class HFTokenizer:
    """Whatever transformers loads from the directory. A prompt starts with bos where the tokenizer itself adds one."""

    def __init__(self, path: Path):
        from transformers import AutoTokenizer

        if (problem := tokenizer_code_problem(path)) is not None:
            raise DataError(problem)
        self._tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=trusts_remote_code()
        )
        self.bos_token_id = self._tokenizer.bos_token_id
        self.eos_token_id = self._tokenizer.eos_token_id
        self.vocab_size = len(self._tokenizer)
        self.end_token_ids = _end_token_ids(path, self)
        self._adds_bos = self.bos_token_id is not None and self._tokenizer("a").input_ids[:1] == [self.bos_token_id]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_prompt(self, text: str) -> list[int]:
        begins = text.lstrip().startswith(self._tokenizer.bos_token) if self._adds_bos else True
        return self.encode(text) if begins else [self.bos_token_id, *self.encode(text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The conversation in the tokenizer's own chat template; DataError when it has none."""
        if not self._tokenizer.chat_template:
            raise DataError("this tokenizer has no chat template: give 'question' and 'response' instead of 'messages'")
        return self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )


def _end_token_ids(directory: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokenizer's eos, and the model's: of generation_config.json, or where that has none of config.json.

    DataError for a file that is damaged, or names what is no token.
    """
    stated = None
    for path in (directory / name for name in _END_FILES):
        try:
            values = json.loads(path.read_bytes()) if path.exists() else {}
            stated = values.get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path}: not JSON, or no object ({error})") from error
        if "eos_token_id" in values:
            break
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [] if stated is None else stated if isinstance(stated, list) else [stated]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise DataError(f"{path}: eos_token_id is {stated!r}: a token id, or a list of them")
    if max(ids, default=0) >= tokenizer.vocab_size:
        raise DataError(
            f"{path}: eos_token_id is {stated!r}: the tokenizer has {tokenizer.vocab_size} tokens, the first is 0"
        )
    return tuple(sorted({*own, *ids}))


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of an HF directory: sentencepiece itself where `tokenizer.model` says all there is to say (faster),
    transformers otherwise. DataError when there is none.
    """
    directory = Path(directory)
    model = directory / "tokenizer.model"
    if model.exists() and not (directory / "added_tokens.json").exists() and _is_plain_sentencepiece(directory):
        return SentencePieceTokenizer(model)
    if any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return HFTokenizer(directory)
    if model.exists():
        return SentencePieceTokenizer(model)
    raise DataError(f"{directory}: no tokenizer there (looked for tokenizer.json and tokenizer.model)")


def _is_plain_sentencepiece(directory: Path) -> bool:
    """Whether tokenizer_config.json adds nothing to the sentencepiece model (no tokens outside its vocabulary)."""
    import sentencepiece

    config = directory / "tokenizer_config.json"
    if not config.exists():
        return True
    added = json.loads(config.read_text()).get("added_tokens_decoder", {})
    if not added:
        return False  # a Llama-style pair of files: let transformers decide how special tokens are split
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    return all(int(i) < model.vocab_size() and model.id_to_piece(int(i)) == t["content"] for i, t in added.items())


def with_end(tokenizer: Tokenizer, token_ids: list[int]) -> list[int]:
    """A response with the end-of-text token, which some data have already written."""
    end = tokenizer.eos_token_id
    return token_ids if end is None or token_ids[-1:] == [end] else [*token_ids, end]


def response_text(tokenizer: Tokenizer, response: Response, prefix: Sequence[int] = ()) -> str:
    """What a reader sees of a response: without the token that ended it. prefix: tokens that the prompt began it with."""
    ended = response.token_ids[-1:] and response.token_ids[-1] in tokenizer.end_token_ids
    return tokenizer.decode([*prefix, *(response.token_ids[:-1] if ended else response.token_ids)])
