"""LoRA: PEFT's own adapter layers in the policy, the only weights that are trained; read from and written as PEFT folders.

The frozen base lies in the compute precision (or in NF4, medtrain.trainer.model.nf4) with no float32 master: nothing ever
updates it. The adapters are float32 masters like any trained weight, and FSDP gathers them in the compute precision with
the layer they belong to: it asks for one dtype of the trained parameters of a unit only, so no unit of their own is needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from medtrain.trainer.config.settings import LoraConfig
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.files import PARTIAL, file_sha256, replace_folder
from medtrain.trainer.model.nf4 import BLOCK, NF4Linear

if TYPE_CHECKING:  # `medtrain plan` reads of adapters without torch.distributed
    from medtrain.trainer.distributed import World
    from medtrain.trainer.model.policy import PolicyModel

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ADAPTER = "default"  # PEFT's name for a model's first adapter


@dataclass(frozen=True)
class Adapters:
    """What is trained, checked against the model: ``targets`` are the last names of linear layers, in every decoder layer."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    path: Path | None  # the PEFT folder to begin with
    base: str  # dense | nf4
    num_parameters: int

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def describe(self, num_base: int) -> str:
        """One line for a person; ``num_base`` counts the base model's parameters."""
        begin = f", begun with {self.path}" if self.path else ""
        share = self.num_parameters / (num_base + self.num_parameters)
        return (
            f"LoRA rank {self.rank}, alpha {self.alpha:g} on {', '.join(self.targets)}{begin}; base {self.base}; "
            f"{self.num_parameters:,} parameters trained, {share:.2%} of all"
        )

    def about(self) -> dict[str, Any]:
        """What the manifest says of them, and ``medtrain export`` builds them again from."""
        return {"rank": self.rank, "alpha": self.alpha, "target_modules": list(self.targets), "base": self.base}

    def peft_config(self, base: str | None):
        """PEFT's ``LoraConfig``; ``base`` is the path or name of the base model that it will tell."""
        from peft import LoraConfig as PeftLoraConfig

        alpha = int(self.alpha) if self.alpha == int(self.alpha) else self.alpha
        return PeftLoraConfig(
            r=self.rank,
            lora_alpha=alpha,
            target_modules=list(self.targets),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
        )


def plan_adapters(config: LoraConfig, shapes: dict[str, tuple[int, ...]]) -> Adapters | None:
    """The adapters that ``lora`` asks for on a model of these parameter shapes; None where it is off.

    Raises:
        InputError: target modules that the model does not have, rows that NF4 cannot cut into blocks, an adapter in
            ``lora.path`` that is unreadable, of another kind than plain LoRA, or of another model.
    """
    if not config.on:
        return None
    linears = linear_shapes(shapes)
    kinds = sorted({_leaf(name) for name in linears})
    if config.base == "nf4":
        for name, (_, columns) in linears.items():
            if columns % BLOCK:
                raise bad_input(
                    "cannot be cut into NF4 blocks",
                    field="lora.base",
                    found=f"{name} with rows of {columns}",
                    expected=f"rows of a multiple of {BLOCK} weights, or lora.base=dense",
                )
    if config.path is not None:
        rank, alpha, targets = _read_adapter(Path(config.path), linears, kinds)
    else:
        rank, targets = config.rank, tuple(config.target_modules) or tuple(kinds)
        alpha = config.alpha if config.alpha is not None else 2.0 * rank
        for target in targets:
            if target not in kinds:
                raise bad_input(
                    "no such linear layer in the decoder layers",
                    field="lora.target_modules",
                    found=target,
                    expected=", ".join(kinds),
                )
        if len(set(targets)) != len(targets):
            raise bad_input("named twice", field="lora.target_modules", found=", ".join(targets))
    num_parameters = sum(rank * sum(shape) for name, shape in linears.items() if _leaf(name) in targets)
    return Adapters(rank, alpha, targets, Path(config.path) if config.path else None, config.base, num_parameters)


def linear_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of parameter shapes, those of the linear layers of attention and MLP: the matrices within ``model.layers``."""
    return {n: s for n, s in shapes.items() if n.startswith("model.layers.") and n.endswith(".weight") and len(s) == 2}


def _leaf(name: str) -> str:
    return name.split(".")[-2]


def _tensor_names(layer: str) -> tuple[str, str]:
    """The two tensors of ``model.layers.0.mlp.up_proj`` in a PEFT file."""
    return f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"


def _read_adapter(folder: Path, linears: dict[str, tuple[int, ...]], kinds: list[str]) -> tuple[int, float, tuple[str, ...]]:
    """Rank, alpha and target modules of a PEFT folder, its tensors' names and shapes checked."""
    file = folder / CONFIG_FILE
    with user_path(file, field="lora.path"):
        text = file.read_text(encoding="utf-8") if file.is_file() else None
    if text is None:
        raise bad_input("not a PEFT adapter", field="lora.path", found=str(folder), expected=f"{CONFIG_FILE} in it")
    try:
        content: dict[str, Any] = json.loads(text)
        kind, rank, alpha = content["peft_type"], int(content["r"]), float(content["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise bad_input(
            "unreadable",
            file=file,
            found=f"{type(error).__name__}: {error}",
            expected="peft_type, r and lora_alpha, as PEFT writes them",
        ) from None
    if kind != "LORA":
        raise bad_input("another kind of adapter", file=file, field="peft_type", found=kind, expected="LORA")
    for name in (
        "use_rslora",
        "use_dora",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
    ):
        if content.get(name):
            raise bad_input("only plain LoRA can be trained on", file=file, field=name, found=content[name])
    if content.get("bias", "none") != "none":
        raise bad_input("only plain LoRA can be trained on", file=file, field="bias", found=content["bias"])
    begun = str(content.get("init_lora_weights")).lower()
    if begun.startswith(("pissa", "corda", "olora", "lora_ga")):  # these take what the adapters begin with off the base
        raise bad_input("made for a base with changed weights", file=file, field="init_lora_weights", found=begun)
    weights = folder / WEIGHTS_FILE
    try:
        with safe_open(weights, framework="pt") as opened:
            found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise bad_input("unreadable adapter weights", file=weights, found=str(error)) from None
    targets = tuple(kind for kind in kinds if any(f".{kind}.lora_A." in name for name in found))
    expected = {}
    for name, (rows, columns) in linears.items():
        if _leaf(name) in targets:
            a, b = _tensor_names(name.removesuffix(".weight"))
            expected |= {a: (rank, columns), b: (rows, rank)}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise bad_input(
                "the adapter does not fit the model",
                file=weights,
                field=name,
                found=str(list(found[name])) if name in found else "nothing",
                expected=str(list(expected[name]))
                if name in expected
                else "adapters on linear layers of attention and MLP, the same in every layer",
            )
    return rank, alpha, targets


def adapter_digest(adapters: Adapters | None) -> str | None:
    """sha256 of what ``lora.path`` holds: its tensors and alpha; None where adapters begin at zero, or there are none."""
    if adapters is None or adapters.path is None:
        return None
    about = [file_sha256(adapters.path / WEIGHTS_FILE), adapters.rank, adapters.alpha]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def start_digest(weights: str, adapters: Adapters | None, adapter: str | None) -> str:
    """Digest of the policy at its start, where ``weights`` is that of the checkpoint. Adapters that begin at zero change
    nothing, so that it is ``weights`` itself; NF4 and a trained adapter do."""
    if adapters is None or (adapter is None and adapters.base == "dense"):
        return weights
    return hashlib.sha256(json.dumps([weights, adapters.base, adapter]).encode()).hexdigest()


def add_adapters(hf_model: nn.Module, adapters: Adapters) -> None:
    """Put PEFT's layers into a causal LM on meta, freeze all else, and make frozen linear layers NF4 where asked."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(adapters.peft_config(None), hf_model, adapter_name=ADAPTER)
    if adapters.base == "nf4":
        for module in [*hf_model.model.layers.modules()]:
            for name, child in [*module.named_children()]:
                # PEFT's layer is no nn.Linear itself; it holds one as base_layer, and its adapters as lora_A and lora_B.
                if type(child) is nn.Linear and name != ADAPTER:
                    setattr(module, name, NF4Linear(child))
    for name, param in hf_model.named_parameters():
        param.requires_grad_(is_adapter(name))
        if is_adapter(name):
            param.data = param.data.float()


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def is_packed(name: str) -> bool:
    """Whether a parameter's name is that of an NF4 weight."""
    return name.endswith(".packed")


def weight_name(name: str) -> str:
    """A parameter's Hugging Face name, without what activation checkpointing, PEFT and NF4 put in."""
    name = name.replace("_checkpoint_wrapped_module.", "").replace(".base_layer.", ".")
    return name.removesuffix("packed") + "weight" if is_packed(name) else name


@contextmanager
def without_adapters(policy: PolicyModel) -> Iterator[None]:
    """The base model alone, for as long as this lasts; nothing where there are no adapters."""
    from_peft = [module for module in policy.modules() if hasattr(module, "_disable_adapters")]
    # PEFT's enable_adapters() would also set requires_grad, on whichever parameters FSDP has in place just now.
    for module in from_peft:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in from_peft:
            module._disable_adapters = False


@torch.no_grad()
def fill_adapters(policy: PolicyModel, adapters: Adapters, seed: int) -> None:
    """The adapters' first values: those of ``lora.path``, or as PEFT draws them: A uniform within 1 / sqrt(in), B zero.

    Each A has a generator of its own, seeded by (seed, name), and is drawn whole before it is cut: the values do not
    depend on the number of ranks.
    """
    from medtrain.trainer.distributed import local_part

    policy.reshard_all()
    parameters = {weight_name(name): p for name, p in policy.named_parameters() if is_adapter(name)}
    file = safe_open(adapters.path / WEIGHTS_FILE, framework="pt") if adapters.path else None
    for name, param in parameters.items():
        local, part = local_part(param)
        if local.numel() == 0:
            continue
        if file is not None:
            local.copy_(file.get_slice(_peft_name(name))[part])
        elif ".lora_B." in name:
            local.zero_()
        else:
            words = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(words[:8], "little") >> 1)
            bound = 1 / math.sqrt(param.shape[1])
            local.copy_(torch.empty(param.shape).uniform_(-bound, bound, generator=generator)[part])


def _peft_name(name: str) -> str:
    """``model.layers.0.mlp.up_proj.lora_A.default.weight`` as a PEFT file has it."""
    return "base_model.model." + name.replace(f".{ADAPTER}.", ".")


def adapter_pairs(policy: PolicyModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The parameters (A [rank, in], B [out, rank]) of each adapted weight, by the weight's Hugging Face name."""
    parameters = {weight_name(name): p for name, p in policy.named_parameters() if is_adapter(name)}
    ending = f".lora_A.{ADAPTER}.weight"
    return {
        name.removesuffix(ending) + ".weight": (param, parameters[name.replace(".lora_A.", ".lora_B.")])
        for name, param in parameters.items()
        if name.endswith(ending)
    }


def _write_config(adapters: Adapters, folder: Path, base: str | None) -> None:
    config = adapters.peft_config(base)
    config.inference_mode = True  # as PEFT itself saves it: loaded, it is not trained unless asked
    config.save_pretrained(folder)


def rehearse_adapters(adapters: Adapters, base: str | None) -> None:
    """Write the config of :func:`export_adapters` to a scratch folder and read it back.

    Raises:
        InputError: PEFT cannot write or read it, or reads something else.
    """
    from peft import PeftConfig

    with tempfile.TemporaryDirectory() as scratch:
        try:
            _write_config(adapters, Path(scratch), base)
            found = PeftConfig.from_pretrained(scratch)
            read = (found.r, found.lora_alpha, set(found.target_modules), found.base_model_name_or_path)
        except Exception as error:  # of PEFT's, transformers' or huggingface_hub's
            read = f"{type(error).__name__}: {error}".split("\n")[0]
    if read != (expected := (adapters.rank, adapters.alpha, set(adapters.targets), base)):
        raise bad_input(
            "PEFT's config of the adapters is not the same after writing and reading it",
            field="lora",
            found=read,
            expected=str(expected),
        )


@torch.no_grad()
def export_adapters(policy: PolicyModel, adapters: Adapters, out: str | Path, world: World, *, base: str | None) -> Path:
    """Write a PEFT folder of the adapters in float32, whole or not at all; all ranks must call this.

    ``base`` is the base model that PEFT will name. With NF4 the file fits the same base in any precision.
    """
    from medtrain.trainer.distributed import whole

    policy.reshard_all()
    out = Path(out)
    partial = out.with_name(out.name + PARTIAL)
    tensors = {}
    for name, param in policy.named_parameters():
        if is_adapter(name):
            tensor = whole(param)
            if world.is_main:
                tensors[_peft_name(weight_name(name))] = tensor.float().cpu().contiguous()
    if world.is_main:
        _write_config(adapters, partial, base)
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        replace_folder(partial, out)
    world.barrier()
    return out
