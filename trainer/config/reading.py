"""From YAML and ``KEY=VALUE`` to a typed settings class: every mistake named, with file and field."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from yaml.composer import ComposerError

from medtrain.trainer.config.source import Source
from medtrain.trainer.errors import InputError, bad_input

T = TypeVar("T")


class _UniqueKeys(yaml.SafeLoader):
    """YAML's last key of a name would silently take the place of the ones before it."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:  # as written: nothing is merged yet
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                raise ComposerError(None, None, f"the key {key.value} a second time", key.start_mark)
            seen.add((key.tag, key.value))
        return node


def read_tree(path: str | Path | None, overrides: typing.Sequence[str]) -> dict[str, Any]:
    """The YAML file as plain data, with the overrides applied."""
    tree: Any = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise bad_input("the config cannot be read", file=path, found=_reason(error)) from None
        try:
            tree = yaml.load(text, Loader=_UniqueKeys)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            raise bad_input(
                "not valid YAML", file=path, row=mark.line + 1 if mark else None, found=getattr(error, "problem", None)
            ) from None
        if tree is None:
            tree = {}
        if not isinstance(tree, dict):
            raise bad_input("not a config", file=path, found=type(tree).__name__, expected="a mapping of sections")
    for override in overrides:
        _apply_override(tree, override)
    return tree


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise bad_input("not an override", found=override, expected="KEY=VALUE, as in optim.lr=1e-5")
    try:
        value = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError:
        raise bad_input("the value is not valid YAML", field=key, found=text) from None
    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts[:-1]):
        if isinstance(node, list):
            node = node[_list_index(node, part, key)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise bad_input("not a section", field=".".join(parts[: depth + 1]), found=override)
    if isinstance(node, list):
        node[_list_index(node, parts[-1], key)] = value
    else:
        node[parts[-1]] = value


def _list_index(node: list, part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise bad_input("no such entry in the list", field=key, found=part, expected=f"0 to {len(node) - 1}")
    return int(part)


def build(
    cls: type[T],
    tree: dict[str, Any],
    prefix: str,
    file: str | Path | None,
    given: set[str],
    skip: Collection[str] = (),
    fixed: dict[str, Any] | None = None,
    known_keys: list[str] | None = None,
) -> T:
    """A settings class from plain data; dotted names of what was set are added to ``given``."""
    known_keys = _all_keys(cls) if known_keys is None else known_keys
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.name not in skip}
    values = dict(fixed or {})
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise _unknown_key(name, file, known_keys)
        values[key] = _convert(value, hints[key], name, file, given, known_keys)
    for f in known.values():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in values:
            raise bad_input("missing", file=file, field=f"{prefix}{f.name}")
    return cls(**values)


def _all_keys(cls) -> list[str]:
    """Dotted names of a settings class: its fields, and those of its sections."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        if name in ("stage", "given"):
            continue
        keys.append(name)
        section = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
        if dataclasses.is_dataclass(section):
            keys += [f"{name}.{key}" for key in _all_keys(section)]
    return keys


# What other trainers call it.
_ALSO_CALLED = {
    "learning_rate": "lr",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "max_seq_length": "seq_len",
    "output_dir": "out",
    "max_grad_norm": "grad_clip",
    "save_steps": "every",
    "lr_scheduler_type": "schedule",
    "lora_r": "rank",
    "lora_alpha": "alpha",
}


def _unknown_key(name: str, file, keys: list[str]) -> InputError:
    if name in ("lora.dropout", "lora.lora_dropout"):  # many configurations of others have it
        # Random numbers in the forward would part step 0 from the reference and a resumed run from the first one.
        return bad_input("not supported", file=file, field=name, expected="nothing: adapters are trained without dropout")
    # Two ways to be near: the right setting in the wrong section, or a typing slip.
    by_last = {key.rsplit(".", 1)[-1]: key for key in keys}
    last = name.rsplit(".", 1)[-1]
    last = _ALSO_CALLED.get(last, last)
    near = [by_last[last]] if last in by_last else difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    if not near:
        near = [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    section = re.sub(r"\.\d+(?=\.|$)", "", name).rpartition(".")[0]
    if near and near[0] != section:
        expected = f"the nearest known key, '{near[0]}'"
    else:
        parts = [key.rpartition(".") for key in keys]
        expected = "one of " + ", ".join(key for within, _, key in parts if within == section)
    return bad_input("unknown key", file=file, field=name, expected=expected)


def _convert(value: Any, hint: Any, name: str, file, given: set[str], known_keys: list[str]) -> Any:
    origin = typing.get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if hint is Source and isinstance(value, str):
            value = {"path": value}
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise bad_input("wrong type", file=file, field=name, found=value, expected="a mapping")
        return build(hint, value, f"{name}.", file, given, known_keys=known_keys)
    given.add(name)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return _convert(value, inner[0], name, file, given, known_keys)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise bad_input("not a known choice", file=file, field=name, found=value, expected=" | ".join(allowed))
        return value
    if origin is list:
        if not isinstance(value, list):
            raise bad_input("wrong type", file=file, field=name, found=value, expected="a list")
        return [_convert(v, typing.get_args(hint)[0], f"{name}.{i}", file, given, known_keys) for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise bad_input("wrong type", file=file, field=name, found=value, expected="a mapping")
        for key, one in value.items():
            if isinstance(one, float) and not math.isfinite(one):
                raise bad_input("not a finite number", file=file, field=f"{name}.{key}", found=one)
        return value
    if hint in (float, int) and isinstance(value, str):
        # YAML 1.1 reads 1e-5 (no dot) as a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise bad_input("not a finite number", file=file, field=name, found=value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        expected = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint]
        raise bad_input("wrong type", file=file, field=name, found=value, expected=expected)
    return value
