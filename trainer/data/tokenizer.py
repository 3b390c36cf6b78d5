"""A tokenizer as it is read from its folder, and the ids that it makes of texts.

``AutoTokenizer`` of transformers 5 builds a tokenizer anew by the class that tokenizer_config.json or config.json names, which
may not fit tokenizer.json (DeepSeek-R1-Distill-Llama: a byte-level one under ``LlamaTokenizerFast``, which loses every blank).
Models were trained on what transformers 4 made of these files, so that decides here:

- tokenizer.json decides the ids of a text;
- tokenizer_config.json decides which tokens are BOS, EOS and padding, further added tokens, the chat templates;
- whether a text begins with BOS is as tokenizer.json's post-processor has it, but for a ``LlamaTokenizer`` whose
  tokenizer_config.json has ``add_bos_token``, which transformers 4 obeyed (DeepSeek-R1-Distill-Qwen has its BOS from there);
- ``add_prefix_space`` against tokenizer.json is refused: which of the two the model saw cannot be told (Yi-1.5).

A text is either the start of a sequence (a document, a prompt) or goes on from another (a completion, an answer that is
scored). A start has the BOS where the tokenizer puts one before every text; what goes on has no blank that the tokenizer
would put before a text of its own, as SentencePiece's do.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, models

from medtrain.trainer.errors import bad_input, user_path

if TYPE_CHECKING:  # prompts are read where no model is
    from transformers import PreTrainedTokenizerBase

_BYTES_BACK = r'"decoder":\{"type":"ByteLevel",[^}]*\}'
_BYTES_BACK_OF_QWEN2 = '"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true}'
# What tokenizers cut, normalise or join in different ways.
PROBES = (
    "高熱と咳がある患者には、まず胸部Ｘ線を撮る。",
    "ガス壊疽 ｶﾞｽ ㎎ ① Ａｂｃ Ⅳ型 か\u3099",
    "The patient has a fever, isn't well  and takes 1,234.5 mg/dL (2024年 12345678).\n\n\tDon't  stop\r\n",
    " a  b   c ",
    "naïve café cafe\u0301 Größe ĐÊM 한국어 العربية",
    "🙂 👩🏽‍⚕️ → ≥ ½ ﬁ",
)


def read_tokenizer(folder: str | Path, *, field: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of ``folder``, without network and without remote code. ``field`` names the setting in messages.

    Raises InputError: no such folder; no tokenizer.json in it, or none that can be used; ``add_prefix_space`` in
    tokenizer_config.json against it.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    with user_path(folder, field=field):
        there = folder.is_dir()
    if not there:
        raise bad_input("no such folder", field=field, found=str(folder), expected="a folder with tokenizer.json")
    if not (folder / "tokenizer.json").is_file():
        others = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()]
        problem, found = (
            "no usable tokenizer here: no tokenizer.json, which decides the ids",
            ", ".join(others) or "no vocabulary",
        )
        expected = "tokenizer.json, as save_pretrained of a fast tokenizer writes it"
        raise bad_input(problem, file=folder, found=found, expected=expected)
    file = folder / "tokenizer_config.json"
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except Exception as error:  # transformers raises many kinds here, all of them mean the same to the user
        raise bad_input("no usable tokenizer here", file=folder, found=str(error).split("\n")[0]) from None
    bos, blank = settings.get("add_bos_token"), settings.get("add_prefix_space")
    llama = str(settings.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
    if llama and isinstance(bos, bool) and bos != bool(opening(tokenizer)[1]):
        tokenizer.add_bos_token = bos
    if isinstance(blank, bool) and blank != puts_blank(tokenizer):
        problem, expected = "not what tokenizer.json does with the beginning of a text", f"{not blank}, or another tokenizer.json"
        raise bad_input(problem, file=file, field="add_prefix_space", found=blank, expected=expected)
    return tokenizer


def tokenizer_digest(tokenizer) -> str:
    """Return the sha256 (hex) of what decides a fast tokenizer's ids, its eos, and what it puts before every text. Left out are
    padding and truncation, which calls set and reset, and what decides offsets and decoded text."""
    # Before "added_tokens" stand the format's version, truncation and padding. Parsing megabytes to drop them is slow.
    state = tokenizer.backend_tokenizer.to_str()
    before, after = state[state.index('"added_tokens"') :].split('"post_processor":', 1)
    # Offsets and decoding stand here as transformers' Qwen2Tokenizer sets them: older runs and caches have that digest.
    before = before.replace('"trim_offsets":false', '"trim_offsets":true')
    after = re.sub(_BYTES_BACK, _BYTES_BACK_OF_QWEN2, after, count=1)
    bos = opening(tokenizer)[1]
    rest = f"{tokenizer.eos_token_id} {bool(tokenizer.split_special_tokens)} {f'{bos} ' if bos else ''}"
    return hashlib.sha256(f'{rest}{before}"post_processor":{after}'.encode()).hexdigest()


def tokenize_texts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, without special tokens, in one (threaded) call."""
    if not texts:
        return []
    # verbose: a warning above model_max_length, but windows come later
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(list(texts), add_special_tokens=False, **options)["input_ids"]


def opening(tokenizer) -> tuple[str, list[int]]:
    """Return what the tokenizer puts before every text, as text and as ids: its BOS; ``""`` and none where it puts nothing."""
    if not tokenizer.num_special_tokens_to_add():
        return "", []
    whole, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    ids = next(whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return "".join(tokenizer.convert_ids_to_tokens(ids)), ids  # not bos_token, which need not be named


def tokenize_starts(tokenizer, texts: Sequence[str], *, as_written: bool = False) -> list[list[int]]:
    """Return the ids of texts that begin a sequence, each with the :func:`opening` before it, once. ``as_written``: only where
    the text has it, for a chat template writes its own. A text without tokens has no opening either."""
    text, ids = opening(tokenizer)
    if not ids:
        return tokenize_texts(tokenizer, texts)
    rows = tokenize_texts(tokenizer, [one.removeprefix(text) for one in texts])
    opened = [one.startswith(text) or not as_written for one in texts]
    return [[*ids, *row] if row and is_opened else row for row, is_opened in zip(rows, opened, strict=True)]


def continuations(tokenizer) -> Callable[[Sequence[str]], list[list[int]]]:
    """Return a function that makes ids of texts that go on from others: as :func:`tokenize_texts`, without a blank before, so
    that the ids of prompt and completion, one after the other, decode to prompt + completion."""
    parts = _parts(tokenizer.backend_tokenizer)
    bare = _without_blank(parts)
    if bare == parts:
        return functools.partial(tokenize_texts, tokenizer)
    backend = Tokenizer.from_str(json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | bare))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return lambda texts: [encoding.ids for encoding in backend.encode_batch(list(texts), add_special_tokens=False)]


def puts_blank(tokenizer) -> bool:
    """Whether the tokenizer puts a blank before every text."""
    parts = _parts(tokenizer.backend_tokenizer)
    return _without_blank(parts) != parts


def _parts(backend: Tokenizer) -> dict[str, Any]:
    """What a tokenizer does with a text before its model sees it, as tokenizer.json has it."""
    small, parts = Tokenizer(models.BPE()), ("normalizer", "pre_tokenizer")  # a vocabulary is megabytes
    for name in parts:
        if (part := getattr(backend, name)) is not None:
            setattr(small, name, part)
    state = json.loads(small.to_str())
    return {name: state[name] for name in parts}


def _without_blank(part: Any) -> Any:
    if isinstance(part, list):
        return [kept for one in part if (kept := _without_blank(one)) is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: off.get(key, _without_blank(value)) for key, value in part.items()}
