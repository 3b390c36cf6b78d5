"""Reading a tokenizer folder: its tokenizer.json as it stands, and the proof that the ids in use are that file's.

``AutoTokenizer`` of transformers 5 builds a tokenizer anew by the class that tokenizer_config.json or config.json names, and
keeps of tokenizer.json the vocabulary alone. Published folders name classes that do not fit their file
(DeepSeek-R1-Distill-Llama: a byte-level one under ``LlamaTokenizerFast``, which loses every blank). Models were trained on
what transformers 4 made of these files, so that decides here:

- tokenizer.json decides the ids of a text;
- tokenizer_config.json decides which tokens are BOS, EOS and padding, further added tokens, the chat templates;
- whether a text begins with BOS is as tokenizer.json's post-processor has it, but for a ``LlamaTokenizer`` whose
  tokenizer_config.json has ``add_bos_token``: transformers 4 obeyed that (DeepSeek-R1-Distill-Qwen has its BOS from there
  alone), 5 drops it;
- ``add_prefix_space`` against tokenizer.json is refused: which of the two the model saw cannot be told (Yi-1.5).
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer

from medtrain.trainer.data.encode import opening, puts_blank, tokenize_texts
from medtrain.trainer.errors import bad_input, user_path

if TYPE_CHECKING:  # prompts are read where no model is
    from transformers import PreTrainedTokenizerBase

# What tokenizers cut, normalise or join in different ways.
PROBES = (
    "高熱と咳がある患者には、まず胸部Ｘ線を撮る。",
    "ガス壊疽 ｶﾞｽ ㎎ ① Ａｂｃ Ⅳ型 か\u3099",
    "The patient has a fever, isn't well  and takes 1,234.5 mg/dL (2024年 12345678).\n\n\tDon't  stop\r\n",
    " a  b   c ",
    "naïve café cafe\u0301 Größe ĐÊM 한국어 العربية",
    "🙂 👩🏽‍⚕️ → ≥ ½ ﬁ",
)
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_NUM_TEXTS, _NUM_CHARS = 64, 4096  # of the data, compared at start


def read_tokenizer(folder: str | Path, *, field: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of ``folder``, without network and without remote code. ``field`` names the setting in messages.

    Raises InputError: no such folder; no tokenizer.json in it, or none that can be used; ids that are not its own;
    ``add_prefix_space`` in tokenizer_config.json against it.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    with user_path(folder, field=field):
        there = folder.is_dir()
    if not there:
        raise bad_input("no such folder", field=field, found=str(folder), expected="a folder with tokenizer.json")
    if not (folder / "tokenizer.json").is_file():
        others = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()]
        raise bad_input(
            "no usable tokenizer here: no tokenizer.json, which decides the ids",
            file=folder,
            found=", ".join(others) or "no other vocabulary",
            expected="tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained(...) makes one of "
            "tokenizer.model; compare its ids with those the model was trained on)",
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        said = _settings(folder)
        added = [token.content for token in _own(folder).get_added_tokens_decoder().values()]
    except Exception as error:  # transformers raises many kinds here, all of them mean the same to the user
        raise bad_input("no usable tokenizer here", file=folder, found=str(error).split("\n")[0]) from None
    bos, blank = said.get("add_bos_token"), said.get("add_prefix_space")
    llama = str(said.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
    if llama and isinstance(bos, bool) and bos != bool(opening(tokenizer)[1]):
        tokenizer.add_bos_token = bos
    if isinstance(blank, bool) and blank != puts_blank(tokenizer):
        raise bad_input(
            "not what tokenizer.json does with the beginning of a text",
            file=folder / "tokenizer_config.json",
            field="add_prefix_space",
            found=blank,
            expected=f"{not blank}, or another tokenizer.json",
        )
    check_ids(tokenizer, [*PROBES, *(f"a {content} b" for content in added)])
    return tokenizer


def check_ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, folder: str | Path | None = None) -> None:
    """Compare the ids of ``texts`` with those that tokenizer.json itself gives, by the library that defines the format.

    ``folder`` holds that file, by default the one the tokenizer was read from; a tokenizer made in memory has none. Raises
    InputError at the first text whose ids differ.
    """
    folder = Path(folder or tokenizer.name_or_path or "no folder")
    if not (folder / "tokenizer.json").is_file():
        return
    own = _own(folder)
    own.encode_special_tokens = bool(tokenizer.split_special_tokens)
    texts = list(texts)
    expected = [encoding.ids for encoding in own.encode_batch(texts, add_special_tokens=False)]
    for text, ids, theirs in zip(texts, tokenize_texts(tokenizer, texts), expected, strict=True):
        if ids != theirs:
            at = next((i for i, both in enumerate(zip(ids, theirs, strict=False)) if both[0] != both[1]), None)
            at = min(len(ids), len(theirs)) if at is None else at
            raise bad_input(
                f"not the tokens that transformers makes of {text[:60]!r}, from token {at + 1} on",
                file=folder / "tokenizer.json",
                found=f"{[own.id_to_token(i) for i in theirs[at : at + 4]]} in the file",
                expected=str(tokenizer.convert_ids_to_tokens(ids[at : at + 4])),
            )


def first_texts(texts: Iterable[object]) -> list[str]:
    """Of the data's ``texts``, those that :func:`check_ids` compares at start: a few, each cut short. What is no text is
    passed over: the reader of the row reports it."""
    good = (text[:_NUM_CHARS] for text in texts if isinstance(text, str) and text and not _HALF_PAIR.search(text))
    return list(itertools.islice(good, _NUM_TEXTS))


def _settings(folder: Path) -> dict:
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _own(folder: Path) -> Tokenizer:
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    return _read_own(folder, *(file.stat().st_mtime_ns if file.is_file() else 0 for file in files))


@functools.lru_cache(maxsize=1)
def _read_own(folder: Path, *_changed: int) -> Tokenizer:
    """The tokenizer of tokenizer.json, with the added tokens of tokenizer_config.json, which has the last word on them."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for _, token in sorted(_settings(folder).get("added_tokens_decoder", {}).items(), key=lambda one: int(one[0])):
        add = tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens
        add([AddedToken(**token)])
    return tokenizer
