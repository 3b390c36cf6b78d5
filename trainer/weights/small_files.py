"""What a Hugging Face folder holds besides its weights: config.json, generation_config.json and the tokenizer.

Written by one function, in the rehearsal before the first step, the run folder and the export, for every reader:
transformers 4 and 5, vLLM, llama.cpp's converter.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from medtrain.trainer.data.tokenizer import PROBES, opening, read_tokenizer
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.files import write_json

# All that readers look for in a tokenizer folder; _TEMPLATES is a folder, of chat templates by name.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_OLDER_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "tokenizer.model.v3", "tekken.json")
_TEMPLATE_FILES, _TEMPLATES = ("chat_template.jinja", "chat_template.json"), "additional_chat_templates"
# Code that does not come along, and how transformers 5 happened to load it.
_NOT_OF_THE_TOKENIZER = ("auto_map", "is_local", "local_files_only")
# Where an old config.json has these, they are about the model, not about how it generates.
_NOT_GENERATION = {"transformers_version", "use_cache", "output_attentions", "output_hidden_states"}


def write_small_files(
    folder: Path,
    hf_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    source: str | Path | None,
) -> bool:
    """Write config, generation config and tokenizer into ``folder``, which must exist; returns whether transformers'
    AutoTokenizer makes of them the tokens that ``tokenizer`` makes. Of some model types transformers 5 builds a tokenizer of
    its own, whatever class is named and whatever tokenizer.json says.

    ``dtype``: of the weights next to them. ``source``: the checkpoint the run began with, whose other settings are kept.

    Raises InputError: a file of ``source`` that cannot be read.
    """
    write_json(folder / "config.json", _model_config(hf_config, dtype, source))
    write_json(folder / "generation_config.json", generation_config(tokenizer, source))
    return _write_tokenizer(folder, tokenizer)


def rehearse(
    hf_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype, source: str | Path | None
) -> bool:
    """:func:`write_small_files` to a scratch folder, read back; returns the same.

    Raises InputError: it cannot be written or read, or what is read is not what this run trains with.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        read_back = {
            "config.json": lambda: _difference(_comparable(hf_config), _comparable(AutoConfig.from_pretrained(folder))),
            "generation_config.json": lambda: GenerationConfig.from_pretrained(folder) and None,
            "tokenizer_config.json": lambda: _difference(_sample(tokenizer), _sample(read_tokenizer(folder))),
        }
        read_alike = write_small_files(folder, hf_config, tokenizer, dtype=dtype, source=source)
        for name, read in read_back.items():
            try:
                different = read()
            except Exception as error:  # transformers raises many kinds here
                different = f"{type(error).__name__}: {error}".split("\n")[0].replace(f"{folder}/", "")
            if different:
                origin = tokenizer.name_or_path if name == "tokenizer_config.json" else source or tokenizer.name_or_path
                problem = "not the same after writing and reading it as the export does"
                raise bad_input(problem, file=Path(origin) / name, found=different)
    return read_alike


def _comparable(hf_config: PreTrainedConfig) -> dict[str, Any]:
    left_out = ("architectures", "dtype", "transformers_version", "auto_map")
    return {key: value for key, value in hf_config.to_diff_dict().items() if key not in left_out}


def _sample(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer makes of a few texts, and all that it says of itself."""
    texts = [*PROBES, " ".join(tokenizer.all_special_tokens)]
    ids = {f"ids of {text!r}": tokenizer(text)["input_ids"] for text in texts}
    return ids | tokenizer.special_tokens_map | {"chat_template": tokenizer.chat_template, "tokens": len(tokenizer)}


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """The first entry that differs, in words."""
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            return f"{key}: {expected.get(key)!r:.200} became {found.get(key)!r:.200}"
    return None


def _model_config(hf_config: PreTrainedConfig, dtype: torch.dtype, source: str | Path | None) -> dict[str, Any]:
    """config.json: the source's settings, as they were read where they were, and what readers of every age look for.

    transformers 5 reads the rope from ``rope_parameters``; 4 and others from ``rope_theta`` and ``rope_scaling``, and
    would take their defaults where these are missing. Likewise ``dtype`` and ``torch_dtype``.
    """
    config = {} if source is None else _read_json(Path(source) / "config.json")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    read = json.loads(hf_config.to_json_string())
    rope = dict(read["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope["rope_type"]
    name = str(dtype).removeprefix("torch.")
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
    others = {
        "architectures": [architecture.__name__],
        "dtype": name,
        "torch_dtype": name,
        "rope_theta": theta,
        # Where the source has it, without the defaults that transformers 5 adds.
        "rope_scaling": config.get("rope_scaling") or (None if kind == "default" else rope),
    }
    config |= read | others
    config.pop("auto_map", None)  # its code does not come along, and the model is transformers' own
    return config


def generation_config(tokenizer: PreTrainedTokenizerBase, source: str | Path | None) -> dict[str, Any]:
    """generation_config.json: that of ``source`` (or the settings in its config.json), with the end token that is trained.
    InputError for a file that is not a JSON object."""
    # As plain JSON: transformers refuses to save many a published file once it has been changed.
    file = None if source is None else Path(source) / "generation_config.json"
    if file is not None and file.is_file():
        config = _read_json(file)
    else:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        config = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad}
        old = {} if source is None else _read_json(Path(source) / "config.json")
        names = GenerationConfig().to_dict().keys() - _NOT_GENERATION
        config |= {name: value for name, value in old.items() if name in names and value is not None}
    ends = end_tokens(config.get("eos_token_id"), file)
    if tokenizer.eos_token_id not in ends:  # the end this run taught must end generation
        config["eos_token_id"] = [tokenizer.eos_token_id, *ends]
    return config


def end_tokens(value: Any, file: str | Path | None) -> list[int]:
    """The ids of ``eos_token_id`` as a generation config has it: none, one or a list; InputError for anything else."""
    ends = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(end) is int and end >= 0 for end in ends):
        raise bad_input("not token ids", file=file, field="eos_token_id", found=value, expected="a whole number or a list")
    return ends


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """The files it was read from, byte for byte but for what was changed or only transformers 5 understands; of one that was
    made in memory, what transformers writes."""
    source = Path(tokenizer.name_or_path)
    if tokenizer.name_or_path and (source / "tokenizer.json").is_file():
        for name in (*_TOKENIZER_FILES, *_OLDER_FILES, *_TEMPLATE_FILES):
            if (source / name).is_file():
                with user_path(source / name):
                    content = (source / name).read_bytes()
                (folder / name).write_bytes(content)
        if (source / _TEMPLATES).is_dir():
            shutil.copytree(source / _TEMPLATES, folder / _TEMPLATES, copy_function=shutil.copyfile)
    else:
        tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    others = folder / "special_tokens_map.json"
    contents = {file: _read_json(file) for file in (settings, others) if file.is_file()} or {settings: {}}
    for file, before in contents.items():
        after = {key: value for key, value in before.items() if key not in _NOT_OF_THE_TOKENIZER}
        if isinstance(after.get("extra_special_tokens"), list):  # 4 knows a dict of that name alone
            after["additional_special_tokens"] = after.pop("extra_special_tokens")
        end = after.get("eos_token")  # with or without how it is matched
        end = end["content"] if isinstance(end, dict) else end
        if end != tokenizer.eos_token and (file == settings or "eos_token" in after):
            after["eos_token"] = tokenizer.eos_token
        if after != before:
            write_json(file, after)
    return _name_class(folder, settings, tokenizer)


def _name_class(folder: Path, settings: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Name a class by which AutoTokenizer makes the tokens that are trained on: the one that stands there, or that of a plain
    tokenizer.json, by the name that transformers 4 and 5 know. Returns whether there is one."""
    content = _read_json(settings)
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # of a fast tokenizer
    for name in (content.get("tokenizer_class"), "PreTrainedTokenizerFast"):
        if name == "TokenizersBackend":
            continue
        if name != content.get("tokenizer_class"):
            write_json(settings, content | {"tokenizer_class": name})
            if opening(read_tokenizer(folder)) != opening(tokenizer):  # BOS was put by the class that stood there
                backend.save(str(folder / "tokenizer.json"))
        try:
            auto = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception:  # it raises many kinds
            continue
        if all(auto(text).input_ids == tokenizer(text).input_ids for text in PROBES):
            return True
    return False


def _read_json(file: Path) -> dict[str, Any]:
    with user_path(file):
        stored = file.read_bytes()
    try:
        content = json.loads(stored)
    except ValueError as error:
        raise bad_input("no JSON", file=file, found=str(error)) from None
    if not isinstance(content, dict):
        raise bad_input("no JSON object", file=file, found=type(content).__name__)
    return content
