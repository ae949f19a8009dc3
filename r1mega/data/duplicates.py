"""Near-duplicates: MinHash and locality-sensitive hashing find who may be alike, the n-grams themselves decide."""

from __future__ import annotations

from collections.abc import Sequence

from r1mega.data.words import ngrams, split_words

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


def near_duplicates(texts: Sequence[str], *, threshold: float, ngram: int, num_permutations: int) -> list[int | None]:
    """For each text, the index of an earlier kept text with a Jaccard similarity of at least `threshold`; None: kept.

    Texts are taken in order, so the first of a group stays. Hashing may miss a pair close to the threshold, never
    invent one.
    Memory: 8 * num_permutations bytes a kept text, and the texts.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(
        threshold=min(threshold, _MAX_HASHED), num_perm=num_permutations, weights=(_PRECISION_WEIGHT, _RECALL_WEIGHT)
    )
    same: dict[frozenset, int] = {}
    found: list[int | None] = []
    for place, text in enumerate(texts):
        grams = shingles(text, ngram)
        if (twin := same.get(grams)) is not None:
            found.append(twin)
            continue
        signature = MinHash(num_perm=num_permutations, seed=1)
        signature.update_batch([" ".join(gram).encode() for gram in grams])
        proposed = sorted(index.query(signature))
        twin = next((o for o in proposed if jaccard(grams, shingles(texts[o], ngram)) >= threshold), None)
        found.append(twin)
        if twin is None:
            index.insert(place, signature)
            same[grams] = place
    return found
