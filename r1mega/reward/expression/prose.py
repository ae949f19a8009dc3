"""Answers in sentences: what is said before an answer, the one number of a plain sentence, verbal answers."""

from __future__ import annotations

import re

from r1mega.reward.expression.numerals import NUMBER_WORDS, PART_WORDS
from r1mega.reward.expression.text import AND_MARK, OR_MARK
from r1mega.reward.expression.units import HEDGES, SCALES, WORD

_CHINESE_SO = r"^(?:所以|因此|故|于是)?[,，]?\s*"
_LEAD = re.compile(
    r"^\s*=\s*|^\W*(?:(?:so|thus|therefore|hence|then)\b,?\s*)?(?:the\s+|my\s+|"
    r"our\s+)?(?:(?:final|correct|right|required|total)\s+)?"
    r"(?:answer|result|value|solution|choice|option|ans)s?\b\s*(?:is|are|:|=|be)+\s*:?\s*|"
    r"^\W*(?:so|thus|therefore|hence|then|(?:i\s+)?(?:choose|pick|select)(?=\s+\(?[A-J]\b))\b,?\s*|"
    + _CHINESE_SO
    + r"(?:最终)?答案\s*(?:应?[该当]?[是为]|:|：|=)+\s*:?\s*|^\s*答\s*[:：]\s*|"
    + _CHINESE_SO
    + r"(?:(?:应|该)?选择?\s*[:：]?\s*(?=[(（]?[A-JＡ-Ｊ])|(?:一共|总共|共|得)+[有是为]?(?=\s*\d))",
    re.IGNORECASE,
)
_APPROXIMATELY = re.compile(
    r"^[\s$*]*(?:\\[(\[]\s*)?(?:(?:\\approx|approximately|about|roughly)(?![A-Za-z])|[≈~～约]|大约)\s*", re.IGNORECASE
)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_PROSE_NUMBER = re.compile(r"(?<![\w.^_\\/*+=<>-])[-+]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?![\w^_\\/*+=<>(])")
_STATED = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals?(?:\s+to)?|makes?|gives?|gets?|got|has|have|had|needs?|costs?|weighs?|"
    r"earn(?:s|ed)|pays?|paid|takes?|took|totals?|contains?|sold|bought|saved?|saves|spends?|spent|find|obtain|"
    r"total\s+of)"
    r"(?:\s+(?:exactly|only|just|now|still))?|[:=])\s*$",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"n['’]t\b|\bcannot\b", re.IGNORECASE)
_NO_ANSWER = re.compile(r"\b(?:anything|everything|anyone|everyone|step|question|equation|problem)\b", re.IGNORECASE)


def without_lead(text: str) -> str:
    """'The answer is: 12' -> '12'; '\\approx 8.24' -> '8.24'."""
    return _APPROXIMATELY.sub("", _LEAD.sub("", text, count=1), count=1)


def from_prose(text: str) -> str | None:
    """The one formula or the one number that a plain sentence states ('there are 12 apples'); None when there is
    none, several, one that only qualifies something ('the square of 12'), or a hedge around it.
    """
    if not re.search(r"[A-Za-z]{2,}\s+[A-Za-z]|[A-Za-z]{2,}\s+\$?[\d\\]", text):
        return None
    text = text.replace("\\$", "")
    formulas = list(_FORMULA.finditer(text))
    if len(formulas) == 1:
        span = formulas[0].span()
        found = next(group for group in formulas[0].groups() if group)
    elif not formulas and "\\" not in text:
        numbers = list(_PROSE_NUMBER.finditer(text))
        if len(numbers) != 1:
            return None
        span, found = numbers[0].span(), numbers[0].group()
    else:
        return None
    before, after = text[: span[0]], text[span[1] :]
    if not _STATED.search(before):
        return None
    rest = f"{before} {after}"
    words = {word.lower().rstrip(".") for word in WORD.findall(rest)}
    blocked = (
        words & HEDGES
        or words & SCALES.keys()
        or words & NUMBER_WORDS
        or words & PART_WORDS
        or _NEGATED.search(rest)
        or _NO_ANSWER.search(rest)
        or re.search(r"[\d\\*/^=<>%]", rest.rstrip("= "))
    )
    return None if blocked else found


_KEPT = re.compile(
    rf"(?<=\d)\s*[.,:;/{AND_MARK}{OR_MARK}]\s*(?=\d)|[-−](?=\s*[\d.(])|(?<=\s)[-−](?=\s)|\.(?=\d)|"
    r"(?<=[\d)])!|[+*=<>^%|]"
)
_DROPPED = re.compile(r"[^\w]+")


def words_of(text: str) -> str:
    """Letters and digits of a verbal answer in lower case, without leading articles: 'The  Circle.' -> 'circle'.

    Signs that make another number or formula stay: '-3 apples' is not '3 apples', '3.5 cm' not '35 cm'.
    """
    text = re.sub(r"^\W*(?:the|an?)\s+(?=\w{2})", "", text.strip(), flags=re.IGNORECASE)
    pieces, position = [], 0
    for match in _KEPT.finditer(text):
        pieces += [_DROPPED.sub("", text[position : match.start()]), match.group().strip()]
        position = match.end()
    return "".join([*pieces, _DROPPED.sub("", text[position:])]).casefold()


_BETWEEN_ITEMS = re.compile(f"[,;{AND_MARK}{OR_MARK}]")


def same_wording(text: str, other: str, any_order: bool = False) -> bool:
    """Equal words; with any_order also the same items of a list. Between short items the commas count: 'I, II' is not
    'III'.
    """
    lists = [[words_of(part) for part in _BETWEEN_ITEMS.split(side) if part.strip()] for side in (text, other)]
    items, others = map(sorted, lists) if any_order else lists
    if items == others:
        return any(items)
    short = max(map(len, items + others), default=0) <= 3
    return words_of(text) == words_of(other) != "" and (len(items) == len(others) or not short)


_SAME_MEANING = {
    form: meaning
    for meaning, forms in {
        r"\mathbb{R}": "allrealnumbers allreals everyrealnumber anyrealnumber thesetofallrealnumbers setofallrealnumbers 全体实数",
        r"\emptyset": "nosolution nosolutions nosolutionexists nosolutionsexist norealsolution norealsolutions norealroots "
        "thereisnosolution therearenosolutions therearenorealsolutions emptyset theemptyset nullset 无解 空集 无实数解 无实数根",
        "⟦DNE⟧": "dne doesnotexist",
    }.items()
    for form in forms.split()
}


def symbol_for(text: str) -> str | None:
    """The symbol that stands for a verbal answer: 'all real numbers' is \\mathbb{R}."""
    return _SAME_MEANING.get(words_of(text)) if "\\" not in text else None
