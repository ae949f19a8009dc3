"""Prompt templates: a question -> the text that the model continues."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from r1mega.errors import ConfigError

TEMPLATES = {
    # DeepSeek-R1, table 1: a plain conversation; the form, no hints on content
    "r1_zero": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
        "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
        "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
        "<think> reasoning process here </think> <answer> answer here </answer>. User: {{ question }}. Assistant:"
    ),
    "nano": "User: {{ question }} Assistant:",
}
"""By name. Anything else in data.template is taken as a Jinja2 text of its own."""


@cache
def _compiled(template: str, key: str):
    import jinja2

    if template not in TEMPLATES and "{{" not in template:
        raise ConfigError(
            f"{key}: {template!r} is neither a name ({', '.join(TEMPLATES)}) nor a Jinja2 text with {{{{ ... }}}}"
        )
    try:
        return jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
            TEMPLATES.get(template, template)
        )
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{key}: line {error.lineno}: {error.message}") from error


def render_text(template: str, values: Mapping[str, str], *, key: str) -> str:
    """A template's text with these values. ConfigError, naming the config key, for one that cannot be read or wants more."""
    import jinja2

    try:
        return _compiled(template, key).render(**values)
    except jinja2.UndefinedError as error:
        raise ConfigError(f"{key}: {error}; only {', '.join(map(repr, values))} can stand there") from error


def render(template: str, question: str) -> str:
    """The prompt text of a question. ConfigError for a template that cannot be read or wants more than `question`."""
    return render_text(template, {"question": question}, key="data.template")
