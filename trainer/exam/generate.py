"""Generation of exam outputs: prompts to texts through transformers or vLLM, and log-probs of given completions.

Both engines get token ids (of the prompt as written: no BOS is added to it, see ``data/encode.py``), cut outputs by the
same :class:`Stop` rule and say of each output whether it was truncated, that is, ended by the token limit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from medtrain.trainer.data.encode import continuations, tokenize_starts
from medtrain.trainer.data.tokenizer import PROBES, check_ids, read_tokenizer
from medtrain.trainer.errors import bad_input
from medtrain.trainer.exam.prompts import Stop
from medtrain.trainer.weights.small_files import end_tokens

ENGINES = ("hf", "vllm")
# Stop rules need decoded text; looking every few steps costs little and generates at most this many tokens too many.
_STEPS_BETWEEN_STOP_CHECKS = 8
_VLLM_PORTION = 512
_LOGITS_AT_ONCE = 2**28  # float32: 1 GiB
# Greedy tokens that are made with and without the KV cache, and how far their logits may be apart, as a share of the
# largest: rounding in bfloat16 makes a hundredth or two; a token made without its context is another one altogether.
_CACHE_TOKENS = 8
_CACHE_TOLERANCE = 0.05


@dataclass(frozen=True)
class Output:
    """One generated text, cut at its end. ``num_tokens`` counts the tokens generated for it."""

    text: str
    truncated: bool
    num_tokens: int


OnOutputs = Callable[[list[int], list[Output]], None]


class HFEngine:
    """Generation with a transformers model that is already in memory.

    ``batch_tokens`` bounds rows x (prompt + new tokens) of a batch and so the KV cache; ``max_rows`` the rows.
    """

    def __init__(self, model, tokenizer, *, batch_tokens: int = 65_536, max_rows: int = 256):
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self.max_rows = batch_tokens, max_rows
        configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        folder = getattr(model, "name_or_path", None) or None
        eos = [*end_tokens(configured, folder)]
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in eos:
            eos.append(tokenizer.eos_token_id)
        self.eos = eos
        # Padding is masked and what follows an end is cut off, so that any id will do where the tokenizer names none.
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos[0] if eos else 0)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Stop | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        on_outputs: OnOutputs | None = None,
        skip: Collection[int] = (),
    ) -> list[Output | None]:
        """Generate one output a prompt, in the order of the prompts.

        ``temperature`` 0 is greedy. Sampling is the same again for the same prompts, seed and batch settings, and
        leaves the global random state as it was. ``on_outputs(indices, outputs)`` is called after each batch.
        The outputs of prompts in ``skip`` are not needed: batches of nothing else are left out, and the others are what
        they would be without ``skip``, so that a sampling that was killed goes on to the same end. Raises
        :class:`InputError` where a prompt does not fit the model's positions, or nothing could end an output.
        """
        if max_new_tokens < 1 or temperature < 0:
            raise bad_input("max_new_tokens must be 1 or more and temperature 0 or more")
        stop = stop or Stop()
        if not self.eos and not stop.strings and stop.marker is None:
            raise bad_input(
                "nothing could end an output: the model and its tokenizer name no eos token and there is no stop string"
            )
        ids = tokenize_starts(self.tokenizer, prompts, as_written=True)
        self._check_ids(ids, max_new_tokens)
        outputs: list[Output | None] = [None] * len(ids)
        with self._generating(), torch.random.fork_rng(self._cuda_devices()):
            skip = frozenset(skip)
            for number, batch in enumerate(self._batches(ids, max_new_tokens)):
                if skip.issuperset(batch):
                    continue
                digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:7], "big"))
                made = self._generate_batch([ids[i] for i in batch], max_new_tokens, stop, temperature)
                for index, output in zip(batch, made, strict=True):
                    outputs[index] = output
                if on_outputs is not None:
                    on_outputs(batch, made)
        return outputs

    def cache_agrees(self, prompt: str, max_new_tokens: int) -> bool:
        """Whether the first greedy tokens after ``prompt`` have the same logits with the KV cache as without it, up to
        rounding: that what ``generate`` hands on from token to token reaches the model."""
        from transformers import GenerationConfig

        input_ids, mask = self._left_padded(tokenize_starts(self.tokenizer, [prompt], as_written=True))
        num = min(_CACHE_TOKENS, max_new_tokens)
        made = []
        with self._generating():
            for use_cache in (True, False):
                config = GenerationConfig(
                    max_new_tokens=num,
                    min_new_tokens=num,
                    do_sample=False,
                    use_cache=use_cache,
                    output_logits=True,
                    return_dict_in_generate=True,
                    eos_token_id=self.eos or None,
                    pad_token_id=self.pad,
                )
                made.append(self.model.generate(input_ids, attention_mask=mask, generation_config=config))
        tokens = [one.sequences[0, input_ids.shape[1] :] for one in made]
        same = int((tokens[0] == tokens[1]).cumprod(0).sum())
        # Where a tie is broken another way the logits still agree; what follows it is another text.
        cached, plain = (torch.cat(one.logits)[: same + 1].float() for one in made)
        return bool((cached - plain).abs().max() <= _CACHE_TOLERANCE * plain.abs().max())

    def logps(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Sum of the log-probs (nats) of each completion's tokens after its prompt, without eos; the tokens are those that
        training makes of it (:func:`medtrain.trainer.data.encode.continuations`)."""
        prompt_ids = tokenize_starts(self.tokenizer, prompts, as_written=True)
        completion_ids = continuations(self.tokenizer)(completions)
        if not all(prompt_ids) or not all(completion_ids):
            raise bad_input("a prompt or completion without tokens has no log-prob")
        rows = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        self._check_ids(rows, 0)
        sums = [0.0] * len(rows)
        with self._generating():
            for batch in self._batches(rows, 0):
                longest = max(len(completion_ids[i]) for i in batch)
                few = max(1, _LOGITS_AT_ONCE // ((longest + 1) * self.model.config.get_text_config().vocab_size))
                for first in range(0, len(batch), few):
                    part = batch[first : first + few]
                    kept = max(len(completion_ids[i]) for i in part)
                    for index, logps in zip(part, self._last_logps([rows[i] for i in part], kept), strict=True):
                        sums[index] = float(logps[-len(completion_ids[index]) :].double().sum())
        return sums

    def _last_logps(self, rows: list[list[int]], kept: int) -> torch.Tensor:
        """Log-probs [rows, kept] of the last ``kept`` tokens of each row, on the CPU."""
        input_ids, mask = self._left_padded(rows)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.model(input_ids=input_ids, attention_mask=mask, position_ids=positions, logits_to_keep=kept + 1).logits[
            :, -kept - 1 : -1
        ]
        logits = logits.float()
        return (logits.gather(-1, input_ids[:, -kept:, None])[..., 0] - logits.logsumexp(-1)).cpu()

    def _check_ids(self, ids: list[list[int]], max_new_tokens: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        for number, row in enumerate(ids, start=1):
            if not row:
                raise bad_input(f"prompt {number} is empty: it has no tokens to go on from")
            if max(row) >= vocabulary:
                raise bad_input(
                    "the tokenizer is not this model's",
                    found=f"token id {max(row)} in prompt {number}",
                    expected=f"ids below {vocabulary}",
                )
            if limit is not None and len(row) + max_new_tokens > limit:
                raise bad_input(
                    f"prompt {number} is too long for the model",
                    found=f"{len(row)} prompt tokens + {max_new_tokens} new ones",
                    expected=f"at most {limit}, its max_position_embeddings; fewer demonstrations or new tokens help",
                )

    def _batches(self, ids: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Indices by falling length, so that a batch holds little padding and memory runs out first or never."""
        batches: list[list[int]] = []
        for index in sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i)):
            if batches:
                width = len(ids[batches[-1][0]]) + max_new_tokens
                if len(batches[-1]) < min(self.max_rows, max(1, self.batch_tokens // width)):
                    batches[-1].append(index)
                    continue
            batches.append([index])
        return batches

    def _left_padded(self, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, ids))
        input_ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in ids], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.device)
        return input_ids, mask

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    @contextmanager
    def _generating(self):
        """Evaluation mode without gradients, and without the sampling settings that the checkpoint came with."""
        from transformers import GenerationConfig

        was_training, config = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = GenerationConfig()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.model.generation_config = config
            self.model.train(was_training)

    def _generate_batch(self, ids, max_new_tokens: int, stop: Stop, temperature: float) -> list[Output]:
        from transformers import GenerationConfig

        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
        config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=self.eos or None, pad_token_id=self.pad, **sampling)
        input_ids, mask = self._left_padded(ids)
        made = self.model.generate(
            input_ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=[_StopRule(self, ids, input_ids.shape[1], stop)],
        )[:, input_ids.shape[1] :].tolist()
        outputs = []
        ends = set(self.eos)
        for prompt, row in zip(ids, made, strict=True):
            end = next((i for i, token in enumerate(row) if token in ends), None)
            text, stopped = stop.cut(self._decode([prompt], [row[:end]])[0])
            outputs.append(Output(text, end is None and not stopped, len(row) if end is None else end + 1))
        return outputs

    def _decode(self, prompts: list[list[int]], rows: list[list[int]]) -> list[str]:
        """Text of the new tokens as it follows the prompt: many tokenizers drop a blank that begins a text."""
        last = [prompt[-4:] for prompt in prompts]
        decode = self.tokenizer.batch_decode
        before = decode(last, clean_up_tokenization_spaces=False)
        whole = decode([a + b for a, b in zip(last, rows, strict=True)], clean_up_tokenization_spaces=False)
        return [
            w[len(b) :] if w.startswith(b) else self.tokenizer.decode(row, clean_up_tokenization_spaces=False)
            for b, w, row in zip(before, whole, rows, strict=True)
        ]


class _StopRule:
    """transformers' stopping criterion for a :class:`Stop`: rows whose text has ended are done."""

    def __init__(self, engine: HFEngine, prompts: list[list[int]], width: int, stop: Stop):
        self.engine, self.prompts, self.width, self.stop = engine, prompts, width, stop
        self.done = torch.zeros(len(prompts), dtype=torch.bool, device=engine.device)
        self.active = bool(stop.strings) or stop.marker is not None
        self.ended: set[int] = set()

    def __call__(self, input_ids: torch.Tensor, scores=None, **kwargs) -> torch.Tensor:
        if self.active and (input_ids.shape[1] - self.width) % _STEPS_BETWEEN_STOP_CHECKS == 0:
            rows = [i for i in range(len(self.prompts)) if i not in self.ended]
            new = input_ids[:, self.width :].tolist()
            texts = self.engine._decode([self.prompts[i] for i in rows], [new[i] for i in rows])
            for i, text in zip(rows, texts, strict=True):
                if self.stop.cut(text)[1]:
                    self.ended.add(i)
                    self.done[i] = True
        return self.done


class VLLMEngine:
    """Generation with vLLM, where it is installed: all visible GPUs share the model by tensor parallelism."""

    def __init__(self, model_dir: str | Path, *, dtype: str = "auto", seed: int = 0):
        try:
            from vllm import LLM
        except ImportError as error:
            raise bad_input("vllm is not installed here", field="engine", found=str(error), expected="hf") from error
        self.llm = LLM(model=str(model_dir), dtype=dtype, seed=seed, tensor_parallel_size=max(1, torch.cuda.device_count()))
        # Prompts are handed over as ids of ours; what vLLM makes into text, stop strings among it, is its own reading.
        self.tokenizer = read_tokenizer(model_dir)
        check_ids(self.llm.get_tokenizer(), PROBES, folder=model_dir)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Stop | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        on_outputs: OnOutputs | None = None,
        skip: Collection[int] = (),
    ) -> list[Output | None]:
        """As :meth:`HFEngine.generate`; each prompt has its own seed, so that equal prompts give different samples."""
        from vllm import SamplingParams

        stop = stop or Stop()
        ids = tokenize_starts(self.tokenizer, prompts, as_written=True)
        outputs: list[Output | None] = [None] * len(ids)
        skip = frozenset(skip)
        asked = [i for i in range(len(ids)) if i not in skip]
        # Handed over in portions, so that a run that is killed has kept most of its outputs.
        for first in range(0, len(asked), _VLLM_PORTION):
            portion = asked[first : first + _VLLM_PORTION]
            settings = [
                SamplingParams(temperature=temperature, max_tokens=max_new_tokens, stop=list(stop.strings) or None, seed=seed + i)
                for i in portion
            ]
            made = []
            for request in self.llm.generate([{"prompt_token_ids": ids[i]} for i in portion], settings):
                text, stopped = stop.cut(request.outputs[0].text)
                truncated = request.outputs[0].finish_reason == "length" and not stopped
                made.append(Output(text, truncated, len(request.outputs[0].token_ids)))
            for index, output in zip(portion, made, strict=True):
                outputs[index] = output
            if on_outputs is not None:
                on_outputs(portion, made)
        return outputs


def load_engine(
    model_dir: str | Path, engine: str = "hf", *, device: str = "auto", dtype: str = "auto", batch_tokens: int = 65_536
) -> HFEngine | VLLMEngine:
    """Load a checkpoint folder for generation.

    ``device`` auto is the first GPU, else the CPU; ``dtype`` auto is that of the checkpoint, else a name such as
    ``bfloat16``. ``device`` and ``batch_tokens`` are for ``hf``; vLLM decides them itself. Raises :class:`InputError`
    for a folder that is no checkpoint, an unknown engine, and an engine that is not installed.
    """
    if engine not in ENGINES:
        raise bad_input("unknown", field="engine", found=engine, expected=" or ".join(ENGINES))
    folder = Path(model_dir)
    if not (folder / "config.json").is_file():
        raise bad_input("no checkpoint", file=folder, expected="a folder with config.json, weights and a tokenizer")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise bad_input("unknown", field="dtype", found=dtype, expected="auto, float32, bfloat16 or float16")
    if engine == "vllm":
        return VLLMEngine(folder, dtype=dtype)
    from transformers import AutoModelForCausalLM

    from medtrain.trainer.libraries import quiet_libraries

    quiet_libraries()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = read_tokenizer(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype), local_files_only=True
        ).to(device)
    except Exception as error:  # transformers and safetensors raise many kinds, and all mean the same to the user
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise bad_input("the checkpoint cannot be loaded", file=folder, found=first_line) from error
    return HFEngine(model, tokenizer, batch_tokens=batch_tokens)
