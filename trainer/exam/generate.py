"""Generation of exam outputs through transformers or vLLM: prompts to texts, and log-probs of given completions.

Both engines get token ids (of the prompt as written: no BOS is added to it, see ``data/tokenizer.py``), cut outputs by the
same :class:`Stop` rule, and tell whether the token limit ended an output.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from transformers import AutoModelForCausalLM, GenerationConfig

from medtrain.trainer.config.exam import ExamSettings
from medtrain.trainer.data.tokenizer import PROBES, continuations, read_tokenizer, tokenize_starts, tokenize_texts
from medtrain.trainer.errors import bad_input
from medtrain.trainer.exam.prompts import Stop
from medtrain.trainer.libraries import quiet_libraries
from medtrain.trainer.weights.small_files import end_tokens

log = logging.getLogger(__name__)

# Stop rules need decoded text; checking every few steps costs little and generates at most this many tokens too many.
_STEPS_BETWEEN_STOP_CHECKS = 8
_SECONDS_BETWEEN_LINES = 15.0
_VLLM_PORTION = 512  # prompts handed over at once, so that a run that is killed has kept most of its outputs
# Greedy tokens that are made with and without the KV cache, and how far their logits may be apart, as a share of the
# largest: rounding in bfloat16 makes a hundredth or two; a token made without its context is another one altogether.
_CACHE_TOKENS = 8
_CACHE_TOLERANCE = 0.05


@dataclass(frozen=True)
class Output:
    """One generated text, cut at its end, or the most likely choice."""

    text: str
    truncated: bool  # ended by the token limit
    choice_logps: dict[str, float] | None = None  # of the candidates, where choices were scored: "a,c" -> nats


Batches = Iterator[tuple[list[int], list[Output]]]  # indices of prompts, and their outputs


class HFEngine:
    """Generation with a transformers model that is already in memory.

    ``batch_tokens`` bounds rows x (prompt + new tokens) of a batch and so the KV cache; ``max_rows`` the rows.
    """

    def __init__(self, model, tokenizer, *, batch_tokens: int = 65_536, max_rows: int = 256):
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self.max_rows = batch_tokens, max_rows
        self.device = next(model.parameters()).device
        ends = end_tokens(model.generation_config.eos_token_id, model.name_or_path or None)
        self.eos = list(dict.fromkeys(end for end in [*ends, tokenizer.eos_token_id] if end is not None))
        # Padding is masked and what follows an end is cut off, so that any id will do where the tokenizer names none.
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else [*self.eos, 0][0]

    def batches(
        self, prompts: Sequence[str], max_new_tokens: int, stop: Stop, *, temperature=0.0, seed=0, skip: Collection[int] = ()
    ) -> Batches:
        """Generate, and yield the outputs batch by batch. ``temperature`` 0 is greedy. Sampling is the same again for the same
        prompts, seed and batch settings, and leaves the global random state as it was. Batches of nothing but prompts in
        ``skip`` are left out, and the others are what they would be without it: a killed sampling goes on to the same end."""
        if not self.eos and not stop.strings and stop.marker is None:
            raise bad_input("nothing could end an output: no eos token of the model or its tokenizer, and no stop string")
        ids = tokenize_starts(self.tokenizer, prompts, as_written=True)
        for number, batch in enumerate(self._batches(ids, max_new_tokens)):
            if not frozenset(skip).issuperset(batch):
                digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
                with self._generating(), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                    torch.manual_seed(int.from_bytes(digest[:7], "big"))
                    outputs = self._generate_batch([ids[i] for i in batch], max_new_tokens, stop, temperature)
                yield batch, outputs

    def cache_agrees(self, prompt: str, max_new_tokens: int) -> bool:
        """Whether the first greedy tokens after ``prompt`` have the same logits with the KV cache as without it, up to
        rounding: that what ``generate`` passes on from token to token reaches the model."""
        ids = tokenize_starts(self.tokenizer, [prompt], as_written=True)
        num = min(_CACHE_TOKENS, max_new_tokens)
        exactly = {"max_new_tokens": num, "min_new_tokens": num, "do_sample": False}
        report = {"output_logits": True, "return_dict_in_generate": True}
        with self._generating():
            made = [self._generate(ids, use_cache=use_cache, **exactly, **report) for use_cache in (True, False)]
        tokens = [one.sequences[0, len(ids[0]) :] for one in made]
        same = int((tokens[0] == tokens[1]).cumprod(0).sum())
        # Where a tie is broken another way the logits still agree; what follows it is another text.
        cached, plain = (torch.cat(one.logits)[: same + 1].float() for one in made)
        return bool((cached - plain).abs().max() <= _CACHE_TOLERANCE * plain.abs().max())

    def logps(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Sum of the log-probs (nats) of each completion's tokens after its prompt, without eos; the tokens are those that
        training makes of it (:func:`medtrain.trainer.data.tokenizer.continuations`)."""
        prompt_ids = tokenize_starts(self.tokenizer, prompts, as_written=True)
        completion_ids = continuations(self.tokenizer)(completions)
        if not all(prompt_ids) or not all(completion_ids):
            raise bad_input("a prompt or completion without tokens has no log-prob")
        rows = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        width, limit = max(map(len, rows), default=0), getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and width > limit:
            raise bad_input("prompt and answer do not fit the model", found=f"{width} tokens", expected=f"at most {limit}")
        sums = [0.0] * len(rows)
        with self._generating():
            for batch in self._batches(rows, 0):
                kept = max(len(completion_ids[i]) for i in batch)
                ids, mask = self._left_padded([rows[i] for i in batch])
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=kept + 1)
                logits = output.logits[:, -kept - 1 : -1].float()
                logps = (logits.gather(-1, ids[:, -kept:, None])[..., 0] - logits.logsumexp(-1)).cpu()
                for index, of_row in zip(batch, logps, strict=True):
                    sums[index] = float(of_row[-len(completion_ids[index]) :].double().sum())
        return sums

    def _batches(self, ids: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Indices by falling length, so that a batch holds little padding and memory runs out first or never."""
        batches: list[list[int]] = []
        most = 0
        for index in sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i)):
            if not batches or len(batches[-1]) == most:
                batches.append([])
                most = min(self.max_rows, max(1, self.batch_tokens // (len(ids[index]) + max_new_tokens)))
            batches[-1].append(index)
        return batches

    def _left_padded(self, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, ids))
        input_ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in ids], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.device)
        return input_ids, mask

    @contextmanager
    def _generating(self):
        """Evaluation mode without gradients, and without the sampling settings that the checkpoint came with."""
        was_training, config = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = GenerationConfig()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.model.generation_config = config
            self.model.train(was_training)

    def _generate(self, ids: list[list[int]], stopping_criteria=None, **settings: Any):
        input_ids, mask = self._left_padded(ids)
        config = GenerationConfig(eos_token_id=self.eos or None, pad_token_id=self.pad, **settings)
        return self.model.generate(input_ids, attention_mask=mask, generation_config=config, stopping_criteria=stopping_criteria)

    def _generate_batch(self, ids: list[list[int]], max_new_tokens: int, stop: Stop, temperature: float) -> list[Output]:
        width = max(map(len, ids))
        done = torch.zeros(len(ids), dtype=torch.bool, device=self.device)
        logged = time.monotonic()

        def ended(input_ids: torch.Tensor, scores=None, **kwargs) -> torch.Tensor:
            """transformers' stopping criterion: rows whose text has ended are done. Logs progress now and then."""
            nonlocal logged
            new = input_ids[:, width:]
            if new.shape[1] % _STEPS_BETWEEN_STOP_CHECKS != 0:
                return done
            if stop.strings or stop.marker is not None:
                left = [i for i, is_done in enumerate(done.tolist()) if not is_done]
                texts = self.decode([ids[i] for i in left], new[left].tolist())
                done[left] = torch.tensor([stop.cut(text)[1] for text in texts], dtype=torch.bool, device=self.device)
            if time.monotonic() - logged >= _SECONDS_BETWEEN_LINES:
                logged = time.monotonic()
                num = int((done | torch.isin(new, torch.tensor(self.eos, device=new.device)).any(1)).sum())
                log.info(f"{num} of {len(ids)} outputs of this batch have ended, after {new.shape[1]} tokens")
            return done

        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
        made = self._generate(ids, [ended], max_new_tokens=max_new_tokens, **sampling)
        outputs = []
        for prompt, row in zip(ids, made[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in self.eos), None)
            text, stopped = stop.cut(self.decode([prompt], [row[:end]])[0])
            outputs.append(Output(text, truncated=end is None and not stopped))
        return outputs

    def decode(self, prompts: list[list[int]], rows: list[list[int]]) -> list[str]:
        """Text of the new tokens as it follows the prompt: many tokenizers drop a blank that begins a text."""
        last = [prompt[-4:] for prompt in prompts]
        decode = functools.partial(self.tokenizer.batch_decode, clean_up_tokenization_spaces=False)
        texts = zip(decode(last), decode([a + b for a, b in zip(last, rows, strict=True)]), rows, strict=True)
        return [whole[len(before) :] if whole.startswith(before) else decode([row])[0] for before, whole, row in texts]


class VLLMEngine:
    """Generation with vLLM, where it is installed: all visible GPUs share the model by tensor parallelism."""

    def __init__(self, folder: Path, dtype: str):
        try:
            from vllm import LLM  # pyright: ignore[reportMissingImports]  (no dependency)
        except ImportError as error:
            raise bad_input("vllm is not installed here", field="engine", found=str(error), expected="hf") from error
        self.llm = LLM(model=str(folder), dtype=dtype, seed=0, tensor_parallel_size=max(1, torch.cuda.device_count()))
        # Prompts are handed over as ids of ours; what vLLM makes into text, stop strings among it, is its own reading.
        self.tokenizer = read_tokenizer(folder)
        if tokenize_texts(self.llm.get_tokenizer(), PROBES) != tokenize_texts(self.tokenizer, PROBES):
            raise bad_input("not the tokens that vLLM makes", file=folder / "tokenizer.json")

    def batches(
        self, prompts: Sequence[str], max_new_tokens: int, stop: Stop, *, temperature=0.0, seed=0, skip: Collection[int] = ()
    ) -> Batches:
        """As :meth:`HFEngine.batches`; each prompt has its own seed, so that equal prompts give different samples."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        ids = tokenize_starts(self.tokenizer, prompts, as_written=True)
        left = [i for i in range(len(ids)) if i not in skip]
        common = {"temperature": temperature, "max_tokens": max_new_tokens, "stop": list(stop.strings) or None}
        for portion in (left[first : first + _VLLM_PORTION] for first in range(0, len(left), _VLLM_PORTION)):
            settings = [SamplingParams(**common, seed=seed + i) for i in portion]
            requests = self.llm.generate([{"prompt_token_ids": ids[i]} for i in portion], settings)
            texts = [(*stop.cut(request.outputs[0].text), request.outputs[0].finish_reason) for request in requests]
            yield portion, [Output(text, reason == "length" and not stopped) for text, stopped, reason in texts]


def load_engine(folder: Path, settings: ExamSettings) -> HFEngine | VLLMEngine:
    """Load a checkpoint folder for generation; with transformers on the first GPU, where there is one. Raises
    :class:`InputError` for an unknown dtype, weights that do not load, an engine that is not installed."""
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype, None)
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise bad_input("unknown", field="dtype", found=settings.dtype, expected="auto, float32, bfloat16 or float16")
    if settings.engine == "vllm":
        return VLLMEngine(folder, settings.dtype)
    quiet_libraries()
    tokenizer = read_tokenizer(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False)
        nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:  # transformers and safetensors raise many kinds, and all mean the same to the user
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise bad_input("the checkpoint cannot be loaded", file=folder, found=first_line) from error
    return HFEngine(model, tokenizer, batch_tokens=settings.batch_tokens)
