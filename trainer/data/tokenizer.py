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

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

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
    check_ids(tokenizer, folder)
    return tokenizer


def check_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Compare the ids of :data:`PROBES` with those that ``folder``'s tokenizer.json gives by the library that defines the
    format. Raises InputError at the first text whose ids differ."""
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.no_truncation()
    own.no_padding()
    own.add_tokens(list(tokenizer.added_tokens_decoder.values()))
    encodings = own.encode_batch(list(PROBES), add_special_tokens=False)
    for text, ids, encoding in zip(PROBES, tokenize_texts(tokenizer, PROBES), encodings, strict=True):
        if ids != encoding.ids:
            problem = f"not the tokens that transformers makes of {text!r}"
            expected = str(tokenizer.convert_ids_to_tokens(ids))
            raise bad_input(problem, file=folder / "tokenizer.json", found=f"{encoding.tokens}", expected=expected)
