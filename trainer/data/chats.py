"""Preference pairs of chat lists: their text by the tokenizer's chat template, and what this leaves out.

What is learned, and what system, user and tools say, must stand in the text whole but for white space. What else a
template leaves out is noted: the reasoning of earlier turns, as many do by design, and keys that it does not know.
"""

from __future__ import annotations

import os

from medtrain.trainer.data.chat import left_out, squeeze
from medtrain.trainer.data.sources import Row
from medtrain.trainer.errors import InputError, bad_input

HISTORY_SHORTENED = "the chat template leaves out or changes part of earlier assistant turns"
KEY_LEFT_OUT = "the chat template leaves out the messages' '{}'"
_FIELDS = ("prompt", "chosen", "rejected")
_TEXTS = ("content", "reasoning_content", "reasoning", "thinking")


def render_chat(row: Row, tokenizer) -> tuple[list[str], list[InputError], list[str]]:
    """Return the texts of prompt, prompt + chosen and prompt + rejected, what they lack, and what is to be noted.

    Raises InputError for a tokenizer without a chat template, and where the template fails.
    """
    where = {"file": row.file, "row": row.number}
    if not tokenizer.chat_template:
        expected = "strings, or a tokenizer with a chat template"
        raise bad_input("the tokenizer has no chat template", **where, field="prompt", found="a list", expected=expected)
    # Parquet fills keys that other rows have with null.
    chats = {
        name: [{key: value for key, value in message.items() if value is not None} for message in row.fields[name]]
        for name in _FIELDS
    }

    def render(name: str, without: str | None = None) -> str:
        chat = [{key: value for key, value in message.items() if key != without} for message in chats[name]]
        if name == "prompt":
            return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tokenizer.apply_chat_template(chats["prompt"] + chat, tokenize=False)

    try:
        texts = {name: render(name) for name in _FIELDS}
    except Exception as error:  # a template raises what it likes
        raise bad_input(f"the chat template fails: {error}", **where) from error
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
                    lost.append(bad_input(problem, **where, field=f"{name}[{k}].{key}"))
        given = {key for message in chats[name] for key, value in message.items() if value not in ("", [], {})}
        for key in sorted(given - {"role", *_TEXTS}):
            try:
                unused = render(name, without=key) == text
            except Exception:  # it cannot do without
                continue
            if unused and key == "tool_calls" and name != "prompt":
                lost.append(bad_input("the chat template leaves it out", **where, field=f"{name}.{key}"))
            elif unused:
                noted.append(KEY_LEFT_OUT.format(key))
    return list(texts.values()), lost, noted


def why_no_prefix(prompt: str, whole: str) -> str:
    """Say where the text of prompt and completion parts from that of the prompt."""
    same = len(os.path.commonprefix([prompt, whole]))
    rest, other = (text[same : same + 40] for text in (prompt, whole))
    place = "the template's generation prompt ends with" if len(prompt) - same <= 40 else "its text goes on with"
    return (
        f"the prompt is not a prefix of prompt and completion in the chat template: {place} {rest!r}, "
        f"where prompt and completion have {other!r}"
    )
