"""Language consistency: mixed texts of known shares, and what must not count as words."""

from __future__ import annotations

import random
import string

import pytest

from r1mega.data.language import (
    chain_of_thought,
    language_of,
    language_share,
    mixes_languages,
    script_counts,
    strip_markup,
)
from r1mega.errors import RewardError
from r1mega.reward.language import LanguageConsistency
from r1mega.reward.parts import ScoringItem
from r1mega.types import Prompt, Response

ENGLISH = (
    "First we count the apples in the basket.",
    "Then we multiply the number by the price of each one.",
    "Let me check this again before I answer.",
)
CHINESE = ("首先我们数一数篮子里的苹果。", "然后我们把这个数乘以每个苹果的价格。", "让我在回答之前再检查一遍。")
FRENCH = (
    "D'abord nous comptons les pommes dans le panier.",
    "Ensuite nous multiplions ce nombre par le prix de chacune.",
)
GERMAN = (
    "Zuerst zählen wir die Äpfel in dem Korb auf dem Tisch.",
    "Dann multiplizieren wir diese Zahl mit dem Preis von jedem.",
)


def item(text: str, language: str | None = "en", question: str = "How many apples are there?") -> ScoringItem:
    return ScoringItem(Prompt("q", question, ("1",), "math", language, ()), Response((), (), "stop"), text)


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (ENGLISH, "en"),
        (CHINESE, "zh"),
        (FRENCH, "fr"),
        (GERMAN, "de"),
        (("Сначала посчитаем яблоки в корзине.",), "ru"),
    ],
)
def test_pure_texts(texts, language):
    for text in texts:
        assert language_share(text, language) == 1.0
        assert language_of(text) == language
        assert language_share(text, "zh" if language != "zh" else "en") == 0.0


@pytest.mark.parametrize("num_english", [1, 2, 3])
@pytest.mark.parametrize("num_chinese", [1, 2, 3])
def test_mixed_sentences_give_the_fraction(num_english, num_chinese):
    english, chinese = ENGLISH[:num_english], CHINESE[:num_chinese]
    words = sum(len(text.split()) for text in english)
    characters = sum(sum("\u4e00" <= c <= "\u9fff" for c in text) for text in chinese)
    mixed = " ".join(t for pair in zip(english + ("",) * 3, chinese + ("",) * 3, strict=False) for t in pair)
    assert language_share(mixed, "en") == pytest.approx(words / (words + characters), abs=0.05)
    assert language_share(mixed, "zh") == pytest.approx(characters / (words + characters), abs=0.05)
    assert mixes_languages(mixed)


JAPANESE = ("まず、初日に何枚の切符が売れたかを数えます。", "待って、これは間違いです。")


def test_chinese_and_japanese_share_characters_but_not_sentences():
    letters = [sum(c not in "、。，" for c in "".join(texts)) for texts in (CHINESE, JAPANESE)]
    mixed = " ".join((CHINESE[0], JAPANESE[0], *CHINESE[1:], JAPANESE[1]))
    assert language_share(mixed, "zh") == pytest.approx(letters[0] / sum(letters), abs=0.05)
    assert language_share(mixed, "ja") == pytest.approx(letters[1] / sum(letters), abs=0.05)
    assert language_share("".join(CHINESE), "ja") == 0.0
    assert language_share("".join(JAPANESE) + "答：三十。", "ja") == 1.0


def test_mixed_latin_sentences_give_the_fraction():
    for english in (1, 2, 3):
        for other in (FRENCH, GERMAN):
            words, others = sum(len(t.split()) for t in ENGLISH[:english]), sum(len(t.split()) for t in other)
            mixed = " ".join(ENGLISH[:english] + other)
            assert language_share(mixed, "en") == pytest.approx(words / (words + others), abs=0.05)


@pytest.mark.parametrize(
    "markup",
    [
        "$x^2 + y^2 = z$",
        "\\(\\text{area} = \\frac{a}{b}\\)",
        "```python\nfor apple in basket: print(apple)\n```",
        "`total_price`",
        "\\boxed{yes}",
        "<answer>",
        "https://example.org/some/words",
        "$$\\begin{aligned} a &= b \\end{aligned}$$",
        "x = 3y + f(x)",
    ],
)
def test_markup_is_no_language(markup):
    assert language_share(f"{CHINESE[0]} {markup} {CHINESE[1]}", "zh") == 1.0
    assert not strip_markup(markup).strip(" =+\n$.()")


def test_chain_of_thought():
    assert chain_of_thought("<think>a</think><answer>b</answer>") == "a"
    assert chain_of_thought("a</think><answer>b</answer>") == "a"
    assert chain_of_thought("<think>never closed") == "never closed"
    assert chain_of_thought("no tags") == "no tags"


def test_empty_reasoning_scores_nothing():
    for text in ("<think></think><answer>A long English answer.</answer>", "<think> $x$ 12 </think>", ""):
        assert LanguageConsistency().score(item(text)).value == 0.0


def test_target_is_the_key_then_the_prompts_language_then_its_text():
    english = f"<think>{ENGLISH[0]}</think>"
    assert LanguageConsistency("zh").score(item(english)).value == 0.0
    assert LanguageConsistency().score(item(english)).value == 1.0
    assert LanguageConsistency().score(item(english, language=None, question=CHINESE[0])).value == 0.0
    assert LanguageConsistency().score(item(english, language=None)).value == 1.0


def test_unknown_language_is_an_error():
    with pytest.raises(RewardError, match="'xx'.*known: "):
        language_share("some words", "xx")


def test_mixing_is_a_matter_of_scripts():
    assert not mixes_languages(f"<think>{ENGLISH[0]}</think> {CHINESE[0]}")
    assert not mixes_languages("")
    assert not mixes_languages("これは日本語の文章です。漢字も使います。")
    assert mixes_languages(f"<think>{ENGLISH[0]} 所以答案</think>")
    entities = "".join(f"&#{ord(character)};" for character in "所以答案")
    assert entities.isascii() and mixes_languages(f"<think>{ENGLISH[0]} {entities}</think>")


@pytest.mark.parametrize("seed", range(3))
def test_letters_of_one_alphabet_hold_one_script(seed):
    """What a metric of each response does not look for: whatever ASCII text, its words are of one script."""
    rng = random.Random(seed)
    pieces = [
        *string.printable,
        *ENGLISH,
        r"\alpha",
        r"\text{so it is}",
        r"\'e",
        "`x = 1`",
        "$x_{max}$",
        "<b>",
        "a@b.c",
    ]
    for _ in range(100):
        text = "".join(rng.choices(pieces, k=rng.randrange(60)))
        assert len(script_counts(strip_markup(text.replace("&", "")))) < 2
