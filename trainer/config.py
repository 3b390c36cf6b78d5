"""Typed settings: YAML plus ``KEY=VALUE`` overrides in, one frozen :class:`Config` out, every mistake named.

Each setting stands once, below, with its default and meaning. An unknown key is an error that names the nearest known
one; a setting that the chosen stage does not read is said so at start (:meth:`Config.unused`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from medtrain.trainer.data.sources import Source
from medtrain.trainer.errors import InputError, bad_input

Stage = Literal["cpt", "rpo"]


@dataclass(frozen=True)
class ModelConfig:
    """Where the weights come from. ``path`` or ``init``, never both."""

    path: str | None = None  # a Hugging Face checkpoint folder
    init: dict[str, Any] | None = None  # random weights: `model_type` and sizes as in a HF config.json
    tokenizer: str | None = None  # a folder; default: the checkpoint's own
    eos_token: str | None = None  # ends documents and completions; default: the tokenizer's own
    activation_checkpointing: Literal["none", "full"] = "none"  # full: recompute each layer in the backward
    keep_bytes: int | None = None  # budget of the head op for kept exponentials (0: keep nothing); default: 1 GiB
    export_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the compute precision


@dataclass(frozen=True)
class DataConfig:
    sources: list[Source] = field(default_factory=list)  # CPT: rows with `text`
    pairs: list[Source] = field(default_factory=list)  # RPO: rows with `prompt`, `chosen`, `rejected`
    heldout: list[Source] = field(default_factory=list)  # same form as the stage's data; never trained on
    seq_len: int = 4096  # CPT: tokens a window; longer documents are split
    max_length: int = 4096  # RPO: tokens of prompt + completion
    overlong: Literal["error", "drop", "cut_completion", "cut_prompt"] = "error"  # RPO: pairs over max_length
    unusable: Literal["error", "drop"] = (
        "error"  # RPO: pairs that are empty, identical, or lose their prompt in the template
    )
    share_prompts: bool = True  # RPO: compute a prompt once for all completions in a micro-batch; changes speed only
    cache: str | None = None  # token cache; default: $MEDTRAIN_CACHE or ~/.cache/medtrain


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
    loss: Literal["sigmoid", "ipo", "hinge", "robust", "simpo", "sft"] = "sigmoid"  # sft: the NLL term alone
    nll_norm: Literal["sequence", "token"] = "sequence"
    label_smoothing: float = 0.0  # sigmoid, robust, simpo
    simpo_gamma: float = 0.5  # simpo: target margin, nats a token times beta


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on frozen base weights (medtrain.trainer.lora). Off without ``rank`` or ``path``."""

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
class EvalConfig:
    every: int = 0  # optimizer steps between held-out evaluations; 0: before the first and after the last step only


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500  # optimizer steps; one is always written at the end
    keep: int = 2  # the newest so many are kept


@dataclass(frozen=True)
class RunConfig:
    out: str | None = None  # the run folder
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
            "cpt": ("data.pairs", "data.max_length", "data.overlong", "data.unusable", "data.share_prompts",
                    "optim.batch_pairs", "rpo."),
            "rpo": ("data.sources", "data.seq_len", "optim.batch_tokens"),
        }[self.stage]  # fmt: skip
        names = {name for name in self.given if name.startswith(other)}
        if self.optim.schedule != "wsd" and "optim.decay_steps" in self.given:
            names.add("optim.decay_steps")
        if self.optim.schedule == "constant" and "optim.min_lr_ratio" in self.given:
            names.add("optim.min_lr_ratio")
        if self.stage == "rpo" and self.rpo.loss == "sft":
            names |= self.given & {"rpo.alpha", "rpo.label_smoothing"}
        if self.rpo.loss != "simpo":
            names |= self.given & {"rpo.simpo_gamma"}
        return sorted(names)


@dataclass(frozen=True)
class PairsConfig:
    """``medtrain pairs``: questions with answers -> sampled and graded reasoning -> preference pairs."""

    model: str  # a Hugging Face folder
    questions: str  # exam questions, JSON Lines; `explanation` where the strategy needs it
    out: str  # the pairs, JSON Lines
    strategy: Literal["explanation", "sampled", "both"] = "both"  # ground truth | right path over the wrong path
    num_paths: int = 8  # sampled a question
    max_per_question: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 1024
    engine: Literal["hf", "vllm"] = "hf"
    chat: bool = False  # use the checkpoint's chat template
    demonstrations: str | None = None  # worked examples for a few-shot prompt
    seed: int = 0


# Settings that change speed, memory or bookkeeping but not what is learned: a run may be continued with others.
FREE_SETTINGS = (
    "optim.micro_batch_tokens",
    "model.keep_bytes",
    "model.activation_checkpointing",
    "model.export_dtype",
    "model.tokenizer",
    "lora.merge",
    "precision.compute",  # what it comes to on this machine is compared instead
    "precision.fp8_guard",
    "precision.fp8_check_every",
    "precision.fp8_tolerance",
    "data.cache",
    "data.share_prompts",
    "eval.every",
    "checkpoint.every",
    "checkpoint.keep",
    "run.out",
)


def load_config(stage: Stage | None, path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``KEY=VALUE`` overrides (YAML values), return a validated :class:`Config`.

    Relative paths inside are relative to the working directory, as for any other command line tool. A ``stage`` of None is
    read from the file: its ``stage``, or rpo where it has ``data.pairs`` and no ``data.sources``, else cpt.

    Raises:
        InputError: unreadable file, bad YAML, unknown key, wrong type, value out of range.
    """
    tree = _read_tree(path, overrides)
    if stage is None:
        data = tree.get("data") if isinstance(tree.get("data"), dict) else {}
        stage = tree.get("stage") or ("rpo" if data.get("pairs") and not data.get("sources") else "cpt")
        if stage not in typing.get_args(Stage):
            raise bad_input("not a known choice", file=path, field="stage", found=stage, expected="cpt | rpo")
    return config_from_dict(stage, tree, file=path)


def load_pairs_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> PairsConfig:
    """As :func:`load_config`, for ``medtrain pairs``."""
    config = _build(PairsConfig, _read_tree(path, overrides), "", path, set())
    for name in ("num_paths", "max_per_question", "max_new_tokens"):
        if getattr(config, name) < 1:
            raise bad_input("out of range", file=path, field=name, found=getattr(config, name), expected="1 or more")
    if config.temperature <= 0:
        raise bad_input(
            "out of range", file=path, field="temperature", found=config.temperature, expected="more than 0"
        )
    return config


def _read_tree(path: str | Path | None, overrides: typing.Sequence[str]) -> dict[str, Any]:
    tree: Any = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise bad_input("the config cannot be read", file=path, found=_reason(error)) from None
        try:
            tree = yaml.safe_load(text)
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


def config_from_dict(stage: Stage, tree: dict[str, Any], file: str | Path | None = None) -> Config:
    """Turn nested plain data (as read from YAML) into a validated :class:`Config`; errors as :func:`load_config`."""
    tree = dict(tree)
    if tree.pop("stage", stage) != stage:
        raise bad_input("the config is for the other stage", file=file, field="stage", expected=stage)
    given: set[str] = set()
    config = _build(Config, tree, "", file, given, skip={"stage", "given"}, fixed={"stage": stage})
    config = dataclasses.replace(config, given=frozenset(given))
    _validate(config, file)
    return config


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise bad_input("not an override", found=override, expected="KEY=VALUE, as in optim.lr=1e-5")
    try:
        value = yaml.safe_load(text)
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


def _build(cls, tree, prefix, file, given, skip=frozenset(), fixed=None, known_keys=None):
    known_keys = _all_keys(cls) if known_keys is None else known_keys
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.name not in skip}
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
        if dataclasses.is_dataclass(hint):
            keys += [f"{name}.{f.name}" for f in dataclasses.fields(hint)]
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
        return bad_input(
            "not supported", file=file, field=name, expected="nothing: adapters are trained without dropout"
        )
    # Two ways to be near: the right setting in the wrong section, or a typing slip.
    by_last = {key.rsplit(".", 1)[-1]: key for key in keys}
    last = name.rsplit(".", 1)[-1]
    last = _ALSO_CALLED.get(last, last)
    near = [by_last[last]] if last in by_last else difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    if not near:
        near = [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    top = ", ".join(key for key in keys if "." not in key)
    return bad_input(
        "unknown key", file=file, field=name, expected=f"the nearest known key, '{near[0]}'" if near else top
    )


def _convert(value: Any, hint: Any, name: str, file, given: set[str], known_keys: list[str]) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if hint is Source and isinstance(value, str):
            value = {"path": value}
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise bad_input("wrong type", file=file, field=name, found=value, expected="a mapping")
        return _build(hint, value, f"{name}.", file, given, known_keys=known_keys)
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
        return [
            _convert(v, typing.get_args(hint)[0], f"{name}.{i}", file, given, known_keys) for i, v in enumerate(value)
        ]
    if origin is dict:
        if not isinstance(value, dict):
            raise bad_input("wrong type", file=file, field=name, found=value, expected="a mapping")
        return value
    if hint in (float, int) and isinstance(value, str):
        # YAML 1.1 reads 1e-5 (no dot) as a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        expected = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint]
        raise bad_input("wrong type", file=file, field=name, found=value, expected=expected)
    return value


def _validate(config: Config, file) -> None:
    def require(condition: bool, name: str, found: object, expected: str) -> None:
        if not condition:
            raise bad_input("out of range", file=file, field=name, found=found, expected=expected)

    model, data, optim, rpo = config.model, config.data, config.optim, config.rpo
    if (model.path is None) == (model.init is None):
        found = "neither" if model.path is None else "both"
        raise bad_input("where the weights come from", file=file, field="model", found=found,
                        expected="either model.path (a checkpoint folder) or model.init (sizes for random weights)")  # fmt: skip
    if model.init is not None and "model_type" not in model.init:
        raise bad_input("missing", file=file, field="model.init.model_type", expected="as in a HF config, e.g. qwen2")
    if model.init is not None and model.tokenizer is None:
        raise bad_input("missing", file=file, field="model.tokenizer", expected="a folder, since model.init has none")
    require(model.keep_bytes is None or model.keep_bytes >= 0, "model.keep_bytes", model.keep_bytes, "0 or more")
    rows = "data.sources" if config.stage == "cpt" else "data.pairs"
    if not (data.sources if config.stage == "cpt" else data.pairs):
        raise bad_input(
            "missing", file=file, field=rows, expected=f"a list of {{path, weight, name}} for {config.stage}"
        )
    if config.run.out is None:
        raise bad_input("missing", file=file, field="run.out", expected="the run folder")
    if (optim.steps is None) == (optim.epochs is None):
        found = "neither" if optim.steps is None else "both"
        raise bad_input(
            "how long to train", file=file, field="optim", found=found, expected="steps or epochs, one of them"
        )
    require(optim.steps is None or optim.steps >= 1, "optim.steps", optim.steps, "1 or more")
    require(optim.epochs is None or optim.epochs > 0, "optim.epochs", optim.epochs, "more than 0")
    for name in ("batch_tokens", "batch_pairs", "micro_batch_tokens"):
        require(getattr(optim, name) >= 1, f"optim.{name}", getattr(optim, name), "1 or more")
    require(0 < optim.lr < float("inf"), "optim.lr", optim.lr, "more than 0")
    require(optim.warmup_steps >= 0, "optim.warmup_steps", optim.warmup_steps, "0 or more")
    require(optim.decay_steps is None or optim.decay_steps >= 1, "optim.decay_steps", optim.decay_steps, "1 or more")
    require(0 <= optim.min_lr_ratio <= 1, "optim.min_lr_ratio", optim.min_lr_ratio, "0 to 1")
    require(0 <= optim.beta1 < 1, "optim.beta1", optim.beta1, "0 to below 1")
    require(0 <= optim.beta2 < 1, "optim.beta2", optim.beta2, "0 to below 1")
    require(optim.eps > 0, "optim.eps", optim.eps, "more than 0")
    require(optim.weight_decay >= 0, "optim.weight_decay", optim.weight_decay, "0 or more")
    require(optim.grad_clip >= 0, "optim.grad_clip", optim.grad_clip, "0 (no clipping) or more")
    if optim.schedule == "wsd" and optim.steps is not None and optim.decay_steps is not None:
        least = optim.warmup_steps + optim.decay_steps
        require(least <= optim.steps, "optim.decay_steps", optim.decay_steps, "warm-up and decay within optim.steps")
    require(data.seq_len >= 2, "data.seq_len", data.seq_len, "2 or more")
    require(data.max_length >= 3, "data.max_length", data.max_length, "3 or more")
    for i, source in enumerate([*data.sources, *data.pairs]):
        require(source.weight is None or source.weight > 0, f"data.*.{i}.weight", source.weight, "more than 0")
    require(rpo.beta > 0, "rpo.beta", rpo.beta, "more than 0")
    require(rpo.alpha >= 0, "rpo.alpha", rpo.alpha, "0 or more")
    require(0 <= rpo.label_smoothing < 0.5, "rpo.label_smoothing", rpo.label_smoothing, "0 to below 0.5")
    if rpo.label_smoothing > 0 and rpo.loss not in ("sigmoid", "robust", "simpo"):
        raise bad_input("has no effect with this loss", file=file, field="rpo.label_smoothing", found=f"rpo.loss={rpo.loss}",
                        expected="rpo.loss sigmoid, robust or simpo")  # fmt: skip
    _validate_lora(config.lora, file)
    _validate_precision(config, file)
    require(config.eval.every >= 0, "eval.every", config.eval.every, "0 or more")
    require(config.checkpoint.every >= 1, "checkpoint.every", config.checkpoint.every, "1 or more")
    require(config.checkpoint.keep >= 1, "checkpoint.keep", config.checkpoint.keep, "1 or more")


def _validate_lora(lora: LoraConfig, file) -> None:
    if lora.rank < 0:
        raise bad_input("out of range", file=file, field="lora.rank", found=lora.rank, expected="0 (off) or more")
    if lora.alpha is not None and not 0 < lora.alpha < float("inf"):
        raise bad_input("out of range", file=file, field="lora.alpha", found=lora.alpha, expected="more than 0")
    changed = {f.name: getattr(lora, f.name) for f in dataclasses.fields(lora)}
    changed = {name: value for name, value in changed.items() if value != getattr(LoraConfig(), name)}
    for name, value in changed.items():
        if not lora.on:
            raise bad_input("has no effect without adapters", file=file, field=f"lora.{name}", found=value,
                            expected="lora.rank above 0, or lora.path")  # fmt: skip
        if lora.path is not None and name in ("rank", "alpha", "target_modules"):
            raise bad_input("has no effect with lora.path", file=file, field=f"lora.{name}", found=value,
                            expected="nothing: the adapter brings its own")  # fmt: skip


def _validate_precision(config: Config, file) -> None:
    precision = config.precision

    def refuse(name: str, found: object, problem: str, expected: str) -> None:
        raise bad_input(problem, file=file, field=f"precision.{name}", found=found, expected=expected)

    for f in dataclasses.fields(precision):
        value = getattr(precision, f.name)
        if precision.fp8 == "none" and f.name.startswith("fp8_") and value != f.default:
            refuse(f.name, value, "has no effect without FP8", "precision.fp8 tensorwise or rowwise")
    if precision.fp8_all_gather and precision.fp8 != "tensorwise":
        refuse("fp8_all_gather", f"precision.fp8={precision.fp8}", "one scale a weight is gathered with it",
               "precision.fp8=tensorwise")  # fmt: skip
    if precision.fp8_check_every < 0:
        refuse("fp8_check_every", precision.fp8_check_every, "out of range", "0 (no checks) or more")
    if not 0 < precision.fp8_tolerance < float("inf"):
        refuse("fp8_tolerance", precision.fp8_tolerance, "out of range", "more than 0")
    if config.lora.on and precision.fp8 != "none":
        refuse("fp8", precision.fp8, "not supported with adapters", "precision.fp8=none, or training all weights")
    if config.lora.on and precision.weights != "fp32":
        refuse("weights", precision.weights, "has no effect with adapters: the base lies in the compute precision, and "
               "adapters are float32", "precision.weights=fp32")  # fmt: skip
    if precision.weights == "bf16" and precision.compute == "float32":
        refuse("weights", "bf16", "weights in bfloat16 are computed with as they are", "precision.compute=bfloat16")


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
