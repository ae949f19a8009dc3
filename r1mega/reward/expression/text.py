"""Clean-up of answer texts before parsing: character variants, LaTeX spacing, text boxes, lists in words."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from r1mega.reward.expression.numerals import spelled_out

OPEN_TEXT, CLOSE_TEXT = "\u27e6", "\u27e7"  # mark the content of \text{...}; these brackets do not occur in answers
AND_MARK, OR_MARK = "\u2a53", "\u2a54"  # stand between the items of 'a and b', 'a or b'; nor do these

_SYMBOLS = {
    "。": ".",
    "、": ",",
    "，": ",",
    "；": ";",
    "：": ":",
    "∶": ":",
    "（": "(",
    "）": ")",
    "【": "[",
    "】": "]",
    "｛": r"\{",
    "｝": r"\}",
    "〈": r"\langle ",
    "〉": r"\rangle ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "−": "-",
    "–": "-",
    "—": "-",
    "‐": "-",
    "‑": "-",
    "×": r"\times ",
    "÷": r"\div ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "∞": r"\infty ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "√": r"\sqrt ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "⩽": r"\le ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≃": r"\approx ",
    "≅": r"\approx ",
    "≡": "=",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "∖": r"\setminus ",
    "π": r"\pi ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "δ": r"\delta ",
    "θ": r"\theta ",
    "λ": r"\lambda ",
    "μ": r"\mu ",
    "σ": r"\sigma ",
    "φ": r"\phi ",
    "ω": r"\omega ",
    "′": "'",
    "’": "'",
    "‘": "'",
    "∠": r"\angle ",
    "∛": r"\cbrt ",
    "¢": " cents",
    "⁄": "/",
    "“": '"',
    "”": '"',
    "\u00a0": " ",
    "\u2009": " ",
    "\u202f": " ",
    "\u2002": " ",
    "\u2003": " ",
    "\u3000": " ",
    "\u200b": "",
    "\ufeff": "",
    "€": "",
    "£": "",
    "¥": "",
    "￥": "",
    "₹": "",
    "％": "%",
    "\t": " ",
    "\n": " ",
    "\r": " ",
}
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n", strict=True))
_TRANSLATION = str.maketrans({**{chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)}, **_SYMBOLS})
_UNUSUAL = re.compile(r"[^ -~]|[\t\n\r]")
_SUPERSCRIPT_RUN = re.compile("[" + "".join(_SUPERSCRIPTS) + "]+")
_FRACTION_RUN = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹]+)⁄([₀₁₂₃₄₅₆₇₈₉]+)")
_SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")

_TEXT_BOX = re.compile(
    r"\\(text|mbox|textbf|textit|textrm|textnormal|texttt|textsf|textup|hbox|mathrm|operatorname\*?|mathit|rm)"
    r"\s*\{([^{}]*)\}"
)
_COUNTED = re.compile(
    r"\s*(\d[\d,]*(?:\.\d+)?) ((?!(?:and|or|to|not|but|of|out|in|more|less)\b)[a-z]+(?: [a-z]+)?)\.?\s*"
)  # 5 apples
_FONT = re.compile(r"\\(?:mathbf|boldsymbol|bm|mathsf|mathcal|bold|ensuremath|underline|boxed|fbox|phantom)\s*(?=\{)")
_DROPPED = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits|bf|it|phantom|"
    r"tiny|small|normalsize|large|Large|LARGE|huge|Huge|(?:text)?color\s*\{[^{}]*\}|"
    r"triangle|bigtriangleup)(?![A-Za-z])\.?"
)
_SAME_COMMAND = {  # names of one command in other countries and packages
    "tg": r"\tan",
    "ctg": r"\cot",
    "arctg": r"\arctan",
    "arcctg": r"\arccot",
    "sh": r"\sinh",
    "ch": r"\cosh",
    "th": r"\tanh",
    "R": r"\mathbb{R}",
    "Z": r"\mathbb{Z}",
    "N": r"\mathbb{N}",
    "leqq": r"\le",
    "geqq": r"\ge",
    "not=": r"\ne",
    "not\\in": r"\notin",
    "textdegree": r"^\circ",
    "infin": r"\infty",
    "forall": "for all ",
    "cong": r"\approx ",
    "thickapprox": r"\approx ",
    "leqslant": r"\le ",
    "geqslant": r"\ge ",
    "dbinom": r"\binom",
    "tbinom": r"\binom",
}
_NUMBER_SETS = re.compile(r"(?<=\\in)\s*\\(?:mathbf|boldsymbol|bm)\s*\{?\s*([ZNQRC])(?![A-Za-z])\s*\}?")
_SIUNITX = re.compile(r"\\(num|ang|SI|qty)\s*\{([^{}]*)\}(?:\s*\{([A-Za-z]*)\})?")
_FUNCTION_NAME = re.compile(r"(?:arc)?(?:sin|cos|tan|cot|sec|csc|tg|ctg)h?|ln|log|lg|exp|gcd|lcm|max|min")
_OTHER_COMMANDS = re.compile(r"\\(" + "|".join(map(re.escape, _SAME_COMMAND)) + r")(?![A-Za-z])\s*")
_MODULUS = re.compile(r"\\(?:pmod|bmod|mod|pod)(?![A-Za-z])|(?<![A-Za-z\\])mod(?![A-Za-z])")
_MODULUS_IN_BRACKETS = re.compile(rf"\(\s*{OPEN_TEXT}?\s*\\?mod(?![A-Za-z])\s*{CLOSE_TEXT}?\s*([^()]*?)\s*\)")
_ARGUMENT = r"(?:\{([^{}]*)\}|(\w))"
_SYMBOL_OF_CHOICE = rf"(?:\{{(?={OPEN_TEXT}?\s*\w\s*{CLOSE_TEXT}?\}}))?{OPEN_TEXT}?\s*([CAP])\s*{CLOSE_TEXT}?\}}?\s*"
_CHOSEN = re.compile(  # C_{10}^{3}, A^3_{10}, {}^{10}C_3, 10C3, C(10,3), {10 \choose 3}
    rf"(?<![A-Za-z\\]){_SYMBOL_OF_CHOICE}"
    rf"(?:_\s*{_ARGUMENT}\s*\^\s*{_ARGUMENT}|\^\s*{_ARGUMENT}\s*_\s*{_ARGUMENT})"
    rf"|(?:\{{\s*\}}\s*|(?<![\w}})]))[\^_]\s*{_ARGUMENT}\s*{_SYMBOL_OF_CHOICE}_\s*{_ARGUMENT}"
    r"|(?<![\w.])(\d+)\s*([CP])\s*(\d+)(?!\w)|(?<![A-Za-z\\])C\((\d*[nmkr]|\d+),\s*(\d*[nmkr]|\d+)\)"
    r"|\{([^{}]*)\\choose([^{}]*)\}"
)
_CHOSEN_HINT = re.compile(r"[CAP][\s}\u27e7]*[_^(]|\d\s*[CP]\s*\d|choose")
_ABOUT = re.compile(
    rf"(?<=[\w)}}])\s*,?\s*[({OPEN_TEXT}\s]*(?:or\s+)?(?:\\approx|approximately|approx\.?|about|roughly)\s*{CLOSE_TEXT}?\s*"
    rf"(-?[\d.]+)(?P<unit>(?:{OPEN_TEXT}[^{CLOSE_TEXT}]*{CLOSE_TEXT}|[^\d(){OPEN_TEXT}{CLOSE_TEXT}])*?)[){CLOSE_TEXT}\s]*$"
)
_CONDITION_BEHIND = re.compile(
    r"\\q?quad\s*(?=\(?\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*(?:\\(?:in|[gl]eq?|neq?)(?![A-Za-z])|[<>]))"
)
_QUOTES = "*_`\"'"
_TEMPERATURE = re.compile(
    r"\^?\s*\{?\s*\\(?:circ|degree)\s*\}?\s*" + OPEN_TEXT + r"?\s*([CF])\s*" + CLOSE_TEXT + r"?(?![A-Za-z])"
)
_TEMPERATURES = {"C": f" {OPEN_TEXT}celsius{CLOSE_TEXT}", "F": f" {OPEN_TEXT}fahrenheit{CLOSE_TEXT}"}
_CURRENCY_NAME = re.compile(r"^(?:US|HK|Rs\.?|INR|USD|EUR|GBP)\s*(?=\d)")
_IN_BASE = re.compile(
    r"(?<=[0-9A-Za-z])\s*\(?"
    + OPEN_TEXT
    + r"?\s*\(?\s*(?:in\s+)?base[\s-]*"
    + CLOSE_TEXT
    + r"?\s*(\d+)\s*\)?"
    + CLOSE_TEXT
    + r"?\)?\s*$"
)
_OTHER_THOUSANDS = re.compile(  # 12,34,567; 1.234.567; 12.345,67; 1'234'567
    r"(?P<indian>\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?)|(?P<points>\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|"
    r"\d{1,3}\.\d{3},\d{1,2}(?!\d))|(?P<ticks>\d{1,3}(?:'\d{3})+(?:\.\d+)?)"
)
_OUTWARD = re.compile(r"([\[\](])([^\[\](),;]+[,;][^\[\](),;]+)([\[\])])")
_SPACES = re.compile(r"(?<!\\)\\(?:quad|qquad|enspace|thinspace|hspace\{[^}]*\}|[,:;> ])|~")
_LINES_OF_NUMBERS = re.compile(r"(?<=\d)[ \t]*\n\s*(?=\d|\\[dtc]?frac)")
_DECIMAL_COMMA = re.compile(r"(?<![\d,}])(\d+)\{,\}(\d+)(?!\d|\{,\})")
_THOUSANDS_MARK = re.compile(r"(?<=\d)\s*(?:\{,\}\s*|,\s*\\!\s*|\\!\s*,\s*)(?:\\!\s*)?(?=\d)")
_FRACTIONS = re.compile(r"\\(?:[dtcs]|nice)frac(?![A-Za-z])")
_AND_BOX = re.compile(OPEN_TEXT + r"\s*,?\s*(and|or|and/or)\s*,?\s*" + CLOSE_TEXT)
_AND_WORD = re.compile(r"(?<![A-Za-z\\])(and|or)(?![A-Za-z])|或|和|与|及|且")
_SPACED_DIGITS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d]| *\d)")
_BOX = re.compile(OPEN_TEXT + "([^" + CLOSE_TEXT + "]*)" + CLOSE_TEXT)


def _box(match: re.Match[str]) -> str:
    """\\text{...}: numbers and formulas written as text are unwrapped, words stay marked, lists are split."""
    command, content = match.groups()
    if command.startswith("operatorname") and _FUNCTION_NAME.fullmatch(content.strip()):
        return f"\\{content.strip()} "
    if (number := spelled_out(content.strip())) is not None:
        return f" {number} "
    if not re.search(r"[^\W\d_]", content) or (command in ("mathrm", "mathit", "rm") and len(content.strip()) == 1):
        return f" {content} "
    if counted := _COUNTED.fullmatch(content):
        return f" {counted[1]} {OPEN_TEXT}{counted[2]}{CLOSE_TEXT}"
    choice = re.fullmatch(r"\s*\(?\s*([A-Za-z])\s*\)?[.,]?\s*", content)
    if choice:
        return f"{OPEN_TEXT}{choice.group(1)}{CLOSE_TEXT}"
    if re.fullmatch(r"\s*\w[\w ]*(,\s*\w[\w ]*)+", content):
        return ", ".join(f"{OPEN_TEXT}{part.strip()}{CLOSE_TEXT}" for part in content.split(","))
    return f"{OPEN_TEXT}{content}{CLOSE_TEXT}"


def _of_siunitx(match: re.Match[str]) -> str:
    command, number, unit = match.groups()
    return number + (r"^\circ " if command == "ang" else rf" \text{{{unit}}}" if unit else "")


def _joiner(match: re.Match[str]) -> str:
    return OR_MARK if match.group().strip(OPEN_TEXT + CLOSE_TEXT + " ,") in ("or", "and/or", "或") else AND_MARK


@lru_cache(maxsize=2048)
def _folded(char: str) -> str:
    """One character in ASCII and LaTeX where it is a variant of such: digits of any script, ⅝, 𝜋, 𝟏."""
    kind, _, parts = unicodedata.decomposition(char).partition(" ")
    if unicodedata.category(char) == "Nd":
        return str(unicodedata.digit(char))
    if kind == "<fraction>" and "2044" in parts and unicodedata.numeric(char) != 0:
        over, under = unicodedata.normalize("NFKC", char).split("\u2044")
        return f"\\frac{{{over}}}{{{under}}}" if under else char
    return unicodedata.normalize("NFKC", char).translate(_TRANSLATION) if kind == "<font>" else char


def _in_ascii(text: str) -> str:
    text = _FRACTION_RUN.sub(lambda m: unicodedata.normalize("NFKC", m.group().replace("⁄", "/")), text)
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m.group()) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda m: "_{" + unicodedata.normalize("NFKC", m.group()) + "}", text)
    return "".join(c if c.isascii() else _folded(c) for c in text.translate(_TRANSLATION))


def _unwrapped(text: str) -> str:
    """Without the quotation marks or Markdown emphasis around it."""
    if text[:1] and text[0] in _QUOTES and not re.match(r"_(?:\{|\d+\s*[CP])", text):
        return text.lstrip(_QUOTES + " ").rstrip(_QUOTES + " .")
    return text[:-2] if text.endswith("**") else text


def _plain_thousands(match: re.Match[str]) -> str:
    if match["points"]:
        return match["points"].replace(".", "").replace(",", ".")
    return match.group().replace(",", "").replace("'", "")


def _inward(match: re.Match[str]) -> str:
    """]a,b[ for (a,b)."""
    opening, inside, closing = match.groups()
    return ("(" if opening == "]" else opening) + inside + (")" if closing == "[" else closing)


@lru_cache(maxsize=8192)
def clean(text: str) -> str:
    """One spelling for what is written in many: ASCII characters, \\frac, plain spaces, marks between list items."""
    text = _unwrapped(text.strip())
    if "\n" in text:
        text = _LINES_OF_NUMBERS.sub(", ", text)
    if _UNUSUAL.search(text):
        text = _in_ascii(text)
    if (number := spelled_out(text.strip(" ."))) is not None:
        text = number
    text = _single_spaced(text.replace("\\$", "").replace("$", "").replace("\\%", "%").replace("**", "^"))
    if "\\" in text:
        text = _single_spaced(_without_layout(text))
    elif "{,}" in text:
        text = _without_braced_commas(text)
    if "pprox" in text or "about" in text or "roughly" in text:
        text = _ABOUT.sub(r" \\approx \1\g<unit>", text)
    text = _AND_WORD.sub(_joiner, text) if re.search(r"and|or|[或和与及且]", text) else text
    if " " in text:
        text = _SPACED_DIGITS.sub(lambda m: m.group().replace(" ", ""), text)
        text = _IN_BASE.sub(r"_{\1}", text) if "base" in text else text
    if "[" in text and text[-1] == "[" or text[:1] == "]":
        text = _OUTWARD.sub(_inward, text)
    if "mod" in text:
        text = _MODULUS.sub(r"\\pmod ", _MODULUS_IN_BRACKETS.sub(r"\\pmod{\1}", text))
    if _CHOSEN_HINT.search(text):
        text = _CHOSEN.sub(_chosen, text)
    text = _rewritten_numbers(_CURRENCY_NAME.sub("", text))
    while len(text) > 1 and text[-1] in ".,;:" and not text.endswith("..."):
        text = text[:-1].rstrip()
    return text


def _chosen(match: re.Match[str]) -> str:
    """Combinations as \\binom, arrangements as \\perm; a power of a name (C_1^2) stays."""
    groups = match.groups()
    kind = next((groups[at] for at in (0, 11, 15) if groups[at]), "C")
    pairs = ((1, 3), (7, 5), (9, 12), (14, 16), (17, 18), (19, 20))
    for top, below in pairs:
        n, k = (next((g for g in groups[at : at + (2 if top < 14 else 1)] if g), "") for at in (top, below))
        if n.strip() and k.strip():
            break
    else:
        return match.group()
    plain = n.isdigit() and k.isdigit()
    if (plain and int(k) > int(n)) or (kind != "C" and not plain and groups[0]):
        return match.group()
    return rf"\{'binom' if kind == 'C' else 'perm'}{{{n}}}{{{k}}}"


def _single_spaced(text: str) -> str:
    """Runs of spaces, over which patterns with several optional spaces would cost cubic time, to one."""
    return re.sub(r"\s{2,}", " ", text) if re.search(r"\s\s", text) else text


def _without_layout(text: str) -> str:
    """LaTeX without spacing, sizes, fonts and delimiters; \\text{...} between marks."""
    text = (
        _CONDITION_BEHIND.sub(", ", text.replace("\\lbrace", "\\{")).replace("\\rbrace", "\\}").replace("\\colon", ":")
    )
    text = _SIUNITX.sub(_of_siunitx, _NUMBER_SETS.sub(r" \\mathbb{\1}", text))
    text = _TEXT_BOX.sub(_box, text)
    text = _TEMPERATURE.sub(lambda m: _TEMPERATURES[m[1]], text)
    text = _without_braced_commas(text)
    text = _SPACES.sub(" ", _DROPPED.sub("", _FRACTIONS.sub(r"\\frac", _FONT.sub("", text.replace("\\!", "")))))
    text = text.replace(r"\(", " ").replace(r"\)", " ").replace(r"\[", " ")
    text = re.sub(r"(?<!\\)\\\]", " ", text)
    text = re.sub(r"(?<=R[} ])\s*-\s*(?=\\\{)", r"\\setminus ", text)
    text = _OTHER_COMMANDS.sub(lambda m: _SAME_COMMAND[m[1]], text)
    return re.sub(r"\s*\\+\s*$", "", _AND_BOX.sub(_joiner, text))


def _without_braced_commas(text: str) -> str:
    """1{,}000 is a thousand, 3{,}5 and 0{,}125 are decimals."""
    text = _DECIMAL_COMMA.sub(
        lambda m: m.group().replace("{,}", "" if len(m[2]) == 3 and len(m[1]) < 4 and m[1][0] != "0" else "."), text
    )
    return _THOUSANDS_MARK.sub("", text)


def _rewritten_numbers(text: str) -> str:
    """3x10^8 as a product; log2(8); dots at the end of a decimal as '...': an integer has no more digits to come."""
    text = re.sub(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times ", text.strip())
    text = re.sub(r"(?<![A-Za-z\\])log(2|10)(?=\()", r"\\log_{\1}", text) if "log" in text else text
    text = text.replace("per cent", "percent").replace(":=", "=")
    return re.sub(r"(?<=\.)(\d+)\s*(?:\.{3,}|\\l?dots|…)$", r"\1...", text)


def other_thousands(text: str) -> str | None:
    """The text with Indian, European and Swiss thousands read as such, None where there are none."""
    changed = _OTHER_THOUSANDS.sub(_plain_thousands, text)
    return None if changed == text else changed
