"""Ways to reason in one language and be paid for another, each with the same sentences: `python -m tests.field.language_attacks`
prints the table of docs/rewards.md.
"""

from __future__ import annotations

from collections.abc import Callable

from r1mega.data.language import language_share

ENGLISH = (
    "First we add the two numbers and then divide the sum by three which leaves four apples in every basket",
    "Now check the total again because every child should get the same number before the last one goes home",
)
CHINESE = ("所以每个篮子里最后都放着四个苹果。", "这样每个孩子得到的数量就都一样了。")
WORDS = [word for sentence in ENGLISH for word in sentence.split()]
PAIRS = list(zip(WORDS[::2], [*WORDS[1::2], "now"], strict=False))
SMALL = [word.lower() for word in WORDS]


def _mapped(first_capital: int, first_small: int) -> str:
    table = {ord("A") + i: first_capital + i for i in range(26)} | {ord("a") + i: first_small + i for i in range(26)}
    return " ".join(WORDS).translate(table)


def _lookalike(source: str, target: str) -> str:
    return " ".join(WORDS).translate(str.maketrans(source, target))


def _each(form: str) -> str:
    return " ".join(form.format(word) for word in WORDS)


def _interleaved(form: str) -> str:
    """Each word in markup, a Chinese character after it."""
    return "".join(
        form.format(word) + character for word, character in zip(WORDS, "的和与或是在有为" * 9, strict=False)
    )


ATTACKS: dict[str, Callable[[], str]] = {
    "dollar signs": lambda: " ".join(f"${sentence}$" for sentence in ENGLISH),
    "displayed maths": lambda: " ".join(f"\\[{sentence}\\]" for sentence in ENGLISH),
    "each word in maths": lambda: _each("${}$"),
    "`\\text{}`": lambda: " ".join(f"$\\text{{{sentence}}} = 4$" for sentence in ENGLISH),
    "`\\text{}` a word": lambda: "$" + " + ".join(f"\\text{{{word}}}" for word in WORDS) + "$",
    "`\\textbf{}` a word": lambda: _each("\\textbf{{{}}}"),
    "`\\mathrm{}` a letter": lambda: " ".join("".join(f"\\mathrm{{{c}}}" for c in word) + "\\ " for word in WORDS),
    "spaces of LaTeX": lambda: "$" + "\\ ".join(WORDS) + "$",
    "LaTeX environment": lambda: "\\begin{quote}" + " ".join(ENGLISH) + "\\end{quote}",
    "words as variables": lambda: "$" + " + ".join(WORDS) + "$",
    "code fence": lambda: "```\n" + "\n".join(ENGLISH) + "\n```",
    "three words a line of code": lambda: (
        "```\n" + "\n".join(" ".join(WORDS[i : i + 3]) for i in range(0, 36, 3)) + "\n```"
    ),
    "words and commas as code": lambda: "```python\n" + ",\n".join(WORDS) + "\n```",
    "comments": lambda: "```python\nx = 1\n# " + "\n# ".join(ENGLISH) + "\n```",
    "strings of code": lambda: "```python\n" + "\n".join(f"print('{sentence}')" for sentence in ENGLISH) + "\n```",
    "a fence never closed": lambda: "```\n" + "\n".join(ENGLISH),
    "inline code": lambda: " ".join(f"`{sentence}`" for sentence in ENGLISH),
    "each word as code": lambda: _each("`{}`"),
    "each word as code, and a character": lambda: _interleaved("`{}`"),
    "each word in maths, and a character": lambda: _interleaved("${}$"),
    "calls as code": lambda: _each("`{}()`"),
    "commands": lambda: _each("\\{}"),
    "names of tags": lambda: _each("<{}>"),
    "assignments": lambda: "```python\n" + "\n".join(f"{a} = {b}" for a, b in PAIRS) + "\n```",
    "calls": lambda: "```python\n" + "\n".join(f"{word}()" for word in WORDS) + "\n```",
    "a list of strings": lambda: f"```python\nx = {WORDS}\n```",
    "statements": lambda: "```c\n" + "; ".join(WORDS) + ";\n```",
    "two words a comment": lambda: "```python\n" + "\n".join(f"# {a} {b}" for a, b in PAIRS) + "\n```",
    "letters in maths": lambda: "".join(f"${letter}$" for letter in "".join(WORDS)),
    "spaced letters in maths": lambda: "$" + " ".join("".join(WORDS)) + "$",
    "letters in brackets": lambda: " ".join(f"({letter})" for letter in "".join(WORDS)),
    "a letter a line": lambda: "\n".join("".join(WORDS)),
    "commas between letters": lambda: ", ".join("".join(WORDS)),
    "digits between letters": lambda: "1".join("".join(WORDS)),
    "an identifier": lambda: "_".join(WORDS),
    "identifiers": lambda: " ".join("_".join(WORDS[i : i + 4]) for i in range(0, len(WORDS), 4)),
    "capitals for spaces": lambda: "".join(word.capitalize() for word in WORDS),
    "no spaces": lambda: "".join(SMALL),
    "hyphens": lambda: "-".join(WORDS),
    "digits at the words": lambda: _each("{}1"),
    "tags": lambda: " ".join(f"<p {sentence}>" for sentence in ENGLISH),
    "attributes": lambda: " ".join(f'<p title="{sentence}">' for sentence in ENGLISH),
    "addresses": lambda: "https://a.b/" + "/".join(WORDS),
    "entities": lambda: "".join(f"&#{ord(c)};" for c in " ".join(WORDS)),
    "an equation's left side": lambda: " ".join(f"f({' '.join(WORDS[i : i + 8])}) =" for i in range(0, len(WORDS), 8)),
    "full width": lambda: _mapped(0xFF21, 0xFF41),
    "mathematical bold": lambda: _mapped(0x1D400, 0x1D41A),
    "mathematical sans serif": lambda: _mapped(0x1D5A0, 0x1D5BA),
    "circled": lambda: _mapped(0x24B6, 0x24D0),
    "negative squared": lambda: _mapped(0x1F170, 0x1F170),
    "flags": lambda: _mapped(0x1F1E6, 0x1F1E6),
    "invisible tags": lambda: "".join(chr(0xE0000 + ord(c)) for c in " ".join(WORDS)),
    "combining strokes": lambda: "".join(c + "\u0336" if c != " " else c for c in " ".join(WORDS)),
    "invisible letters between": lambda: "".join(c + "\u200b" for c in " ".join(WORDS)),
    "letters spaced out": lambda: "  ".join(" ".join(word) for word in WORDS),
    "in parentheses": lambda: _mapped(0x1F110, 0x249C),
    "letters spaced out, words not": lambda: " ".join("".join(WORDS)),
    "letters with points": lambda: " ".join(".".join(word) for word in WORDS),
    "names that are handed over": lambda: f"```python\ntotal = solve({', '.join(WORDS)})\n```",
    "a sum of names": lambda: f"```python\ntotal = {' + '.join(WORDS)}\n```",
    "indices": lambda: _each("$x_{{{}}}$"),
    "capitals, as points are named": lambda: " ".join(WORDS).upper(),
    "capitals in maths": lambda: _each("${}$").upper(),
    "Cyrillic look-alikes": lambda: _lookalike("aceiopsxyj", "асеіорѕхуј"),
    "Greek look-alikes": lambda: _lookalike("aoinutvp", "αοιηυτνρ"),
    "Georgian letters": lambda: _lookalike("abcdefghijklmnopqrstuvwxyz", "აბცდეფგჰიჯკლმნოპქრსტუვწხყზ").lower(),
    "Braille": lambda: _lookalike("abcdefghijklmnopqrstuvwxyz", "⠁⠃⠉⠙⠑⠋⠛⠓⠊⠚⠅⠇⠍⠝⠕⠏⠟⠗⠎⠞⠥⠧⠺⠭⠽⠵").lower(),
}
"""Name -> English reasoning in that dress. With the Chinese sentences beside it, it is to be paid as Chinese."""

OTHERS: dict[str, tuple[str, str, float]] = {
    "French in an English text, maths": ("Then we add both numbers and divide. $d'abord nous comptons toutes les pommes$", "en", 7 / 13),
    "French without full stops": (
        "we count the apples in the basket and then we multiply the number by the price of each one because "
        "ensuite nous multiplions ce nombre par le prix de chacune et nous comptons les pommes dans le panier",
        "en", 0.53,
    ),
    "French, a word a sentence": ("Nous. Comptons. Toutes. Les. Pommes. Dans. Le. Panier. Avec. Nos. Amis.", "en", 0.0),
    "English in Cyrillic look-alikes": ("Fіrѕt wе аdd thе twо numbеrѕ аnd dіvіdе thе ѕum bу thrее", "ru", 0.0),
    "English all in Cyrillic": ("сомраре тһе ѕсоре іѕ а ѕрасе", "ru", 0.0),
    "Ukrainian for Russian": ("Спочатку порахуємо яблука в кошику. Потім поділимо їх на трьох дітей.", "ru", 0.0),
    "Chinese with kana sprinkled": ("我们首先の把数字相加，然后の除以三。最后の得到四个苹果。", "ja", 0.12),
    "Simplified for Traditional": ("首先我们数一数篮子里的苹果。然后我们把这个数乘以价格。", "zh-Hant", 0.0),
    "Traditional for Simplified": ("首先我們數一數籃子裡的蘋果。然後我們把這個數乘以價格。", "zh-Hans", 0.0),
}  # fmt: skip
"""Name -> (text, language paid for, share that is right)."""


def shares(attack: str) -> tuple[float, float]:
    """(what is right, what is scored) for the attack between two Chinese sentences."""
    text = f"{CHINESE[0]} {ATTACKS[attack]()} {CHINESE[1]}"
    honest = sum("\u4e00" <= character <= "\u9fff" for character in text)
    return honest / (honest + len(WORDS)), language_share(text, "zh")


def table() -> str:
    rows = ["| {} | zh | {:.2f} | {:.2f} |".format(name, *shares(name)) for name in ATTACKS]
    rows += [
        f"| {name} | {target} | {right:.2f} | {language_share(text, target):.2f} |"
        for name, (text, target, right) in OTHERS.items()
    ]
    return "\n".join(["| reasoning hidden in | paid for | right | scored |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
