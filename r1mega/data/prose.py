"""The words of a text, whatever they are dressed in.

Maths, code, URLs and tags are no language, but a sentence in them is one. So letters are made plain first (full-width,
mathematical, circled, spaced out, look-alikes of another script), then what is markup is taken out, except for the
sentences that stand in it and for more loose words than terms explain.
"""

from __future__ import annotations

import html
import keyword
import unicodedata
from collections.abc import Iterator

import regex

_LOOKALIKES = str.maketrans(
    # Cyrillic, then Greek
    "аьсԁеһіјкӏмпорԛгѕтуѵԝхүвнзАВСԀЕҺНІЈКМОРԚЅТУѴԜХ" + "αβγεηικνορτυχωμσΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "abcdehijklmnopqrstyvwxybhzABCDEHHIJKMOPQSTYVWX" + "abyenikvoptuxwuoABEZHIKMNOPTYX",
)
_TO_CYRILLIC = str.maketrans("acehijkmoprstxyABCEHIJKMOPSTXY", "асеһіјкморгѕтхуАВСЕНІЈКМОРЅТХУ")
_FOLDED = frozenset(map(chr, _LOOKALIKES))
_RARE = regex.compile(r"[ԀԁԚԛԜԝҺһӀӏѴѵЅѕЈјү]")  # Cyrillic letters that English is spelt with, and Russian is not
_LETTERS = regex.compile(r"\p{L}+")
_MARKS = regex.compile(r"[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f]+")
_INVISIBLE = regex.compile(r"[\p{Cf}\u115f\u1160\u3164\uffa0]+")
_WITHOUT_FORM = {  # letters without a compatibility form that is a letter: negative circled and squared ones, flags, in
    # parentheses, and invisible tags
    **{first + i: ord("A") + i for first in (0x1F110, 0x1F150, 0x1F170, 0x1F1E6) for i in range(26)},
    **{0x249C + i: ord("a") + i for i in range(26)},
    **{0xE0000 + code: code for code in range(0x20, 0x7F)},
}
_ACCENT = regex.compile(r"\\['\"^`~=.]\{?(\p{L})\}?")
_STYLED_LETTER = regex.compile(r"\\(?:text|math)\w*\s*\{(\p{L})\}(?:\s*\{\})?")
_SPACED = regex.compile(
    r"(?<![\p{L}\d])(?:[\p{Latin}\p{Cyrillic}\p{Greek}](?:[ .,*_·|/-]| {2,3})){7,}[\p{Latin}\p{Cyrillic}\p{Greek}](?![\p{L}\d])"
)

_MARKUP = regex.compile(
    r"(?P<fence>```.*?(?:```|$)|~~~.*?(?:~~~|$))|(?P<code>`[^`\n]*`)"
    r"|(?P<maths>\$\$[^$]{,1000}\$\$|\$[^$\n]{,500}\$"
    r"|\\\[(?:[^\\]|\\(?![\[\]])){,1000}\\\]|\\\((?:[^\\]|\\(?![()])){,500}\\\)"  # a repeated opening must not cost
    r"|\\begin\{(?P<name>\w+\*?)\}.{,1000}?\\end\{(?P=name)\}"  # quadratic time
    r"|\\[A-Za-z]+\*?(?:\s?\{[^{}]*\})*)"
    r"|(?P<url>https?://\S+)|(?P<tag></?[A-Za-z][^<>]{,100}>)",
    regex.DOTALL,
)
_TEXT_GROUP = regex.compile(
    r"\\(?:text\w*|mbox|hbox|mathrm|mathit|mathbf|mathsf|operatorname\*?|emph|underline)\s*\{([^{}]*)\}"
)
_COMMAND = regex.compile(r"\\(?:begin|end)\s*\{\w+\*?\}|\\[A-Za-z]+\*?|\\.|[{}~]", regex.DOTALL)
_RUN = regex.compile(r"(?<![\w\\])\p{Latin}[\p{Latin}'’]*(?:[ \t\n]+\p{Latin}[\p{Latin}'’]*){2,}(?![\w(\[=])")
_WORD = regex.compile(r"\p{Latin}(?:['’]?\p{Latin})+")
_OTHER_SCRIPT = regex.compile(r"(?:(?![\p{Latin}\p{Greek}])[\p{L}\p{M}])+|\p{Greek}{3,}")
_CODE_LINE = regex.compile(r"[=()\[\]{}<>;+*/%^&|\\@_$#]|:\s*$")
_FORMULA_WORD = regex.compile(
    r"(?<!\p{L})[\p{Latin}\p{Greek}](?!\p{L})(?!\s+[a-z]{2})"
    r"|(?<!\w)(?:[A-Za-z]*\d[\w.]*|[A-Za-z]\w{,20}\((?:\w{1,3}[ ,+-]*){1,4}\)\s?=|[A-Za-z]\([a-z]\)|[A-Za-z]+_\w+)"
)
_NO_WORDS = frozenset(
    [*(word.lower() for word in keyword.kwlist)]
    + "int float str bool list dict set tuple len range print input map char void const var let function null true false".split()
    + "self elif public private static struct double string include using namespace std auto new end then do done begin".split()
    + "select where join group order limit values insert update delete table".split()
    + "sin cos tan cot sec csc log ln exp lim max min sup inf mod gcd lcm det dim ker arg deg arcsin arccos arctan".split()
    + "sinh cosh tanh frac sqrt sum prod quad text cdot times".split()
)
_SENTENCE_WORDS = 3  # so many words in a row make a sentence, and fewer are terms
_URL_WORDS = 6
_TERMS, _TERMS_SHARE = 3, 0.1  # loose words in markup that do not count: so many, and one for ten words outside


def plain_letters(text: str) -> str:
    """The text in ordinary letters, and no invisible ones. A word of several scripts is of the one that it looks like."""
    text = html.unescape(text) if "&" in text else text
    if "\\" in text:
        text = _STYLED_LETTER.sub(r"\1", _ACCENT.sub(r"\1", text))
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_WITHOUT_FORM))
        text = _MARKS.sub("", _INVISIBLE.sub("", text))
        text = _LETTERS.sub(lambda word: _of_one_script(word.group()), text)
    return _SPACED.sub(lambda letters: _together(letters.group()), text)


def _together(spaced: str) -> str:
    """Words of letters that are spaced out: a space ends one where something else stands between letters, else two."""
    words = spaced.split() if regex.search(r"[^\p{L} ]", spaced) else regex.split(r" {2,}", spaced)
    return " ".join("".join(filter(str.isalpha, word)) for word in words)


def _of_one_script(word: str) -> str:
    if word.isascii():
        return word
    folded = word.translate(_LOOKALIKES)
    if folded == word or not regex.fullmatch(r"\p{Latin}+", folded):
        if regex.search(r"\p{Cyrillic}", word) and regex.search(r"\p{Latin}", word):
            cyrillic = word.translate(_TO_CYRILLIC)
            return cyrillic if regex.fullmatch(r"\p{Cyrillic}+", cyrillic) else word
        return word
    return folded if regex.search(r"\p{Latin}", word) or _RARE.search(word) else word


def prose(text: str) -> str:
    """Text (of plain letters) without markup and formula words such as x, 3n and f(x) =; sentences that stood in markup
    are lines of their own, and so are its loose words where they are more than terms explain.
    """
    outside: list[str] = []
    group: list[str] = []  # words of markup with no word between
    loose: list[str] = []
    position = 0

    def close_group() -> None:
        if len(group) >= _SENTENCE_WORDS:
            outside.append("\n" + " ".join(group) + "\n")
        else:
            loose.extend(group)
        group.clear()

    for found in _MARKUP.finditer(text):
        between = text[position : found.start()]
        position = found.end()
        if regex.search(r"\p{L}{2}|\p{Han}|[\u3040-\u30ff]", between):
            close_group()
        outside.append(_without_formula_words(between, loose))
        inner, words = _of_markup(found)
        outside.append(f" {inner} ")
        group += words
    close_group()
    outside.append(_without_formula_words(text[position:], loose))
    result = "".join(outside)
    allowed = _TERMS + int(_TERMS_SHARE * sum(1 for _ in regex.finditer(r"\p{Han}|\p{L}+", result)))
    return result if len(loose) <= allowed else f"{result}\n{' '.join(loose[allowed:])}\n"


def _without_formula_words(text: str, loose: list[str]) -> str:
    for found in _FORMULA_WORD.finditer(text):
        loose.extend(word for part in found.group().split("_") for word in regex.findall(r"\p{Latin}{2,}", part))
    return _FORMULA_WORD.sub(" ", text)


def _of_markup(found: regex.Match[str]) -> tuple[str, list[str]]:
    """(what counts whatever it is: words of other scripts, sentences of code; words that count if they are several)."""
    content = found.group()
    others = " ".join(_OTHER_SCRIPT.findall(content))
    if found["fence"] is not None:
        return f"{others}\n{_sentences_of_code(content)}\n", []
    if found["code"] is not None:
        sentences = _sentences_of_code(content)
        return others, (sentences or " ".join(_parts(content))).split()
    if found["url"] is not None:
        words = [word for word in regex.findall(r"\p{Latin}{3,}", content.partition("://")[2])]
        return others, words if len(words) >= _URL_WORDS else []
    if found["tag"] is not None:
        return others, [word for word in _parts(regex.sub(r"^</?[\w-]+|[\w-]+\s*=", " ", content))]
    return others, list(_of_maths(content))


def _of_maths(content: str) -> Iterator[str]:
    """Words of text groups, of runs of words, and those that are longer than products of variables."""
    for group in _TEXT_GROUP.findall(content):
        yield from _WORD.findall(group)
    rest = _COMMAND.sub(" ", _TEXT_GROUP.sub(" ", content)).strip("$ ")
    for run in _RUN.findall(rest):
        if sum(len(word) > 2 and not word.isupper() for word in run.split()) >= 2:
            yield from run.split()
            rest = rest.replace(run, " ", 1)
    alone = regex.fullmatch(r"\W*\p{L}?[aeiou]\p{L}?\W*", rest) is not None  # `we`, rather than a product
    yield from (word for word in _parts(rest) if (len(word) > 3 or alone) and not word.isupper())


def _sentences_of_code(content: str) -> str:
    """Lines without a sign of code, and runs of words in the others (strings and comments)."""
    found = []
    plain: list[str] = []
    for line in content.strip("`~").splitlines():
        if not _CODE_LINE.search(line):
            plain += _WORD.findall(line) if _parts(line) else []
        else:
            found += [run for run in _RUN.findall(line) if len(_parts(run)) >= _SENTENCE_WORDS]
    if len(plain) >= _SENTENCE_WORDS:
        found.append(" ".join(plain))
    return "\n".join(found)


def _parts(text: str) -> list[str]:
    """Words of two letters and more that neither a language of programming nor a formula has; `a_name` is two."""
    return [word for word in _WORD.findall(text) if word.lower() not in _NO_WORDS]
