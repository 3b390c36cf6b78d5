"""The code in docs/ runs as it stands and does what the text says."""

import math
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments

from medtrain.kernels.reference import reference_rpo_loss

DOCS = Path(__file__).parent.parent / "docs"


def code_of(name):
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.S):
        exec(compile(block, name, "exec"), namespace)
    return namespace


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config)


def batch():
    """Two pairs, padded on the right to 9 tokens; prompts of 3 and 2 tokens."""
    torch.manual_seed(1)
    lengths, prompts = torch.tensor([7, 9, 5, 6]), torch.tensor([3, 3, 2, 2])
    column = torch.arange(9)
    input_ids = torch.randint(50, (4, 9))
    mask = (column < lengths[:, None]).long()
    labels = input_ids.masked_fill((column < prompts[:, None]) | (mask == 0), -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def test_rpo_loss_in_another_trainer(model, tmp_path):
    code, rows = code_of("rpo_loss.md"), batch()
    rows["reference_logps"] = code["reference_logps"](model, **rows)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        max_steps=8,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        lr_scheduler_type="constant",
    )
    # One batch, over and over: the collator gives the same rows whatever it is asked for.
    trainer = code["RpoTrainer"](model, arguments, train_dataset=[{}] * 32, data_collator=lambda _: dict(rows))
    loss, stats = trainer.compute_loss(model, rows, return_outputs=True)

    # Against float64 from full logits, and at the start policy and reference are one: ln 2 + alpha * NLL.
    hidden = model.model(rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state[:, :-1]
    labels = rows["labels"][:, 1:]
    counted = labels != -100
    bounds = torch.nn.functional.pad(counted.sum(1).cumsum(0), (1, 0))
    wanted = reference_rpo_loss(
        hidden[counted], model.lm_head.weight, labels[counted], bounds, rows["reference_logps"], beta=0.1, alpha=1.0
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert loss.item() == pytest.approx(math.log(2) + stats["nll_loss"].item() / 2, rel=1e-6)

    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(loss.item(), rel=1e-3) and losses[-1] < 0.8 * losses[0]
