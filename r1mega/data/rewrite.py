"""From a correct response to a readable one: tags repaired, rules applied, reasoning + summary in one form."""

from __future__ import annotations

import re
from collections.abc import Mapping

from r1mega.config.stages.cold_start import RewriteConfig
from r1mega.data.template import render_text

_TAGS = re.compile(r"<(/?)\s*(think|answer)\s*>", re.IGNORECASE)


def split_response(text: str, *, repair: bool) -> tuple[str, str] | None:
    """(reasoning, summary): what stands between the think tags, and in the answer tag; None when that cannot be told.

    repair: a single missing tag is put back (<think> at the beginning, </answer> at the end, </think> before <answer> and
    the other way round), tags in another spelling count. Text outside of the tags is dropped.
    """
    if repair:
        text = _TAGS.sub(lambda m: f"<{m[1]}{m[2].lower()}>", text)
        if "<think>" not in text:
            text = "<think>" + text
        if "</think>" not in text and "<answer>" in text:
            text = text.replace("<answer>", "</think><answer>", 1)
        if "<answer>" not in text and "</think>" in text:
            text = text.replace("</think>", "</think><answer>", 1)
        if "</answer>" not in text:
            text += "</answer>"
    match = re.fullmatch(r".*?<think>(.*?)</think>.*?<answer>(.*?)</answer>.*", text, re.DOTALL)
    if match is None or len(_TAGS.findall(text)) != 4 or not match[1].strip() or not match[2].strip():
        return None
    return match[1].strip(), match[2].strip()


def apply_rules(text: str, config: RewriteConfig, language: str | None) -> str:
    """All rules of `config` that hold for the language, in order."""
    for rule in config.rules:
        if rule.language in (None, language):
            text = re.sub(rule.pattern, rule.replace, text)
    return text


def rewrite(text: str, config: RewriteConfig, language: str | None) -> str | None:
    """The response in `config.form`, after tag repair and rules; None when its parts cannot be told."""
    parts = split_response(text, repair=config.repair_tags)
    if parts is None:
        return None
    reasoning, summary = (apply_rules(part, config, language).strip() for part in parts)
    return in_form(config.form, {"reasoning": reasoning, "summary": summary})


def in_form(form: str, parts: Mapping[str, str]) -> str:
    """The form's text with {{ reasoning }} and {{ summary }}. ConfigError for a form that wants anything else."""
    return render_text(form, parts, key="rewrite.form")
