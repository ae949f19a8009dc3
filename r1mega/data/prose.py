"""The words of a text, whatever they are dressed in.

Maths, code, URLs and tags are no language, but a sentence in them is one. So letters are made plain first (full-width,
mathematical, circled, spaced out, look-alikes of another script), then what is markup is taken out, except for the
sentences that stand in it and for more loose words than terms explain.
"""

from __future__ import annotations

import builtins
import html
import keyword
import sys
import unicodedata
from collections import Counter

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
    r"(?<![\p{Latin}\p{Cyrillic}\p{Greek}\d])(?:[\p{Latin}\p{Cyrillic}\p{Greek}](?:[\s.,*_·|/\d-]| {2,3}|, |\) ?\(|\$ ?\$)){7,}"
    r"[\p{Latin}\p{Cyrillic}\p{Greek}](?![\p{Latin}\p{Cyrillic}\p{Greek}\d])"
)

_MARKUP = regex.compile(
    r"(?P<fence>```.*?(?:```|$)|~~~.*?(?:~~~|$))|(?P<code>`[^`\n]*`)"
    r"|(?P<maths>\$\$[^$]{,1000}\$\$|\$[^$\n]{,500}\$"
    r"|\\\[(?:[^\\]|\\(?![\[\]])){,1000}\\\]|\\\((?:[^\\]|\\(?![()])){,500}\\\)"  # a repeated opening must not cost
    r"|\\begin\{(?P<name>\w+\*?)\}.{,1000}?\\end\{(?P=name)\}"  # quadratic time
    r"|\\[A-Za-z]+\*?(?:\s?\{[^{}]*\})*)"
    r"|(?P<url>https?://[^\s，。；、）]+|[\w.+-]{1,64}@[\w.-]+)|(?P<tag></?[A-Za-z][^<>]{,100}>)",
    regex.DOTALL,
)
_TEXT_GROUP = regex.compile(
    r"\\(?:text\w*|mbox|hbox|mathrm|mathit|mathbf|mathsf|operatorname\*?|emph|underline)\s*\{([^{}]*)\}"
)
_COMMAND = regex.compile(r"\\(?:begin|end)\s*\{\w+\*?\}|\\[A-Za-z]+\*?|\\.|[{}~]", regex.DOTALL)
_RUN = regex.compile(r"(?<![\w\\])\p{Latin}[\p{Latin}'’]*(?:[ \t\n]+\p{Latin}[\p{Latin}'’]*){2,}(?![\w(\[=])")
_WORD = regex.compile(r"\p{Latin}(?:['’]?\p{Latin})+")
_OTHER_SCRIPT = regex.compile(r"(?:(?![\p{Latin}\p{Greek}])[\p{L}\p{M}])+|\p{Greek}{3,}")
_CODE_LINE = regex.compile(r"[=()\[\]{}<>;+*/%^&|\\@_$#]|:\s*$|\s--?\w|\w\.[a-z]")
_FORMULA_WORD = regex.compile(  # letters of other scripts may stand right beside it: 设x为, x는, 跑了5km
    r"(?<![\p{Latin}\p{Greek}\p{Cyrillic}])[\p{Latin}\p{Greek}](?![\p{Latin}\p{Greek}\p{Cyrillic}])(?!\s+[a-z]{2})"
    r"|(?<![\p{Latin}\p{Greek}\p{Cyrillic}\d_])(?:[A-Za-z]*\d[\p{Latin}\p{Greek}\d_.]*"
    r"|[A-Za-z][\p{Latin}\d_]{,20}\((?:\w{1,3}[ ,+-]*){1,4}\)\s?=|[A-Za-z]\([a-z]\)|[A-Za-z]+_[\p{Latin}\d_]+)"
)
_CAPITALS = regex.compile(r"(?<![\p{Latin}_\\])(?:Rt(?=\s*△)|[A-Z]{2,})(?![\p{Latin}_])")
_FUNCTIONS = regex.compile(
    r"(?<![\p{Latin}_\\])(?:arc)?(?:sin|cos|tan|cot|log|ln|lg|lim|mod|gcd|lcm|max|min)[A-Z]?(?![\p{Latin}_])"
)
_POINTS = 12  # letters that the points of a drawing are called by; sentences in capitals have more
_CAPITAL_WORDS = frozenset(
    "THE AND TWO SUM ADD ALL FOR GET ONE SIX TEN NOT ARE WAS HAS HAVE THAT THIS THEN FROM WITH WHEN NEXT EACH NUM".split()
)
_WITHOUT_SPACES = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]"
_SET_IN = regex.compile(rf"(?<={_WITHOUT_SPACES})\p{{Latin}}(?={_WITHOUT_SPACES})")
_VARIABLES = 12  # letters that stand alone between the characters of a text; a sentence spelt so has more
_NOT_LATIN = regex.compile(r"(?![\p{Latin}\p{Greek}])\p{L}")
_STRING = regex.compile(r"\"[^\"\n]*\"|'[^'\n]*'|(?:#|//|--|/\*).*")
_BARE = regex.compile(r"\s*[\w.]+(?:\(\))?(?:\s*[=;,:]\s*[\w.]*(?:\(\))?)*\s*")
_NAMES_IN_A_ROW = regex.compile(r"(?:\p{Latin}[\p{Latin}_]*\s*[,+*|&-]\s*){5,}\p{Latin}[\p{Latin}_]*")
_INDEX = regex.compile(r"[_^]\s*\{?\s*(\p{Latin}{2,3})\s*\}?")
_CONSTANT = regex.compile(r"\s*[^\W_]+(?:_[^\W_]+)?\s*=\s*(?:\d[\w.]*|None|True|False)?\s*;?\s*")
_SHORT_WORD = regex.compile(  # `we` or `the`, rather than a product
    r"\W*(?:\p{L}?[aeiou]\p{L}?|(?=\p{L}*[aeiou])(?=\p{L}*[fghjklrstuvw])\p{L}{3})\W*"
)
_NO_WORDS = frozenset(
    [
        *(word.lower() for word in keyword.kwlist),
        *dir(builtins),
        *sys.stdlib_module_names,
        "numpy",
        "np",
        "main",
        "init",
    ]
    + "int float str bool list dict set tuple len range print input map char void const var let function null true false".split()
    + "self elif public private static struct double string include using namespace std auto new end then do done begin".split()
    + "select where join group order by having limit values insert update delete table include import package".split()
    + "sin cos tan cot sec csc log ln exp lim max min sup inf mod gcd lcm det dim ker arg deg arcsin arccos arctan".split()
    + "sinh cosh tanh frac sqrt sum prod quad text cdot times".split()
)
_CODE_START = frozenset(  # of a line
    [
        *(word.lower() for word in keyword.kwlist),
        "select",
        "where",
        "join",
        "group",
        "order",
        "insert",
        "update",
        "public",
    ]
    + "static using include package let const var void int long double char auto bool struct function fn func end".split()
) - {"and", "or", "not", "in", "is", "as"}
_OF_ADDRESSES = frozenset("www html htm php wiki index path page pages com org net".split())
_TAGS = frozenset(
    "a b i p u s em br hr li ol ul td th tr div img pre sub sup code span body head html link meta svg font form input "
    "label table tbody thead tfoot title small strong script style button center details summary section article "
    "blockquote header footer h1 h2 h3 h4 h5 h6 think answer".split()
)
_COMMANDS = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi varpi rho varrho "
    "sigma varsigma tau upsilon phi varphi chi psi omega frac dfrac tfrac cfrac sqrt root sum prod coprod int iint iiint "
    "oint lim limsup liminf inf sup max min arg deg det dim exp gcd hom ker lg ln log mod bmod pmod pod sin cos tan cot "
    "sec csc sinh cosh tanh coth arcsin arccos arctan binom dbinom tbinom choose over atop cdot cdots ldots dots vdots "
    "ddots dotsb dotsc times div pm mp ast star circ bullet oplus ominus otimes odot cap cup uplus setminus wedge vee "
    "land lor lnot neg not top bot le leq leqslant ge geq geqslant ne neq lt gt ll gg equiv sim simeq approx cong propto "
    "prec succ subset subseteq subsetneq supset supseteq in ni notin forall exists nexists emptyset varnothing infty "
    "partial nabla angle measuredangle triangle square blacksquare diamond perp parallel nparallel mid nmid models "
    "vdash therefore because to gets mapsto rightarrow leftarrow leftrightarrow longrightarrow longleftarrow implies "
    "impliedby iff uparrow downarrow hookrightarrow rightleftharpoons left right middle big bigg bigl bigr biggl biggr "
    "bigm langle rangle lfloor rfloor lceil rceil lvert rvert lbrace rbrace vert begin end quad qquad hspace vspace "
    "phantom hphantom hfill newline displaystyle textstyle limits nolimits substack overset underset stackrel overline "
    "underline widehat hat bar vec dot ddot tilde widetilde overrightarrow overbrace underbrace boxed fbox box cancel "
    "text textbf textit textrm texttt textsf mathrm mathbf mathit mathbb mathcal mathfrak mathscr mathsf boldsymbol bm "
    "operatorname mbox hbox emph tag label ref eqref cite section subsection subsubsection paragraph item hline cline "
    "prime degree ell hbar imath jmath aleph wp re im pr bf it rm tt sl cal large small tiny color textcolor href url "
    "bigcup bigcap bigoplus bigotimes bigvee bigwedge sqcup sqcap xrightarrow xleftarrow dagger ddagger backslash "
    "checkmark colon space centering includegraphics caption footnote verb noindent par mathop nonumber displaylimits".split()
)
_SENTENCE_WORDS = 4  # so many words of no code or formula in a row make a sentence, and fewer are terms
_LONGEST_TERM = 20  # letters; what is longer is words without spaces
_TERMS, _TERMS_SHARE = 3, 0.075  # loose words in markup that do not count: so many, and that share of those outside


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
    """Words of letters that are spaced out: what stands between most letters joins them, anything else ends a word."""
    between = regex.findall(r"\P{L}+", spaced)
    joint = Counter(between).most_common(1)[0][0]
    return "".join(
        letter + ("" if gap in ("", joint) else " ")
        for letter, gap in zip(regex.findall(r"\p{L}", spaced), [*between, ""], strict=True)
    )


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
    loose: list[str] = []
    position = 0
    if _NOT_LATIN.search(text):
        text, spelt = _without_names_of_points(text)
        outside.append(spelt)
    for found in _MARKUP.finditer(text):
        outside.append(_without_formula_words(text[position : found.start()], loose))
        position = found.end()
        sentences, terms = _of_markup(found)
        outside += [
            " ",
            *(f"\n{sentence}\n" for sentence in sentences),
            " ".join(_OTHER_SCRIPT.findall(found.group())),
            " ",
        ]
        loose += terms
    outside.append(_without_formula_words(text[position:], loose))
    result = "".join(outside)
    allowed = _TERMS + int(_TERMS_SHARE * sum(1 for _ in regex.finditer(r"\p{Han}|\p{L}+", result)))
    result += "".join(f"\n{word}\n" for word in loose if len(word) > _LONGEST_TERM)
    counted = sum(word.lower() not in _NO_WORDS for word in loose)
    if counted <= allowed:
        return result
    excess = counted - allowed  # half as many again as terms explain may be terms; of twice as many soon all count
    share = min(counted, max(excess, 3 * excess - 3 * allowed // 2)) / counted
    beyond = loose[-max(1, round(len(loose) * share)) :]  # words of code in proportion: `and` is one
    return f"{result}\n{' '.join(beyond)}\n"


def _without_names_of_points(text: str) -> tuple[str, str]:
    """A text of another script without AB, △ABC and cosB, and a line of what single letters between its characters spell.
    Capitals that are words (letters twice, many letters in all, `THE`) become small ones.
    """
    found = _CAPITALS.findall(text)
    odd = sum(len(name) > 4 or len(set(name)) < len(name) for name in found)
    told = len(_CAPITAL_WORDS.intersection(found)) > 1
    points = not told and 5 * odd <= len(found) and len(set("".join(found))) <= _POINTS
    text = _CAPITALS.sub(lambda name: " " if points else name.group().lower(), text)
    text = _FUNCTIONS.sub(" ", text)
    single = _SET_IN.findall(text)
    return text, f"{''.join(single)}\n" if len(set("".join(single).lower())) > _VARIABLES else ""


def _without_formula_words(text: str, loose: list[str]) -> str:
    for found in _FORMULA_WORD.finditer(text):
        loose.extend(word for part in found.group().split("_") for word in regex.findall(r"\p{Latin}{2,}", part))
    return _FORMULA_WORD.sub(" ", text)


def _of_markup(found: regex.Match[str]) -> tuple[list[str], list[str]]:
    """(sentences, which count whatever they are; terms, which count if they are several)."""
    content = found.group()
    if found["fence"] is not None or found["code"] is not None:
        return _of_code(content)
    if found["url"] is not None:
        address = content.partition("@")[0] if "://" not in content else content.split("://")[1].partition("/")[2]
        return [], [word for word in regex.findall(r"\p{Latin}{2,}", address) if word.lower() not in _OF_ADDRESSES]
    if found["tag"] is not None:
        name = regex.findall(r"[\w-]+", content)[0]
        rest = content.partition(name)[2]
        told = _parts(regex.sub(r"[\w-]+\s*=", " ", rest))
        own = [] if name.lower() in _TAGS else _WORD.findall(name)
        return ([" ".join(own + told)], []) if len(told) >= _SENTENCE_WORDS else ([], own + told)
    return _of_maths(content)


def _of_maths(content: str) -> tuple[list[str], list[str]]:
    """Sentences: text groups and runs of words. Terms: text groups of a word, commands of no formula, and words that
    are longer than products of variables."""
    groups = [_WORD.findall(group) for group in _TEXT_GROUP.findall(content)]
    sentences = [" ".join(words) for words in groups if len(words) > 1]
    terms = [word for words in groups if len(words) == 1 for word in words]
    terms += [name for name in regex.findall(r"\\([A-Za-z]{2,})", content) if name.lower() not in _COMMANDS]
    rest = _COMMAND.sub(" ", _TEXT_GROUP.sub(" ", content)).strip("$ ")
    for run in _RUN.findall(rest):
        if sum(len(word) > 2 and not word.isupper() for word in run.split()) >= 2:
            sentences.append(run)
            rest = rest.replace(run, " ", 1)
    alone = _SHORT_WORD.fullmatch(rest) is not None
    words = [word for word in _WORD.findall(rest) if not word.isupper()]
    alone = alone or any(len(word) > 3 for word in words)
    short = [name for name in _INDEX.findall(rest) if _SHORT_WORD.fullmatch(name) and not alone]
    return sentences, terms + short + [word for word in words if len(word) > 3 or alone]


def _of_code(content: str) -> tuple[list[str], list[str]]:
    """Sentences: lines without a sign of code, and runs of words in the others (strings and comments). Terms: other
    words of these, and of lines that do nothing but name; what a program computes with is neither.
    """
    sentences: list[str] = []
    terms: list[str] = []
    inline = "\n" not in content
    if content.startswith(("```", "~~~")) and not inline:
        content = content.partition("\n")[2]
    for line in content.strip("`~").splitlines():
        rest = line
        if not _begins_as_code(line):
            for run in _RUN.findall(line) if _CODE_LINE.search(line) else [line]:
                if len(_parts(run)) >= _SENTENCE_WORDS:
                    sentences.append(" ".join(_WORD.findall(run)))
                    rest = rest.replace(run, " ", 1)
        told = " ".join(_STRING.findall(rest))
        code = _STRING.sub(" ", rest)
        bare = _BARE.fullmatch(code) and not _CONSTANT.fullmatch(code)
        if not _CODE_LINE.search(line) and not _begins_as_code(line):
            terms += _WORD.findall(_apart(rest))
        else:
            terms += _WORD.findall(told)
            if bare:
                terms += _WORD.findall(_apart(code))
            elif inline or not _CODE_LINE.search(line):
                terms += _parts(code)
            elif not line.lstrip().startswith(("import", "from")):
                terms += [word for names in _NAMES_IN_A_ROW.findall(code) for word in _WORD.findall(_apart(names))]
    return sentences, terms


def _begins_as_code(line: str) -> bool:
    first = _WORD.match(line.strip())
    return first is not None and first.group().lower() in _CODE_START


def _parts(text: str) -> list[str]:
    """Words of two letters and more that neither a language of programming nor a formula has; `a_name` is two, and so is
    `aName`."""
    return [word for word in _WORD.findall(_apart(text)) if word.lower() not in _NO_WORDS]


def _apart(text: str) -> str:
    return regex.sub(r"(?<=\p{Ll})(?=\p{Lu})", " ", text)
