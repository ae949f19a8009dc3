"""Pairs of answers whose label is known by how they were made: equal by algebra, unequal by one change.

No grader is asked. Each family writes a value in two ways and changes one thing in a third.

    python -m tests.field.constructed COUNT SEED > pairs.jsonl      # for tools/bench_rewards.py
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from random import Random

Triple = tuple[str, str, str]
"""A gold, another way to write it, and something else."""


def signed(number: int) -> str:
    return f"+{number}" if number >= 0 else str(number)


def nonzero(rng: Random, most: int) -> int:
    return rng.choice((-1, 1)) * rng.randint(1, most)


def fraction(value: Fraction, rng: Random) -> str:
    """Reduced, with a slash, as a mixed number or a decimal where it has one."""
    top, under = value.numerator, value.denominator
    sign, size = "-" if top < 0 else "", abs(top)
    forms = [f"{sign}\\frac{{{size}}}{{{under}}}", f"{top}/{under}", f"\\dfrac{{{top}}}{{{under}}}"]
    if under == 1:
        forms = [str(top), f"{top}.0"]
    elif size > under:
        forms.append(f"{sign}{size // under}\\frac{{{size % under}}}{{{under}}}")
    if under in (2, 4, 5, 8, 10, 20, 25):
        forms.append(str(float(value)))
    return rng.choice(forms)


def integers(rng: Random) -> Triple:
    number = nonzero(rng, 10 ** rng.randint(1, 9))
    forms = (
        f"{number:,}",
        f"{number}.0",
        f"x={number}",
        f"\\text{{{number}}}",
        f"{number}\\text{{ cm}}",
        f"{number - 1}+1",
    )
    other = rng.choice((number + 1, -number, number * 10, number - 1))
    return str(number), rng.choice(forms), f"{other:,}"


def rationals(rng: Random) -> Triple:
    value = Fraction(nonzero(rng, 60), rng.randint(2, 30))
    changed = rng.choice((value + Fraction(1, value.denominator), -value, value + 1))
    return fraction(value, rng), fraction(value, rng), fraction(changed, rng)


def percentages(rng: Random) -> Triple:
    top, under = rng.randint(1, 19), rng.choice((2, 4, 5, 8))
    value = Fraction(top, under)
    forms = (
        f"{top}/{under}\\%",
        f"\\frac{{{top}}}{{{under}}}\\%",
        f"{float(value / 100):.6f}",
        f"{top}/{under} percent",
    )
    return f"{float(value)}\\%", rng.choice(forms), rng.choice((f"{top}/{under + 1}\\%", f"{top + 1}/{under}\\%"))


def factored(roots: list[int]) -> str:
    return "".join(f"(x{signed(-root)})" if root else "x" for root in roots)


def expanded(roots: list[int], factor: int = 1) -> str:
    coefficients = [factor]
    for root in roots:
        shifted = [*coefficients, 0]
        coefficients = [a - root * b for a, b in zip(shifted, [0, *coefficients], strict=True)]
    degree = len(roots)
    terms = [f"{signed(c)}x^{{{degree - at}}}" for at, c in enumerate(coefficients) if c]
    return "".join(terms).lstrip("+")


def polynomials(rng: Random) -> Triple:
    roots = [rng.randint(-9, 9) for _ in range(rng.randint(2, 4))]
    shuffled, changed = rng.sample(roots, len(roots)), list(roots)
    changed[rng.randrange(len(roots))] += rng.choice((-1, 1))
    return expanded(roots), factored(shuffled), factored(changed)


def partial_fractions(rng: Random) -> Triple:
    a, b, (c, d) = nonzero(rng, 9), nonzero(rng, 9), rng.sample(range(-9, 10), 2)

    def apart(a: int, b: int) -> str:
        return f"\\frac{{{a}}}{{x{signed(-c)}}}+\\frac{{{b}}}{{x{signed(-d)}}}"

    joined = f"\\frac{{{a}(x{signed(-d)})+{b}(x{signed(-c)})}}{{(x{signed(-c)})(x{signed(-d)})}}"
    return apart(a, b), joined.replace("+-", "-"), apart(a, b + 1)


def radicals(rng: Random) -> Triple:
    outside, inside = rng.randint(2, 12), rng.choice((2, 3, 5, 6, 7, 10, 11, 13))
    gold = f"{outside}\\sqrt{{{inside}}}"
    equal = rng.choice((f"\\sqrt{{{outside**2 * inside}}}", f"\\frac{{{outside * inside}}}{{\\sqrt{{{inside}}}}}"))
    return gold, equal, f"\\sqrt{{{outside**2 * inside + rng.choice((-1, 1))}}}"


def nested_radicals(rng: Random) -> Triple:
    a, b = rng.sample((2, 3, 5, 7, 11, 13), 2)
    return (
        f"\\sqrt{{{a}}}+\\sqrt{{{b}}}",
        f"\\sqrt{{{a + b}+2\\sqrt{{{a * b}}}}}",
        f"\\sqrt{{{a + b}+2\\sqrt{{{a * b + 1}}}}}",
    )


def logarithms(rng: Random) -> Triple:
    a, b = rng.randint(2, 30), rng.randint(2, 30)
    return f"\\ln {a * b}", f"\\ln {a}+\\ln {b}", f"\\ln {a}+\\ln {b + 1}"


def trigonometry(rng: Random) -> Triple:
    k, c = rng.randint(1, 9), rng.choice("xt")
    forms = (
        (f"\\sin {2 * k}{c}", f"2\\sin {k}{c}\\cos {k}{c}", f"2\\sin {k}{c}\\cos {k + 1}{c}"),
        (f"\\cos {2 * k}{c}", f"1-2\\sin^2 {k}{c}", f"1-\\sin^2 {k}{c}"),
        (f"\\tan {k}{c}", f"\\frac{{\\sin {k}{c}}}{{\\cos {k}{c}}}", f"\\frac{{\\cos {k}{c}}}{{\\sin {k}{c}}}"),
    )
    return rng.choice(forms)


def complex_numbers(rng: Random) -> Triple:
    a, b, c, d = (nonzero(rng, 9) for _ in range(4))
    real, imaginary = a * c - b * d, a * d + b * c
    product = f"({a}{signed(b)}i)({c}{signed(d)}i)"
    return product, f"{real}{signed(imaginary)}i", f"{real}{signed(imaginary + rng.choice((-1, 1)))}i"


def lists(rng: Random) -> Triple:
    values = rng.sample(range(-30, 31), rng.randint(2, 5))
    joined, shuffled = ", ".join(map(str, values)), rng.sample(values, len(values))
    forms = [", ".join(map(str, shuffled)), "x=" + ", x=".join(map(str, shuffled))]
    forms += [", ".join(f"\\boxed{{{value}}}" for value in shuffled), "\\{" + ", ".join(map(str, shuffled)) + "\\}"]
    changed = rng.choice((values[:-1], [*values, 31], [values[0] + 40, *values[1:]]))
    return joined, rng.choice(forms), ", ".join(map(str, changed))


def points(rng: Random) -> Triple:
    values = [Fraction(nonzero(rng, 20), rng.randint(1, 6)) for _ in range(rng.randint(2, 4))]

    def written(values: list[Fraction]) -> str:
        return "(" + ", ".join(fraction(value, rng) for value in values) + ")"

    turned = values[::-1]
    return written(values), written(values), written(turned if turned != values else [values[0] + 1, *values[1:]])


def intervals(rng: Random) -> Triple:
    low, high = sorted(rng.sample(range(-20, 21), 2))
    opening, closing = rng.choice("(["), rng.choice(")]")
    less, at_most = "\\le" if opening == "[" else "<", "\\le" if closing == "]" else "<"
    name = rng.choice(("x", "f(x)", "y", "m"))
    forms = (f"{low}{less} {name}{at_most} {high}", f"{name}\\in {opening}{low},{high}{closing}")
    other = "(" if opening == "[" else "["
    wrong = rng.choice((f"{other}{low},{high}{closing}", f"{opening}{low},{high + 1}{closing}"))
    return f"{opening}{low},{high}{closing}", rng.choice(forms), wrong


def rings(rng: Random) -> Triple:
    low, high = sorted(rng.sample(range(1, 20), 2))
    gold = f"(-{high},-{low})\\cup({low},{high})"
    return gold, f"{low}<|x|<{high}", rng.choice((f"{low}\\le|x|<{high}", f"{low}<x<{high}", f"{low}<|x|<{high + 1}"))


def systems(rng: Random) -> Triple:
    a, b = rng.sample(range(-20, 21), 2)
    names = rng.choice((("x", "y"), ("a", "b"), ("p", "q"), ("m", "n")))
    gold = f"{names[0]}={a}, {names[1]}={b}"
    forms = (f"({a},{b})", f"{a}, {b}", f"{names[1]}={b}, {names[0]}={a}", f"({names[0]},{names[1]})=({a},{b})")
    return gold, rng.choice(forms), rng.choice((f"({b},{a})", f"{b}, {a}", f"{names[0]}={b}, {names[1]}={a}"))


def groups(rng: Random) -> Triple:
    a, b, c, d = rng.sample(range(-20, 21), 4)
    gold = f"x={a},y={b};x={c},y={d}"
    forms = (f"({c},{d}),({a},{b})", f"x={c},y={d} \\text{{ or }} x={a},y={b}", f"(x,y)=({a},{b}),({c},{d})")
    return gold, rng.choice(forms), rng.choice((f"({a},{d}),({c},{b})", f"x={a},y={d};x={c},y={b}", f"({a},{b})"))


def lines(rng: Random) -> Triple:
    a, b, c, k = nonzero(rng, 9), nonzero(rng, 9), nonzero(rng, 20), nonzero(rng, 5)

    def written(a: int, b: int, c: int) -> str:
        return f"{a}x{signed(b)}y={c}"

    return written(a, b, c), written(k * a, k * b, k * c), written(k * a, k * b, k * c + 1)


def solutions(rng: Random) -> Triple:
    value, k = nonzero(rng, 40), rng.randint(2, 9)
    name = rng.choice("xnkt")
    wrong = rng.choice((f"{k}{name}={k * value}", f"{name}{signed(k)}={value + k}", f"{name}={value + 1}"))
    return f"{name}={value}", rng.choice((str(value), f"{value}={name}", f"{name}={value}.0")), wrong


def general_solutions(rng: Random) -> Triple:
    shift, part = rng.randint(1, 5), rng.randint(2, 7)
    old, new = rng.sample("kmnlt", 2)

    def written(shift: int, letter: str) -> str:
        return f"\\frac{{{shift}\\pi}}{{{part}}}+{letter}\\pi, {letter}\\in\\mathbb{{Z}}"

    return written(shift, old), written(shift, new), written(shift + rng.choice((1, part + 1)), new)


def congruences(rng: Random) -> Triple:
    modulus = rng.randint(3, 40)
    residue = rng.randrange(modulus)
    forms = (
        f"{residue} \\pmod {modulus}",
        f"n\\equiv {residue + modulus} \\pmod{{{modulus}}}",
        f"{residue} mod {modulus}",
    )
    wrong = rng.choice((f"{residue + 1} \\pmod{{{modulus}}}", f"{residue} \\pmod{{{modulus + 1}}}", str(residue)))
    return f"n\\equiv {residue} \\pmod{{{modulus}}}", rng.choice(forms), wrong


def combinations(rng: Random) -> Triple:
    n = rng.randint(5, 20)
    k = rng.randint(2, n - 2)
    forms = (f"C_{{{n}}}^{{{k}}}", f"\\binom{{{n}}}{{{k}}}", f"C_{{{n}}}^{{{n - k}}}", f"{{}}^{{{n}}}C_{{{k}}}")
    wrong = rng.choice((math.comb(n, k) + 1, n**k, math.perm(n, k)))
    return str(math.comb(n, k)), rng.choice(forms), str(wrong)


def arrangements(rng: Random) -> Triple:
    n = rng.randint(4, 12)
    k = rng.randint(2, n - 1)
    return f"A_{{{n}}}^{{{k}}}", str(math.perm(n, k)), str(math.comb(n, k))


def quantities(rng: Random) -> Triple:
    value = Fraction(nonzero(rng, 30), rng.randint(1, 9))
    name = rng.choice(
        ("\\cos\\theta", "|z|", "\\max f", "AB^2", "a+b", "\\frac{AB}{CD}", "f(2)", "S_{10}", "\\tan 2\\alpha")
    )
    return f"{name}={fraction(value, rng)}", fraction(value, rng), fraction(value + 1, rng)


def approximations(rng: Random) -> Triple:
    outside, inside = rng.randint(1, 9), rng.choice((2, 3, 5, 7))
    value = outside * math.sqrt(inside)
    gold = f"{outside}\\sqrt{{{inside}}}"
    wrong = rng.choice(
        (f"{value:.3f}", f"{outside + 1}\\sqrt{{{inside}}}\\approx {value:.3f}", f"{gold}\\approx {value * 1.2:.3f}")
    )
    return gold, f"{gold}\\approx {value:.3f}", wrong


def tiny_values(rng: Random) -> Triple:
    n, power = rng.randint(100, 900), rng.randint(60, 900)
    forms = (
        (f"\\frac{{1}}{{{n}!}}", f"\\frac{{{n + 1}}}{{{n + 1}!}}", f"\\frac{{1}}{{{n + 1}!}}"),
        (f"1-10^{{-{power}}}", f"1-\\frac{{1}}{{10^{{{power}}}}}", "1"),
        (f"2^{{-{power}}}\\sqrt{{3}}", f"\\frac{{\\sqrt{{3}}}}{{2^{{{power}}}}}", f"2^{{-{power + 1}}}\\sqrt{{3}}"),
        (f"e^{{-{power}}}", f"\\frac{{1}}{{e^{{{power}}}}}", f"e^{{-{power + 1}}}"),
    )
    return rng.choice(forms)


def measures(rng: Random) -> Triple:
    value = rng.randint(1, 99)
    big, small, factor = rng.choice(
        (("m", "cm", 100), ("kg", "g", 1000), ("hours", "minutes", 60), ("feet", "inches", 12))
    )
    gold = f"{value}\\text{{ {big}}}"
    return gold, rng.choice((f"{value * factor} {small}", f"{value} {big}")), f"{value} {small}"


def numerals(rng: Random) -> Triple:
    base, digits = rng.randint(3, 9), "".join(rng.choice("12") for _ in range(rng.randint(2, 6)))
    gold = f"{digits}_{{{base}}}"
    wrong = rng.choice((f"{digits}_{{{base + 1}}}", f"{digits}1_{{{base}}}", str(int(digits, base))))
    return gold, rng.choice((f"{digits}_{base}", digits)), wrong


def qualified(rng: Random) -> Triple:
    a, b = rng.randint(2, 9), nonzero(rng, 9)
    body = f"{a}n{signed(b)}"
    behind = rng.choice(
        (
            ", n\\ge 1",
            " \\text{ for all } n\\ge 1",
            ", n\\in\\mathbb{N}^*",
            "\\quad (n\\ge 1)",
            " where n is an integer",
        )
    )
    return body, body + behind, f"{a}n{signed(b + 1)}" + behind


def matrices(rng: Random) -> Triple:
    rows = [[rng.randint(-9, 9) for _ in range(2)] for _ in range(2)]

    def written(rows: list[list[int]], kind: str) -> str:
        inside = " \\\\ ".join(" & ".join(map(str, row)) for row in rows)
        return f"\\begin{{{kind}matrix}} {inside} \\end{{{kind}matrix}}"

    changed = [[rows[0][0] + 1, rows[0][1]], rows[1]]
    return written(rows, "p"), written(rows, rng.choice("pb")), written(changed, "p")


def choices(rng: Random) -> Triple:
    letter, other = rng.sample("ABCDE", 2)
    value = rng.randint(6, 99)
    forms = (letter, f"({letter})", str(value), f"\\text{{({letter})}} {value}")
    return (
        f"\\textbf{{({letter})}}\\ {value}",
        rng.choice(forms),
        rng.choice((other, str(value + 1), f"({other}) {value}")),
    )


FAMILIES: tuple[Callable[[Random], Triple], ...] = (
    integers, rationals, percentages, polynomials, partial_fractions, radicals, nested_radicals, logarithms, trigonometry,
    complex_numbers, lists, points, intervals, rings, systems, groups, lines, solutions, general_solutions, congruences,
    combinations, arrangements, quantities, approximations, tiny_values, measures, numerals, qualified, matrices, choices,
)  # fmt: skip


def labelled_pairs(count: int, seed: int) -> Iterator[dict]:
    """{"family", "gold", "prediction", "label"}, half of them equal."""
    rng = Random(seed)
    for _ in range(count // 2):
        family = rng.choice(FAMILIES)
        gold, equal, unequal = family(rng)
        for answer, label in ((equal, True), (unequal, False)):
            boxed = answer if "\\boxed" in answer else f"\\boxed{{{answer}}}"
            prediction = rng.choice((f"So it is {boxed}.", f"<answer>{boxed}</answer>", f"${boxed}$"))
            if "\\boxed" in answer:
                prediction = boxed
            yield {"family": family.__name__, "gold": gold, "prediction": prediction, "label": label}


def main() -> None:
    """Write pairs as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("seed", type=int)
    arguments = parser.parse_args()
    for labelled in labelled_pairs(arguments.count, arguments.seed):
        print(json.dumps(labelled, ensure_ascii=False))


if __name__ == "__main__":
    main()
