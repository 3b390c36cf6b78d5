"""``medtrain export``: a run's checkpoint as a Hugging Face folder, or a LoRA run's adapters as a PEFT folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from medtrain.trainer.config.settings import Config, config_from_dict
from medtrain.trainer.distributed import World, join_world
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.files import check_can_make, complete_checkpoints
from medtrain.trainer.libraries import quiet_libraries
from medtrain.trainer.model.hf_config import load_model_config, load_tokenizer, parameter_shapes
from medtrain.trainer.model.lora import plan_adapters
from medtrain.trainer.model.policy import PolicyModel, build_model
from medtrain.trainer.run.folder import RunFolder
from medtrain.trainer.weights.adapters import export_adapters
from medtrain.trainer.weights.checkpoint import load_checkpoint
from medtrain.trainer.weights.export import export_model
from medtrain.trainer.weights.load import Checkpoint, init_weights, load_weights


def export_dtype(config: Config, compute_dtype: torch.dtype) -> torch.dtype:
    """The precision of exported weights that ``model.export_dtype`` asks for."""
    choice = config.model.export_dtype
    return compute_dtype if choice == "auto" else getattr(torch, choice)


def export_run(run_or_checkpoint: str | Path, out: str | Path, *, adapter: bool = False) -> Path:
    """Export a run's last checkpoint, or the checkpoint folder named, as a HF folder; returns ``out``.

    A LoRA run's adapters are merged into its base weights, or written alone as a PEFT folder where ``adapter`` is true.

    Raises:
        InputError: no run, no complete checkpoint, an ``out`` that is already something; of a LoRA run: base weights that
            are gone or have changed; ``adapter`` of another run.
    """
    quiet_libraries()
    place, out = Path(run_or_checkpoint), Path(out)
    root = place.parent.parent if place.parent.name == "checkpoints" else place
    folder = RunFolder(root)
    manifest = folder.read_manifest()
    if manifest is None:
        raise bad_input("neither a run folder nor one of its checkpoints", file=place, expected="manifest.json of a run")
    check_can_make(out)
    with user_path(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise bad_input("already exists", file=out, expected="a new folder")
    complete = complete_checkpoints(folder.checkpoints)
    chosen = [path for _, path in complete if root == place or path.name == place.name]
    if not chosen:
        raise bad_input("no complete checkpoint", file=place, found=", ".join(p.name for _, p in complete) or "none")
    config = config_from_dict(manifest["stage"], manifest["settings"], file=folder.manifest)
    compute_dtype = getattr(torch, manifest["starts"][-1]["paths"]["compute"])
    if adapter and not config.lora.on:
        raise bad_input("no LoRA run", file=place, expected="a run with adapters, or no --adapter")
    with join_world(device_type="cpu") as world:  # a whole model fits into host memory sooner than into one GPU
        model = folder.kept(config.model)
        tokenizer = load_tokenizer(model)
        hf_config = load_model_config(model, tokenizer)
        adapters = None
        if config.lora.on:
            # What the run made of lora.path, whatever that is by now; its values come from the checkpoint.
            made = {name: manifest["adapters"][name] for name in ("rank", "alpha", "target_modules")}
            adapters = plan_adapters(dataclasses.replace(config.lora, path=None, **made), parameter_shapes(hf_config))
        weights_dtype = torch.bfloat16 if config.precision.weights == "bf16" else torch.float32
        base_dtype = weights_dtype if adapters is None else compute_dtype
        policy = build_model(model, hf_config, world, base_dtype, backend="sdpa", adapters=adapters, weights_dtype=weights_dtype)
        if adapters is not None and not adapter:
            _load_base(policy, config, manifest["digests"]["weights"], world)
        load_checkpoint(chosen[-1], policy, None, world)
        if adapter:
            assert adapters is not None, "a LoRA run"
            return export_adapters(policy, adapters, out, world, base=config.model.path)
        dtype = export_dtype(config, compute_dtype)
        return export_model(policy, tokenizer, out, world, dtype=dtype, source=model.path, adapters=adapters)


def _load_base(policy: PolicyModel, config: Config, digest: str, world: World) -> None:
    """Fill in the frozen weights of a LoRA run, which its checkpoints do not hold."""
    if config.model.path is None:
        init_weights(policy, config.run.seed)
        return
    checkpoint = Checkpoint(config.model.path)
    if world.from_main(checkpoint.digest) != digest:
        raise bad_input(
            "other weights than those the run began with",
            file=config.model.path,
            expected="the run's own base, which its checkpoints do not hold",
        )
    load_weights(policy, checkpoint)
