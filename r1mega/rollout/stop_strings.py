"""Finds stop strings in sampled tokens. The token that completes a stop string ends the response and belongs to it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from r1mega.data.tokenizer import Tokenizer, load_tokenizer
from r1mega.errors import GenerationError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StopStrings:
    """Decides after each token whether a stop string has just been completed.

    Only tokens whose text could hold a stop string's last character are looked at closely, so that ordinary tokens
    cost one set lookup.
    """

    def __init__(self, tokenizer_path: Path | None):
        """The tokenizer is loaded when the first stop string is asked for (DataError when there is none; None: no stop
        string is asked for)."""
        self._path = tokenizer_path
        self._candidates: dict[str, frozenset[int]] = {}

    def candidates(self, stop_strings: Sequence[str]) -> frozenset[int]:
        """Ids of the tokens that may complete one of the strings. Raises GenerationError for an empty string."""
        return frozenset().union(*(self._completing(stop) for stop in stop_strings))

    def matches(self, token_ids: Sequence[int], stop_strings: Sequence[str]) -> bool:
        """Whether the last of token_ids completes a stop string."""
        # A token may decode to nothing, but not to less: the last len(stop) non-empty ones cover the string. Eight
        # more give sentencepiece and byte-level decoders their context.
        window = max(len(stop.encode()) for stop in stop_strings) + 8
        tail = list(token_ids[-window:])
        before, after = self._decode(tail[:-1]), self._decode(tail)
        return any(after.count(stop) > before.count(stop) for stop in stop_strings)

    def _completing(self, stop: str) -> frozenset[int]:
        if not stop:
            raise GenerationError("a stop string is empty")
        if stop not in self._candidates:
            last = stop[-1]
            self._candidates[stop] = frozenset(
                token
                for token, text in enumerate(self._texts)
                if last.isspace() or last in text or _REPLACEMENT in text
            )
        return self._candidates[stop]

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        if self._path is None:
            raise GenerationError("stop strings need an engine that was built with a tokenizer_path")
        return load_tokenizer(self._path)

    @functools.cached_property
    def _texts(self) -> list[str]:
        """The text of each token alone; half a multi-byte character decodes to U+FFFD."""
        return [self._tokenizer.decode([token]) for token in range(self._tokenizer.vocab_size)]

    def _decode(self, token_ids: list[int]) -> str:
        known = self._tokenizer.vocab_size  # a model's embedding may be larger than its tokenizer
        return self._tokenizer.decode([token for token in token_ids if token < known])
