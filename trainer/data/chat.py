"""Chat templates: rendered preference pairs, what a template leaves out, and dates that are the same at every start.

What is learned, and what system, user and tools say, must stand in the text whole but for white space. What else is left out
is noted: the reasoning of earlier turns, as many templates do by design, and keys that they do not know.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from datetime import datetime
from typing import TYPE_CHECKING

from medtrain.trainer.errors import InputError

if TYPE_CHECKING:
    from medtrain.trainer.data.sources import Row

HISTORY_SHORTENED = "the chat template leaves out or changes part of earlier assistant turns"
KEY_LEFT_OUT = "the chat template leaves out the messages' '{}'"
_FIELDS = ("prompt", "chosen", "rejected")
_DATE = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")
_TEXTS = ("content", "reasoning_content", "reasoning", "thinking")


def now() -> datetime:
    """The time to the second, in the zone of this machine: what a run keeps of its first start."""
    return datetime.now().astimezone().replace(microsecond=0)


def fix_time(tokenizer, time: datetime):
    """A copy of the tokenizer whose chat template has ``time`` for now; itself where its template does not read the clock."""
    templates = getattr(tokenizer, "chat_template", None) or {}
    named = {"": templates} if isinstance(templates, str) else templates
    fixed = {name: _DATE.sub(lambda call: f"{call[1]}{time.strftime(call[2])}{call[1]}", text) for name, text in named.items()}
    if fixed == named:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = fixed[""] if isinstance(templates, str) else fixed
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


def render_chat(row: Row, tokenizer) -> tuple[list[str], list[InputError], list[str]]:
    """Return the texts of prompt, prompt + chosen and prompt + rejected, what they lack, and what is to be noted.

    Raises InputError for a tokenizer without a chat template, and where the template fails.
    """
    if not tokenizer.chat_template:
        expected = "strings, or a tokenizer with a chat template"
        raise row.error("the tokenizer has no chat template", field="prompt", found="a list", expected=expected)
    # Parquet fills keys that other rows have with null.
    chats = {name: [{k: v for k, v in message.items() if v is not None} for message in row.fields[name]] for name in _FIELDS}

    def render(name: str, without: str | None = None) -> str:
        chat = [{key: value for key, value in message.items() if key != without} for message in chats[name]]
        if name == "prompt":
            return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tokenizer.apply_chat_template(chats["prompt"] + chat, tokenize=False)

    try:
        texts = {name: render(name) for name in _FIELDS}
    except Exception as error:  # a template raises what it likes
        raise row.error(f"the chat template fails: {error}") from error
    lost: list[InputError] = []
    noted: list[str] = []
    # Not where the prompt's text ends: a template may open the completion there, with <think>.
    last = squeeze(chats["prompt"][-1]["content"])
    after_prompt = squeeze(texts["prompt"]).rfind(last) + len(last)
    for name, text in texts.items():
        rendered, start = squeeze(text), 0 if name == "prompt" else after_prompt
        for k, message in enumerate(chats[name]):
            for key in _TEXTS:
                missing = left_out(message[key], rendered, start) if isinstance(message.get(key), str) else None
                if missing is not None and name == "prompt" and message["role"] == "assistant":
                    noted.append(HISTORY_SHORTENED)
                elif missing is not None:
                    problem = f"the chat template leaves out or changes part of it, from {missing[:60]!r} on"
                    lost.append(row.error(problem, field=f"{name}[{k}].{key}"))
        given = {key for message in chats[name] for key, value in message.items() if value not in ("", [], {})}
        for key in sorted(given - {"role", *_TEXTS}):
            try:
                unused = render(name, without=key) == text
            except Exception:  # it cannot do without
                unused = False
            if unused and key == "tool_calls" and name != "prompt":
                lost.append(row.error("the chat template leaves it out", field=f"{name}.{key}"))
            elif unused:
                noted.append(KEY_LEFT_OUT.format(key))
    return list(texts.values()), lost, noted
