"""Rewriting: tags repaired where it can be told how, rules by language, one form; what cannot be told is given up."""

import pytest

from r1mega.config.stages.cold_start import RewriteConfig, RewriteRule
from r1mega.data.rewrite import rewrite, split_response
from r1mega.errors import ConfigError
from r1mega.reward.format import check_format

WHOLE = "<think> a b </think> <answer> 5 </answer>"


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<answer>", "</answer>"])
def test_one_missing_tag_is_put_back(tag):
    broken = WHOLE.replace(tag, "")
    assert split_response(broken, repair=True) == ("a b", "5")
    assert split_response(broken, repair=False) is None


@pytest.mark.parametrize(
    "text",
    ["", "5", "<think> a </think>", "<think> a <think> b </think> <answer> 5 </answer>", "<think></think> <answer> 5 </answer>",
     "<answer> 5 </answer> <think> a </think>", WHOLE + " <answer> 6 </answer>"],
)  # fmt: skip
def test_what_cannot_be_told_is_given_up(text):
    assert split_response(text, repair=True) is None


def test_spelling_is_mended_and_text_outside_dropped():
    assert split_response("So: <Think> a </ think> then <ANSWER>5</answer> done", repair=True) == ("a", "5")


def test_rules_by_language_and_form():
    rules = (RewriteRule(pattern="试", replace="try", language="en"), RewriteRule(pattern=r"\s+", replace=" "))
    config = RewriteConfig(rules=rules)
    text = "<think>试   5</think><answer> 5 </answer>"
    assert rewrite(text, config, "en") == "<think>\ntry 5\n</think>\n<answer>5</answer>"
    assert rewrite(text, config, "zh") == "<think>\n试 5\n</think>\n<answer>5</answer>"
    assert check_format(rewrite(text, config, "en")).value == 1.0
    with pytest.raises(ConfigError, match=r"rewrite\.form: 'thought' is undefined; only 'reasoning', 'summary'"):
        rewrite(text, RewriteConfig(form="{{ thought }}"), "en")
