"""Near-duplicates: MinHash and locality-sensitive hashing find who may be alike, the n-grams themselves decide."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1mega.data.words import ngrams, split_words

if TYPE_CHECKING:
    from datasketch import LeanMinHash

_PRECISION_WEIGHT, _RECALL_WEIGHT = 0.1, 0.9
"""How the hash bands are chosen: a pair that is proposed in vain costs a comparison, one that is missed stays."""
_MAX_HASHED = 0.9
"""Hashing proposes pairs that are this alike at the latest: for a higher threshold too few bands would be left."""


def shingles(text: str, size: int) -> frozenset[tuple[str, ...]]:
    """The set of word n-grams of a text; a shorter text is one n-gram of all its words."""
    words = split_words(text)
    return frozenset(ngrams(words, size) or [tuple(words)])


def jaccard(first: frozenset, second: frozenset) -> float:
    """Intersection over union; 1 for two empty sets."""
    union = len(first | second)
    return len(first & second) / union if union else 1.0


@dataclass(frozen=True, slots=True)
class Signature:
    """digest: of a text's n-grams; hashes: their MinHash."""

    digest: bytes
    hashes: LeanMinHash


def signatures(ngram: int, num_permutations: int, texts: Sequence[str]) -> list[Signature]:
    """What `near_duplicates` compares; of each text by itself."""
    from datasketch import LeanMinHash, MinHash

    found = []
    for text in texts:
        grams = sorted(" ".join(gram).encode() for gram in shingles(text, ngram))
        hashed = MinHash(num_perm=num_permutations, seed=1)
        hashed.update_batch(grams)
        found.append(Signature(hashlib.sha256(b"\0".join(grams)).digest(), LeanMinHash(hashed)))
    return found


def near_duplicates(
    texts: Sequence[str],
    *,
    threshold: float,
    ngram: int,
    num_permutations: int,
    signed: Sequence[Signature] | None = None,
) -> list[int | None]:
    """For each text, the index of an earlier kept text with a Jaccard similarity of at least `threshold`; None: kept.

    Texts are taken in order, so the first of a group stays. Hashing may miss a pair close to the threshold, never
    invent one.
    signed: what `signatures` says, where it was asked elsewhere: nearly all of the time goes there.
    Memory: 8 * num_permutations bytes a kept text, and the texts.
    """
    from datasketch import MinHashLSH

    index = MinHashLSH(
        threshold=min(threshold, _MAX_HASHED), num_perm=num_permutations, weights=(_PRECISION_WEIGHT, _RECALL_WEIGHT)
    )
    same: dict[bytes, int] = {}
    found: list[int | None] = []
    signed = signatures(ngram, num_permutations, texts) if signed is None else signed
    for place, (text, signature) in enumerate(zip(texts, signed, strict=True)):
        if (twin := same.get(signature.digest)) is not None:
            found.append(twin)
            continue
        proposed = sorted(index.query(signature.hashes))
        grams = shingles(text, ngram) if proposed else frozenset()
        twin = next((o for o in proposed if jaccard(grams, shingles(texts[o], ngram)) >= threshold), None)
        found.append(twin)
        if twin is None:
            index.insert(place, signature.hashes)
            same[signature.digest] = place
    return found
