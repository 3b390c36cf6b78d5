"""Typed settings: YAML plus ``KEY=VALUE`` overrides in, one frozen :class:`Config` out, every mistake named.

Each setting stands once, below, with its default and meaning. An unknown key is an error that names the nearest known
one; a setting that the chosen stage does not read is named at start (:meth:`Config.unused`).
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medtrain.kernels.losses import LOSSES
from medtrain.trainer.config.checks import check_settings
from medtrain.trainer.config.reading import build, read_tree
from medtrain.trainer.config.source import Source
from medtrain.trainer.errors import bad_input

Stage = Literal["cpt", "rpo"]


@dataclass(frozen=True)
class ModelConfig:
    """Where the weights come from. ``path`` or ``init``, never both."""

    path: str | None = None  # a Hugging Face checkpoint folder
    init: dict[str, Any] | None = None  # random weights: `model_type` and sizes as in a HF config.json
    tokenizer: str | None = None  # a folder; default: the checkpoint's own
    eos_token: str | None = None  # ends documents and completions; default: the tokenizer's own
    # What a layer computes again in the backward instead of keeping it (medtrain.trainer.model.recompute). full: all of it;
    # selective: all but attention and two of its seven matrix products; budget: what the compiler finds cheapest
    activation_checkpointing: Literal["none", "selective", "full", "budget"] = "none"
    activation_budget: float | None = None  # budget: share of a layer's activations to keep, 0 to 1
    compile: bool = False  # each decoder layer by torch.compile
    # Of norms, rotary embedding and SwiGLU; auto: Liger's where it is installed, on CUDA and without compile
    kernels: Literal["auto", "torch", "liger"] = "auto"
    keep_bytes: int | None = None  # budget of the head op for kept exponentials (0: keep nothing); default: 1 GiB
    export_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the compute precision
    # before the first step: a small model of the same architecture against Hugging Face's; then `path` against what was
    # loaded: every tensor's bits, and Hugging Face's forward where it fits
    proof: Literal["auto", "tensors", "none"] = "auto"  # tensors: no forward of `path`


@dataclass(frozen=True)
class DataConfig:
    sources: list[Source] = field(default_factory=list)  # CPT: rows with `text`
    pairs: list[Source] = field(default_factory=list)  # RPO: rows with `prompt`, `chosen`, `rejected`
    heldout: list[Source] = field(default_factory=list)  # same form as the stage's data; never trained on
    seq_len: int = 4096  # CPT: tokens a window; longer documents are split
    max_length: int = 4096  # RPO: tokens of prompt + completion
    overlong: Literal["error", "drop", "cut_completion", "cut_prompt"] = "error"  # RPO: pairs over max_length
    unusable: Literal["error", "drop"] = "error"  # RPO: pairs that are empty, identical, or lose their prompt in the template
    share_prompts: bool = True  # RPO: compute a prompt once for all completions in a micro-batch; same result
    # (without it a pair takes its prompt twice out of optim.micro_batch_tokens)
    exam: str | None = None  # exam questions, JSON Lines of a known form, for an evaluation before, in and after training
    cache: str | None = None  # token cache; default: $MEDTRAIN_CACHE or ~/.cache/medtrain
    workers: int | None = None  # CPT: processes that tokenise large sources; default: one a CPU of the node


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-5  # peak learning rate
    steps: int | None = None  # optimizer steps; or:
    epochs: float | None = None  # passes over the data
    batch_tokens: int = 524_288  # CPT: counted tokens an optimizer step, over all ranks
    batch_pairs: int = 64  # RPO: pairs an optimizer step, over all ranks
    micro_batch_tokens: int = 16_384  # tokens a rank computes at once; changes memory and speed, not the result
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None  # wsd: steps of the final decay; default: a tenth of the steps
    min_lr_ratio: float = 0.1  # lr at the end over the peak (cosine, wsd)
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only, not norms and biases
    grad_clip: float = 1.0  # global norm; 0: no clipping
    state: Literal["fp32", "8bit"] = "fp32"  # Adam's moments; 8bit: of matrices, in blocks with a scale each (torchao)


@dataclass(frozen=True)
class RpoConfig:
    """The preference loss (medtrain.kernels.preference)."""

    beta: float = 0.1
    alpha: float = 1.0  # weight of the NLL of the chosen side; 0 is plain DPO
    loss: str = "sigmoid"  # one of medtrain.kernels.losses; sft: the NLL term alone
    nll_norm: Literal["sequence", "token"] = "sequence"
    label_smoothing: float = 0.0  # of sigmoid, robust and simpo; below 0.5
    simpo_gamma: float = 0.5  # simpo: target margin, nats a token times beta


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on frozen base weights (medtrain.trainer.model.lora). Off without ``rank`` or ``path``."""

    rank: int = 0  # of each adapter; 0: train all weights
    alpha: float | None = None  # an adapter counts alpha / rank times; default: twice the rank
    target_modules: list[str] = field(default_factory=list)  # e.g. q_proj; default: every linear layer but the head
    path: str | None = None  # a PEFT adapter folder to train on; it brings rank, alpha and target modules
    base: Literal["dense", "nf4"] = "dense"  # frozen weights in the compute precision, or linear layers in 4 bits
    merge: bool = True  # write model/ (base and adapters as one) beside adapter/ at the end

    @property
    def on(self) -> bool:
        return self.rank > 0 or self.path is not None


@dataclass(frozen=True)
class PrecisionConfig:
    compute: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, float32 on CPU
    weights: Literal["fp32", "bf16"] = "fp32"  # trained weights as kept; bf16: stochastic rounding instead of masters
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"  # linear layers of attention and MLP, by torchao
    fp8_all_gather: bool = False  # tensorwise: FSDP gathers weights in FP8
    fp8_emulate: bool = False  # the arithmetic of FP8 on a device without it; slow
    fp8_guard: Literal["stop", "warn"] = "stop"  # what a check that fails does
    fp8_check_every: int = 100  # steps between checks of FP8 on one micro-batch, the first step included; 0: none
    fp8_tolerance: float = 0.05  # nats a token that a check lets the loss differ from the one without FP8


@dataclass(frozen=True)
class ParallelConfig:
    """How FSDP2 spreads the model over the ranks (medtrain.trainer.model.fsdp); no effect on what is learned."""

    replicate: int = 1  # copies of the sharded model (HSDP), each on neighbouring ranks; divides the number of ranks
    reshard_after_forward: bool = True  # false: layers stay gathered from forward to backward (ZeRO-2)
    prefetch: int = 0  # layers gathered ahead by explicit order; 0: FSDP2's own, one


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0  # optimizer steps between held-out evaluations; 0: before the first and after the last step only
    exam_every: int = 0  # likewise for data.exam, which is answered alone and with explanation
    exam_questions: int = 100  # at most, the first of those without an image
    exam_max_new_tokens: int = 1024  # of an answer with explanation
    exam_max_answer_tokens: int = 32  # of an answer alone
    exam_prompt: str | None = None  # a prompt style: a name of configs/prompts or a YAML file; default: Japanese, plain
    exam_chat: bool = False  # use the tokenizer's chat template
    exam_demonstrations: str | None = None  # worked examples for a few-shot prompt, JSON Lines
    exam_mapping: str | None = None  # a YAML file that says which fields hold what, for an exam of an own form


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500  # optimizer steps; one is always written at the end
    keep: int = 2  # the newest so many are kept
    async_save: bool = True  # copy to host memory and write from there while training goes on; else write at once


@dataclass(frozen=True)
class RunConfig:
    out: str = ""  # the run folder; required
    seed: int = 0
    deterministic: bool = False  # deterministic CUDA algorithms (CPU runs always are)


@dataclass(frozen=True)
class Config:
    stage: Stage
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    rpo: RpoConfig = RpoConfig()
    lora: LoraConfig = LoraConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()
    given: frozenset[str] = frozenset()  # dotted names the user set

    def settings(self) -> dict[str, Any]:
        """All settings as plain YAML-able data, without bookkeeping."""
        tree = dataclasses.asdict(self)
        tree.pop("given")
        return tree

    def unused(self) -> list[str]:
        """Dotted names the user set that this stage does not read."""
        other = {
            "cpt": (
                "data.pairs",
                "data.max_length",
                "data.overlong",
                "data.unusable",
                "data.share_prompts",
                "optim.batch_pairs",
                "rpo.",
            ),
            "rpo": ("data.sources", "data.seq_len", "data.workers", "optim.batch_tokens"),
        }[self.stage]
        names = {name for name in self.given if name.startswith(other)}
        if not self.data.heldout:
            names |= self.given & {"eval.every"}
        if self.optim.schedule != "wsd" and "optim.decay_steps" in self.given:
            names.add("optim.decay_steps")
        if self.optim.schedule == "constant" and "optim.min_lr_ratio" in self.given:
            names.add("optim.min_lr_ratio")
        if self.stage == "rpo" and LOSSES[self.rpo.loss].likelihood_only:
            names |= self.given & {"rpo.alpha", "rpo.label_smoothing"}
        if self.rpo.loss != "simpo":
            names |= self.given & {"rpo.simpo_gamma"}
        return sorted(names)


# Settings that change speed, memory or bookkeeping but not what is learned: a run may be continued with others.
FREE_SETTINGS = (
    "optim.micro_batch_tokens",
    "model.keep_bytes",
    "model.activation_checkpointing",
    "model.activation_budget",
    "model.compile",
    "model.kernels",
    "model.export_dtype",
    "model.proof",
    "model.tokenizer",
    "lora.merge",
    "precision.compute",  # what it comes to on this machine is compared instead
    "precision.fp8_guard",
    "precision.fp8_check_every",
    "precision.fp8_tolerance",
    "parallel.replicate",
    "parallel.reshard_after_forward",
    "parallel.prefetch",
    "data.cache",
    "data.exam",  # its content is compared, and so is that of demonstrations and mapping
    "data.workers",
    "data.share_prompts",
    "eval.every",
    "eval.exam_every",
    "eval.exam_demonstrations",
    "eval.exam_mapping",
    "eval.exam_prompt",  # its content counts, not where it stands
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.async_save",
    "run.out",
)


def load_config(stage: str | None, path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``KEY=VALUE`` overrides (YAML values), return a validated :class:`Config`.

    Relative paths inside are relative to the working directory, as for any other command line tool. A ``stage`` of None is
    read from the file: its ``stage``, or rpo where it has ``data.pairs`` and no ``data.sources``, else cpt.

    Raises:
        InputError: unreadable file, bad YAML, unknown key, wrong type, value out of range.
    """
    tree = read_tree(path, overrides)
    if stage is None:
        data = tree.get("data")
        data = data if isinstance(data, dict) else {}
        stage = str(tree.get("stage") or ("rpo" if data.get("pairs") and not data.get("sources") else "cpt"))
        if stage not in typing.get_args(Stage):
            raise bad_input("not a known choice", file=path, field="stage", found=stage, expected="cpt | rpo")
    return config_from_dict(stage, tree, file=path)


def config_from_dict(stage: str, tree: dict[str, Any], file: str | Path | None = None) -> Config:
    """Turn nested plain data (as read from YAML) into a validated :class:`Config`; errors as :func:`load_config`."""
    tree = dict(tree)
    if tree.pop("stage", stage) != stage:
        raise bad_input("the config is for the other stage", file=file, field="stage", expected=stage)
    given: set[str] = set()
    config = build(Config, tree, "", file, given, skip={"stage", "given"}, fixed={"stage": stage})
    config = dataclasses.replace(config, given=frozenset(given))
    check_settings(config, file)
    return config


def learned_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Flatten to dotted names and leave out :data:`FREE_SETTINGS` and where input lies: its digest is what counts."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict | list) and node:
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        elif node not in ({}, []):
            flat[prefix] = node

    walk(settings, "")
    return {n: v for n, v in flat.items() if n not in FREE_SETTINGS and not n.endswith(".path")}
