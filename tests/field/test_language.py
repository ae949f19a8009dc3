"""The language reward: attacks that must not pay, and honest texts that must not suffer.

L3 was modelled on pemistahl/lingua-py#219; L1 and L2 (what hides in markup, look-alike letters) were found by trying.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from r1mega.data.language import language_of, language_share
from r1mega.errors import RewardError
from r1mega.reward.language import LanguageConsistency
from tests.field import language_attacks
from tests.field.language_attacks import ATTACKS, OTHERS, shares, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "rewards.md"
LEAKS = {"English all in Cyrillic": 0.34}  # English that Cyrillic letters alone can spell
"""Attack -> what it may still gain; any other 0.06."""
OF_FEW_WORDS = {
    **LEAKS,
    **dict.fromkeys(("commands", "each word in maths", "each word in maths, and a character", "indices"), 0.11),
}
"""The same for texts of 20 hidden words."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_english_in_any_dress_is_not_paid_as_chinese(attack):
    right, scored = shares(attack)
    assert 0.3 < right < 0.7 and scored <= right + LEAKS.get(attack, 0.06)


@pytest.mark.parametrize("attack", ATTACKS)
def test_twenty_hidden_words_are_not_paid_as_terms(attack, monkeypatch):
    for name, size in (("ENGLISH", 1), ("WORDS", 20), ("SMALL", 20), ("PAIRS", 10)):
        monkeypatch.setattr(language_attacks, name, getattr(language_attacks, name)[:size])
    right, scored = shares(attack)
    assert 0.6 < right < 0.75 and scored <= right + OF_FEW_WORDS.get(attack, 0.06)


@pytest.mark.parametrize("attack", OTHERS)
def test_languages_of_one_script_are_told_apart(attack):
    text, target, right = OTHERS[attack]
    assert language_share(text, target) == pytest.approx(right, abs=LEAKS.get(attack, 0.06))


def test_the_document_shows_these_attacks():
    assert table() in DOCUMENT.read_text()


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("$First we add the two numbers and then divide the sum by three$ 好的", "zh"),
        ("`First we add the two numbers and then divide the sum by three` 好的", "zh"),
        ("\\text{First we add the two numbers and then divide the sum by three} 好的", "zh"),
        ("<First we add the two numbers and then divide the sum by three> 好的", "zh"),
        ("https://first.example/we/add/the/two/numbers/and/then/divide/the/sum 好的", "zh"),
        ("```\nFirst we add the two numbers\nand then divide the sum by three\n``` 好的", "zh"),
        ("F i r s t w e a d d t h e t w o n u m b e r s 好的", "zh"),
        ("F.i.r.s.t w.e a.d.d t.h.e n.u.m.b.e.r.s 好的", "zh"),
        ("ғɪʀsᴛ ᴡᴇ ᴀᴅᴅ ᴛʜᴇ ɴᴜᴍʙᴇʀs 好的", "zh"),
        ("\\footnote{First we add the two numbers} 好的", "zh"),
        ("\\(Сначала сложим два числа и затем разделим сумму на три\\) okay", "en"),
    ],
)
def test_little_besides_hidden_prose_scores_little(text, target):
    assert language_share(text, target) < 0.34


HONEST = [
    ("设变量 `total` 为总数，`price` 为价格，那么我们可以得到总价等于两者的乘积，也就是十二元。", "zh"),
    (
        "我们写一个程序来验证：\n```python\ndef solve(first, second):\n    total = 0\n    for apple in basket:\n"
        "        if apple.weight > 3 and not apple.bad:\n            total += price * apple.weight\n"
        "    return max(total, first)\nprint(solve(1, 2))\n```\n运行以后得到的结果是十二。",
        "zh",
    ),
    ("设 $f(x) = \\sin x + \\cos x$，其中 $\\triangle ABC$ 的面积为 $\\frac{1}{2}ab\\sin C$，且 $xy + yz + zx = abc$。", "zh"),
    ("由题意可知 $\\text{面积} = \\text{长} \\times \\text{宽}$，所以 $S = 12$。", "zh"),
    ("导数 $f'(x) = \\lim_{h \\to 0} \\frac{f(x+h)-f(x)}{h}$ 存在，因此 $\\operatorname{lcm}(a,b) \\ge \\max\\{a, b\\}$ 成立。", "zh"),
    ("ｘ＝３のとき、答えは１２になります。", "ja"),
    ("関数 $f(x)$ の最大値を求める。まず微分して、導関数が零になる点を調べる。", "ja"),
    ("ロミオは三個のリンゴを持っています。東京大学理学部数学科卒業生は三名です。", "ja"),
    ("Ｆｉｒｓｔ ｗｅ ａｄｄ ｔｈｅ ｎｕｍｂｅｒｓ ａｎｄ ｄｉｖｉｄｅ ｂｙ ｔｈｒｅｅ", "en"),
    ("F i r s t  w e  a d d  t h e  n u m b e r s", "en"),
    ("Ⓕⓘⓡⓢⓣ ⓦⓔ ⓐⓓⓓ 𝐭𝐡𝐞 𝐧𝐮𝐦𝐛𝐞𝐫𝐬", "en"),
    ("α + β = 90°, so the third angle is a right angle, and γ = 90° as well.", "en"),
    ("Let x be odd and let k be even; the run_time is O(n log n), see `sort_list`.", "en"),
    ("Wait, let me re-check: 12+3=15. OK. So the answer is 15.", "en"),
    ("Then Maria Fernandez gives José García Lorca 3 apples.", "en"),
    ("So Jean-Pierre Lefèvre and Wolfgang Amadeus Müller divide it.", "en"),
    ("Ensuite William Smith achète trois pommes à Birmingham.", "fr"),
    ("Premièrement, on pose x. Donc, x = 3. Oui. Alors la réponse est douze.", "fr"),
    ("Jetzt rechnet Giovanni Bianchi die Summe der Zahlen aus. Gut. Also gut. Nein, warte.", "de"),
    ("Después John Williams compra tres manzanas en Liverpool.", "es"),
    ("Сначала посчитаем яблоки в корзине.", "ru"),
    ("Спочатку порахуємо яблука в кошику. Потім поділимо їх на трьох дітей.", "uk"),
    ("Първо броим ябълките в кошницата. След това ги разделяме.", "bg"),
    ("أولا نحسب عدد التفاحات في السلة ثم نقسمها على ثلاثة أطفال", "ar"),
    ("ابتدا تعداد سیب ها را می شماریم و سپس آن را تقسیم می کنیم", "fa"),
    ("在三角形ABC中，AB = AC，点D在BC上，且AD垂直于BC。连接DE，则DE平行于AB。", "zh"),
    ("因为 ABC 是等边三角形，所以 ABC 的三个角都是六十度，ABD 是直角三角形。", "zh"),
    ("在Rt△ABC中，∠C=90°，四边形ABCD的对角线AC、BD交于点O，圆O的半径为R。", "zh"),
    ("由余弦定理，AC²=AB²+BC²-2AB·BC·cosB，所以sinA=0.6，log2取3，余数是5 (mod 7)。", "zh"),
    ("設集合A={1,2,3}，則A∩B={2,3}，max(a,b)=5。", "zh"),
    ("설명: sin A = 0.6이면 cos B는 0.6이다. 그리고 log(x)는 증가한다.", "ko"),
    ("设x为苹果数，y为梨数，则2x+3y=12，小明跑了5km，用时30min。", "zh"),
    ("삼각형 ABC에서 x를 구하자. x는 3이고 AB의 길이는 y이다.", "ko"),
    ("xをaとおくと、三角形ABCのABの長さは3になります。", "ja"),
    ("В треугольнике ABC сторона AB равна 5, а BC равна 4.", "ru"),
    ("في المثلث ABC طول الضلع AB يساوي 5", "ar"),
    ("먼저 바구니에 있는 사과의 수를 세어 봅시다.", "ko"),
    ("首先我们数一数篮子里的苹果。", "zh-Hans"),
    ("首先我們數一數籃子裡的蘋果。", "zh-Hant"),
]  # fmt: skip


def test_sentences_in_capitals_and_in_single_letters_are_no_points():
    assert language_share("首先WE我们ADD数THE一数TWO篮子NUM里的AND苹果", "zh") == pytest.approx(13 / 19)
    assert language_share("FIRST WE ADD THE NUMBERS 首先我们数一数", "zh") == pytest.approx(7 / 12)
    spelt = "wedividethesumofallnumbersbyeight"
    text = (
        "".join(
            map("".join, zip("首先我们数一数篮子里的苹果然后我们把这个数乘以每个苹果的价格最后得", spelt, strict=False))
        )
        + "到"
    )
    assert 0.8 < language_share(text, "zh") < 0.9


@pytest.mark.parametrize(("text", "target"), HONEST)
def test_honest_texts_with_names_maths_and_code_keep_their_reward(text, target):
    assert language_share(text, target) == pytest.approx(1.0, abs=0.01)
    assert language_of(text) == target.partition("-")[0]


CODE = {
    "imports": "import math\nimport sys\nfrom collections import defaultdict, Counter",
    "a loop": "while queue and node not in visited:\n    node = queue.pop()\n    if node is target or node in seen:\n        return node",
    "SQL": "SELECT name, price FROM fruit WHERE price > 3 GROUP BY name ORDER BY price;",
    "a shell": "pip install numpy\ncd project\npython main.py --input data.txt --output result.txt",
    "a program": "import sys\nfrom collections import defaultdict\n\ndef count_apples(basket, children):\n    result = defaultdict(int)\n"
    "    for child in children:\n        result[child] += basket.pop()\n    return sorted(result.items())\n\n"
    "if __name__ == '__main__':\n    print(count_apples([1, 2, 3], ['a', 'b', 'c']))",
    "Java": "public class Main {\n    public static void main(String[] args) {\n        Scanner input = new Scanner(System.in);\n"
    "        System.out.println(input.nextInt() * price);\n    }\n}",
}  # fmt: skip


@pytest.mark.parametrize("code", CODE)
def test_a_program_costs_the_text_beside_it_little(code):
    chinese = f"我们写一个程序来验证这个结果是否正确：\n```\n{CODE[code]}\n```\n运行以后得到的结果是十二，和我们前面计算的完全一样。"
    french = f"On écrit le code suivant :\n```\n{CODE[code]}\n```\nLe résultat est donc douze pommes, et c'est la bonne réponse."
    assert language_share(chinese, "zh") > 0.9 and language_share(french, "fr") > 0.9


@pytest.mark.parametrize(
    "text",
    [
        "代码如下：`for i in range(n): total += price[i]`，`import numpy as np`，`print(total)`，`while not done`，`if x in seen`，"
        "`return sorted(items)`。结果是十二，和前面一样。",
        "请联系 john.smith@example.com 或者访问 https://www.example.com/path/to/the/page/index.html 了解更多的信息。",
        "$\\text{Total} = \\text{price} \\times \\text{count}$，所以总价等于十二元。",
    ],
)
def test_snippets_addresses_and_named_quantities_cost_little(text):
    assert language_share(text, "zh") > 0.9


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("这首歌的名字叫 ロミオとシンデレラ，我们算一下它有多少个字。", 0.7),
        ("东京的スカイツリー有六百三十四米高，我们把它换成厘米。", 0.76),
        ("他说さようなら，然后就带着三个苹果走了。", 0.72),
        ("我们先看《となりのトトロ》这部电影有多长，然后再算它有多少秒。", 0.75),
        ("小明买了三盒优の良品，每盒十元，一共花了三十元。", 0.95),
        ("小さくら今年八岁，妹妹比她小三岁，所以妹妹五岁。", 0.86),
        ("ドラえもん有四个口袋，每个口袋里有三个铜锣烧，总共十二个。", 0.81),
        ("假名あ、い、う、え、お共有五个。", 0.55),
        ("答案是カレー三份。", 0.63),
    ],
)
def test_a_japanese_name_costs_a_chinese_sentence_its_own_letters(text, share):
    assert language_share(text, "zh") == pytest.approx(share, abs=0.06)
    assert language_share(text, "ja") == pytest.approx(1 - share, abs=0.06)
    assert language_of(text) == "zh"


def test_a_chinese_name_in_a_japanese_sentence_leaves_it_japanese():
    assert language_share("彼は『红楼梦』と『西游记』を読みました。", "ja") == 1.0


def test_simplified_and_traditional_are_told_by_the_clause():
    text = "首先我们数一数篮子里的苹果，首先我們數一數籃子裡的蘋果"
    assert language_share(text, "zh-Hans") == language_share(text, "zh-Hant") == 0.5


def test_a_target_that_is_not_known_is_told_at_once():
    with pytest.raises(RewardError, match="'xx' is not supported"):
        LanguageConsistency("xx")
