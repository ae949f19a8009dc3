"""Verbal answers: the letters of multiple choice, names, days, times."""

from __future__ import annotations

import re

from r1mega.reward.expression.prose import same_wording, words_of
from r1mega.reward.expression.text import AND_MARK, CLOSE_TEXT, OPEN_TEXT, OR_MARK
from r1mega.reward.expression.units import split_unit

_CHOICE = re.compile(
    r"[\s(\[" + OPEN_TEXT + r"]*([A-Ja-j])\s*[" + CLOSE_TEXT + r")\]]*\s*(?:[.):,](?!\d|\s*[-+*/^=!_]).*)?", re.DOTALL
)
_CHOICE_MARK = re.compile(r"\(\s*[A-Ja-j]\s*\)|\b[A-J][.):]")
_CHOICE_LEAD = re.compile(
    r"\s*(?:(?:\(\s*([A-J])\s*\)|"
    + OPEN_TEXT
    + "([A-J])"
    + CLOSE_TEXT
    + rf")(?!\s*[-+*/^=!_{AND_MARK}{OR_MARK}])|(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s+\(?([A-J])\)?\s*$)"
)
_BOXED_CHOICE = re.compile(r"[\s(" + OPEN_TEXT + r"]*\(?([A-J])\)?[" + CLOSE_TEXT + r")\s]*")
_BOXED_CHOICE_LEAD = re.compile(OPEN_TEXT + r"([A-J])" + CLOSE_TEXT + r"\s+[^-+*/^=,;\s]")
_FONT = r"\\(?:textbf|text|mathrm|textrm|mathbf|bold|mbox|rm|bf)\s*\{"
_CHOICE_AND_VALUE = re.compile(  # \textbf{(C)}\ 42, \textbf{(C) }42, (\text{C}) 42, (C) 42, C. 42
    r"[\s$]*(?:"
    rf"{_FONT}\s*\(?\s*([A-J])\s*[).:](?:\s|\\[ ,])*\}}(?:[\s~:.,]|\\[ ,;:!]|\\q?quad|\\hspace\{{[^}}]*\}})*"
    rf"|\(\s*(?:{_FONT}\s*)?([A-J])\s*\}}?\s*\)(?:[\s~:.]|\\[ ,;:!])+"
    r"|\[([A-J])\]\s+"
    r"|([A-J])[.):]\s+)(.+)",
    re.DOTALL,
)
_NO_VALUE = re.compile(r"(?:\\text\s*\{)?\s*(?:[,;&]|and\b|or\b|[+*/^=_!]|-\s|\(?[A-J]\b\)?)")
_VERBAL = re.compile(OPEN_TEXT + r"|[A-Za-z]{3,}|\d\s*[aApP]\.?[mM]\b")
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?|\d\d?/\d\d?/\d{4}")
_NUMERAL = re.compile(OPEN_TEXT + "?([0-9A-Z]*[A-Z][0-9A-Z]*)" + CLOSE_TEXT + r"?_\{?\d+\}?")
_LETTERS = re.compile(rf"[\s({{]*[A-J](?:[\s,;&(){{}}{AND_MARK}{OPEN_TEXT}{CLOSE_TEXT}]*[A-J]){{1,9}}[\s)}}.]*")
_BETWEEN_CHOICES = frozenset(
    "and or also but no not then finally later maybe possibly rather either both option choice answer is the".split()
)


def chosen_letter(gold: str) -> str | None:
    """The letter of a cleaned gold that is a choice."""
    choice = _BOXED_CHOICE.fullmatch(gold) or _BOXED_CHOICE_LEAD.match(gold)
    return choice.group(1) if choice else None


def choice_and_value(text: str) -> tuple[str, str] | None:
    """Letter and value of a raw gold that holds both: '\\textbf{(C)}\\ 42'. None for any other."""
    match = _CHOICE_AND_VALUE.fullmatch(text)
    if not match:
        return None
    *letters, value = match.groups()
    value = value.strip().rstrip("$").strip()
    return None if not value or _NO_VALUE.match(value) else (next(filter(None, letters)), value)


def same_choice(letter: str, prediction: str) -> bool | None:
    """Whether a cleaned answer is this letter ('B', '(b)', 'B. Paris', 'option B'); None: something to compute."""
    match = _CHOICE.fullmatch(prediction)
    if match and len(set(_CHOICE_MARK.findall(prediction))) <= 1:
        same = match.group(1) == letter or (match.group(1).upper() == letter and not prediction.isalpha())
        return same and not names_another(letter, prediction[match.end(1) :])
    lead = _CHOICE_LEAD.match(prediction)
    if lead and len(_CHOICE_MARK.findall(prediction)) + prediction.count(OPEN_TEXT) <= 1:
        same = (lead.group(1) or lead.group(2) or lead.group(3)) == letter
        return same and not names_another(letter, prediction[lead.end(lead.lastindex or 0) :])
    return None if re.search(r"[A-Ja-j]", prediction) and re.search(r"[+=*^]", prediction) else False


def names_another(letter: str, rest: str) -> bool:
    """Whether nothing but other letters follows a letter: 'A, B' and 'A. No, B.' name two, '(A) AB = CD' one."""
    words = [word for word in re.findall(r"[A-Za-z]+", rest) if word.lower() not in _BETWEEN_CHOICES]
    return bool(words) and all(word in "ABCDEFGH" and len(word) == 1 for word in words) and set(words) != {letter}


def same_letters(gold: str, prediction: str) -> bool:
    """Several choices: 'A, C' is 'AC', in alphabetical order where nothing stands between them."""
    if not (_LETTERS.fullmatch(gold) and _LETTERS.fullmatch(prediction)):
        return False
    sides = [re.findall("[A-J]", text) for text in (gold, prediction)]
    joined = [letters for letters, text in zip(sides, (gold, prediction), strict=True) if text.strip(" .").isalpha()]
    return len(joined) == 1 and joined[0] == sorted(set(joined[0])) and all(sorted(s) == joined[0] for s in sides)


def unmarked(text: str) -> str:
    r"""The text without the marks of \text{...}."""
    return text.replace(OPEN_TEXT, "").replace(CLOSE_TEXT, "")


def same_words(gold: str, prediction: str) -> bool | None:
    """Verbal golds (choices, names, days, times): equal words or not; None for anything that is to be computed."""
    if (letter := chosen_letter(gold)) is not None:
        return same_choice(letter, prediction)
    if same_letters(gold, unmarked(prediction)):
        return True
    bare = unmarked(gold)
    numeral = _NUMERAL.fullmatch(gold)
    if numeral:  # of a base: 2B_{12} written without it
        return True if numeral[1].upper() == unmarked(prediction).upper() else None
    if _DATE.fullmatch(gold):
        return words_of(gold) == words_of(prediction)
    if not _VERBAL.search(gold) or "\\" in gold or re.search(r"[=^_<>+/]", gold):
        return None
    if re.fullmatch(r"[\d\s.,()-]+" + OPEN_TEXT + ".*", gold) and split_unit(gold).body != gold:
        return None
    if same_wording(bare, unmarked(prediction).strip("{}\\ "), any_order=True):
        return True
    computable = re.search(r"[a-z]\(|\d|\bpi\b|\bsqrt\b|\binf", bare) and not re.search(r"\b[ap]\.?m\b", bare)
    return None if computable else False
