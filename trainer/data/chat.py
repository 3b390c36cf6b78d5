"""Chat templates: what a template leaves out of a conversation, and text that is the same at every start.

A template is a program: it may drop the reasoning of an assistant's turn or the system message, and write the date.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from datetime import datetime

_DATE = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")
# What would still change from start to start: a date in another form, jinja's random filter and its random text.
_CHANGING = re.compile(r"\bstrftime_now\b(?!\s+is\b)|\|\s*random\b|\blipsum\b")
_REFUSAL = "{{ raise_exception('it is random, or writes the time in a form that cannot be fixed') }}"


def now() -> datetime:
    """The time to the second, in the zone of this machine: what a run keeps of its first start."""
    return datetime.now().astimezone().replace(microsecond=0)


def fix_time(tokenizer, time: datetime):
    """The tokenizer with a chat template that has ``time`` for now, whenever it is rendered; itself where its template
    does not look at the clock. The tokenizer given, which may be exported, keeps its template.

    A template that would change for other reasons fails when it is rendered.
    """
    templates = getattr(tokenizer, "chat_template", None) or {}
    one = isinstance(templates, str)
    named = {"": templates} if one else templates
    fixed = {name: _DATE.sub(lambda call: f"{call[1]}{time.strftime(call[2])}{call[1]}", text) for name, text in named.items()}
    fixed = {name: _REFUSAL if _CHANGING.search(text) else text for name, text in fixed.items()}
    if fixed == named:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = fixed[""] if one else fixed
    return tokenizer


def squeeze(text: str) -> str:
    """The text without white space, which templates trim and add."""
    return "".join(text.split())


def left_out(text: str, rendered: str, start: int = 0) -> str | None:
    """What of ``text``, from its first such word on, does not stand in ``rendered[start:]`` (squeezed); None: all does."""
    words = text.split()
    if rendered.find("".join(words), start) >= 0:
        return None
    first = bisect_left(range(len(words)), True, key=lambda n: rendered.find("".join(words[: n + 1]), start) < 0)
    return " ".join(words[first:])
