"""Reading a tokenizer folder as it is, whatever kind of model lies beside it."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medtrain.trainer.errors import bad_input, user_path

# What tokenizer_config.json says of a tokenizer that is its tokenizer.json and nothing more.
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


def read_tokenizer(folder: str | Path, *, field: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of ``folder``, without network and without remote code.

    ``AutoTokenizer`` of transformers 5 goes by the model type in a ``config.json`` beside it: it makes a Qwen2Tokenizer,
    with tokens of its own added, of any tokenizer in the folder of a Qwen2 model. A plain one is read as it stands.

    Raises:
        InputError: no such folder, nothing usable in it. ``field`` names the setting in the message.
    """
    folder = Path(folder)
    with user_path(folder, field=field):
        there = folder.is_dir()
    if not there:
        raise bad_input("no such folder", field=field, found=str(folder), expected="a folder with tokenizer.json")
    try:
        settings = folder / "tokenizer_config.json"
        named = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") if settings.is_file() else None
        plain = named in _PLAIN and (folder / "tokenizer.json").is_file()
        reader = PreTrainedTokenizerFast if plain else AutoTokenizer
        return reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here, all of them mean the same to the user
        raise bad_input("no usable tokenizer here", file=folder, found=str(error).split("\n")[0]) from None
