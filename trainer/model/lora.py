"""LoRA: PEFT's adapter layers in the policy, the only weights that are trained (medtrain.trainer.weights.adapters: their files).

The frozen base is kept in the compute precision, or in NF4, with no float32 master: nothing updates it. The adapters are
float32 masters like any trained weight, and FSDP gathers them in the compute precision with the layer they belong to: it
requires one dtype of the trained parameters of a unit only, so they need no unit of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch.nn as nn
from safetensors import SafetensorError, safe_open

from medtrain.trainer.config.settings import LoraConfig
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.model.names import is_adapter, layer_kind, linear_shapes
from medtrain.trainer.model.nf4 import BLOCK, NF4Linear

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ADAPTER = "default"  # PEFT's name for a model's first adapter

# Settings of adapter_config.json that make an adapter more than plain LoRA.
_OTHER_FORMULAS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layer_replication")
_OTHER_WEIGHTS = ("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
_CHANGES_THE_BASE = ("pissa", "corda", "olora", "lora_ga")  # initialisations that subtract the adapters from the base


@dataclass(frozen=True)
class Adapters:
    """What is trained, checked against the model: ``targets`` are the last names of linear layers, in every decoder layer."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    path: Path | None  # the PEFT folder to start from
    base: str  # dense | nf4
    num_parameters: int

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def describe(self, num_base: int) -> str:
        """One line for the user; ``num_base`` counts the base model's parameters."""
        start = f", starting from {self.path}" if self.path else ""
        share = self.num_parameters / (num_base + self.num_parameters)
        return (
            f"LoRA rank {self.rank}, alpha {self.alpha:g} on {', '.join(self.targets)}{start}; base {self.base}; "
            f"{self.num_parameters:,} parameters trained, {share:.2%} of all"
        )

    def about(self) -> dict[str, Any]:
        """What the manifest says of them, and ``medtrain export`` builds them again from."""
        return {"rank": self.rank, "alpha": self.alpha, "target_modules": list(self.targets), "base": self.base}

    def peft_config(self, base: str | None) -> PeftLoraConfig:
        """``base``: path or name of the base model, as adapter_config.json will name it."""
        from peft import LoraConfig as PeftLoraConfig

        return PeftLoraConfig(
            r=self.rank,
            lora_alpha=cast(int, self.alpha if self.alpha % 1 else int(self.alpha)),  # any number, whatever its type says
            target_modules=list(self.targets),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
        )


def plan_adapters(config: LoraConfig, shapes: dict[str, tuple[int, ...]]) -> Adapters | None:
    """The adapters that ``lora`` asks for on a model of these parameter shapes; None where it is off.

    Raises InputError: target modules that the model does not have, rows that NF4 cannot cut into blocks, an adapter in
    ``lora.path`` that is unreadable, of another kind than plain LoRA, or of another model.
    """
    if not config.on:
        return None
    linears = linear_shapes(shapes)
    kinds = sorted({layer_kind(name) for name in linears})
    if config.base == "nf4":
        for name, (_, columns) in linears.items():
            if columns % BLOCK:
                raise bad_input(
                    "cannot be cut into NF4 blocks",
                    field="lora.base",
                    found=f"{name} with rows of {columns}",
                    expected=f"rows of a multiple of {BLOCK} weights, or lora.base=dense",
                )
    path = Path(config.path) if config.path is not None else None
    if path is not None:
        rank, alpha = _read_config(path / CONFIG_FILE)
        targets = _read_targets(path / WEIGHTS_FILE, rank, linears, kinds)
    else:
        rank, targets = config.rank, tuple(config.target_modules) or tuple(kinds)
        alpha = config.alpha if config.alpha is not None else 2.0 * rank
        for target in targets:
            if target not in kinds:
                problem = "no such linear layer in the decoder layers"
                raise bad_input(problem, field="lora.target_modules", found=target, expected=", ".join(kinds))
        if len(set(targets)) != len(targets):
            raise bad_input("named twice", field="lora.target_modules", found=", ".join(targets))
    num_parameters = sum(rank * sum(shape) for name, shape in linears.items() if layer_kind(name) in targets)
    return Adapters(rank, alpha, targets, path, config.base, num_parameters)


def _read_config(file: Path) -> tuple[int, float]:
    """Rank and alpha of a PEFT folder whose adapter is plain LoRA."""
    with user_path(file, field="lora.path"):
        text = file.read_text(encoding="utf-8") if file.is_file() else None
    if text is None:
        raise bad_input("not a PEFT adapter", field="lora.path", found=str(file.parent), expected=f"{file.name} in it")
    try:
        content: dict[str, Any] = json.loads(text)
        kind, rank, alpha = content["peft_type"], int(content["r"]), float(content["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        expected = "peft_type, r and lora_alpha, as PEFT writes them"
        raise bad_input("unreadable", file=file, found=f"{type(error).__name__}: {error}", expected=expected) from None
    if kind != "LORA":
        raise bad_input("another kind of adapter", file=file, field="peft_type", found=kind, expected="LORA")
    for name in (*_OTHER_FORMULAS, *_OTHER_WEIGHTS):
        if content.get(name) and content[name] != "none":
            raise bad_input("only plain LoRA can be trained on", file=file, field=name, found=content[name])
    initialisation = str(content.get("init_lora_weights")).lower()
    if initialisation.startswith(_CHANGES_THE_BASE):
        raise bad_input("made for a base with changed weights", file=file, field="init_lora_weights", found=initialisation)
    return rank, alpha


def _read_targets(file: Path, rank: int, linears: dict[str, tuple[int, ...]], kinds: list[str]) -> tuple[str, ...]:
    """Those of ``kinds`` that a PEFT file has adapters for, all its tensors checked against the linear layers of the model."""
    try:
        with safe_open(file, framework="pt") as opened:
            found = {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise bad_input("unreadable adapter weights", file=file, found=str(error)) from None
    targets = tuple(kind for kind in kinds if any(f".{kind}.lora_A." in name for name in found))
    expected = {}
    for name, (rows, columns) in linears.items():
        if layer_kind(name) in targets:
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            expected |= {f"{layer}.lora_A.weight": [rank, columns], f"{layer}.lora_B.weight": [rows, rank]}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise bad_input(
                "the adapter does not fit the model",
                file=file,
                field=name,
                found=str(found.get(name, "nothing")),
                expected=str(expected.get(name, "adapters on linear layers of attention and MLP, the same in every layer")),
            )
    return targets


def add_adapters(hf_model: nn.Module, adapters: Adapters) -> None:
    """Put PEFT's layers into a causal LM on meta, freeze all else, and make frozen linear layers NF4 where ``adapters`` say."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(adapters.peft_config(None), hf_model, adapter_name=ADAPTER)
    if adapters.base == "nf4":
        for module in [*hf_model.get_submodule("model.layers").modules()]:
            for name, child in [*module.named_children()]:
                # PEFT's layer is no nn.Linear itself; it holds one as base_layer, and its adapters as lora_A and lora_B.
                if type(child) is nn.Linear and name != ADAPTER:
                    setattr(module, name, NF4Linear(child))
    for name, param in hf_model.named_parameters():
        param.requires_grad_(is_adapter(name))
        if is_adapter(name):
            param.data = param.data.float()


@contextmanager
def without_adapters(policy: nn.Module) -> Iterator[None]:
    """The base model alone, for as long as this lasts; nothing where there are no adapters."""
    layers: list[Any] = [module for module in policy.modules() if hasattr(module, "_disable_adapters")]
    # PEFT's enable_adapters() would also set requires_grad, on whichever parameters FSDP has in place just now.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
