"""The same loss and gradients as TRL's DPOTrainer and Liger's DPO loss, on the same tiny model and pairs."""

import json

import pytest
import torch
from helpers import SIZES, made_up_text, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM

from medtrain.kernels.preference import preference_loss, sum_by_sequence
from medtrain.trainer.config.settings import ModelConfig
from medtrain.trainer.config.source import Source
from medtrain.trainer.data.batch import pair_batch
from medtrain.trainer.data.pairs import load_pairs
from medtrain.trainer.distributed import World
from medtrain.trainer.model.hf_config import load_model_config, load_tokenizer
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.weights.load import Checkpoint, load_weights

ALONE = World(0, 1, torch.device("cpu"), None)
ALPHA = 0.7


@pytest.fixture
def setting(tokenizer_dir, tmp_path):
    """(policy folder, reference folder, rows, pairs); 8 pairs of ragged lengths, four of them of one prompt."""
    tokenizer = load_tokenizer(ModelConfig(tokenizer=str(tokenizer_dir)))
    folders = []
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, vocab_size=24, tie_word_embeddings=False))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    rows = [
        {
            # TRL tokenises prompt and completion in one piece: the blank keeps their words apart.
            "prompt": made_up_text(min(k, 4), 4 + min(k, 4)) + " ",
            "chosen": made_up_text(50 + k, 2 + k),
            "rejected": made_up_text(90 + k, 9 - k),
        }
        for k in range(8)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return *folders, rows, load_pairs(Source(str(path)), tokenizer, max_length=64)


def policy_of(folder):
    settings = ModelConfig(path=str(folder))
    config = load_model_config(settings, load_tokenizer(settings))
    policy = build_model(settings, config, ALONE, torch.float32, backend="sdpa")
    load_weights(policy, Checkpoint(folder))
    return policy


def side_logps(folder_or_policy, pairs):
    policy = folder_or_policy if isinstance(folder_or_policy, torch.nn.Module) else policy_of(folder_or_policy)
    batch = pair_batch([pairs], [(0, i) for i in range(pairs.num_pairs)])
    lengths = batch.target_cu_seqlens.diff()[batch.sides]
    return sum_by_sequence(policy(batch), batch.target_cu_seqlens)[batch.sides], lengths


def ours(policy_folder, reference_folder, pairs, **options):
    """(loss, gradients by Hugging Face name)"""
    policy = policy_of(policy_folder)
    with torch.no_grad():
        reference, _ = side_logps(reference_folder, pairs)
    sums, lengths = side_logps(policy, pairs)
    loss, _ = preference_loss(sums, lengths, reference, nll_norm="token", **options)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in policy.named_parameters()}


def assert_same(ours, theirs):
    (loss, gradients), (their_loss, their_gradients) = ours, theirs
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert gradients.keys() == their_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in their_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-5 * largest, msg=name)


TRL_LOSSES = [
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, ALPHA]}, {"alpha": ALPHA}),
    ({"loss_type": ["sigmoid"]}, {"alpha": 0.0}),
    ({"loss_type": ["ipo"]}, {"alpha": 0.0, "loss": "ipo"}),
    ({"loss_type": ["hinge"]}, {"alpha": 0.0, "loss": "hinge"}),
    (
        {"loss_type": ["robust", "sft"], "loss_weights": [1.0, ALPHA], "label_smoothing": 0.2},
        {"alpha": ALPHA, "loss": "robust", "label_smoothing": 0.2},
    ),
]


@pytest.mark.parametrize(("theirs", "mine"), TRL_LOSSES, ids=["-".join(t["loss_type"]) for t, _ in TRL_LOSSES])
def test_trl_dpo_trainer_has_the_same_loss_and_gradients(setting, tmp_path, theirs, mine):
    """Through its own tokenisation and collation: so the tokens that count are the same too."""
    trl = pytest.importorskip("trl", reason="TRL is not installed (the extra 'bench')")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (the extra 'bench')")
    policy_folder, reference_folder, rows, pairs = setting
    tokenizer = load_tokenizer(ModelConfig(path=str(policy_folder)))
    tokenizer.pad_token = tokenizer.unk_token
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=len(rows),
        use_cpu=True,
        report_to=[],
        beta=0.3,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        **theirs,
    )
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(reference_folder, dtype=torch.float32),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert_same(ours(policy_folder, reference_folder, pairs, beta=0.3, **mine), (loss.item(), gradients))


LIGER_LOSSES = [{"loss_type": "sigmoid"}, {"loss_type": "hinge"}, {"loss_type": "robust", "label_smoothing": 0.2}]


@pytest.mark.parametrize("theirs", LIGER_LOSSES, ids=lambda options: options["loss_type"])
def test_liger_dpo_loss_has_the_same_loss_and_gradients(setting, theirs):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is not installed (the extra 'bench')")
    policy_folder, reference_folder, _, pairs = setting
    sides = [(pairs.prompt(i), (pairs.chosen, pairs.rejected)[side](i)) for side in (0, 1) for i in range(pairs.num_pairs)]
    longest = max(len(prompt) + len(completion) for prompt, completion in sides) - 1
    ids = torch.zeros(len(sides), longest, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    for k, (prompt, completion) in enumerate(sides):
        whole = torch.tensor([*prompt.tolist(), *completion.tolist()])
        ids[k, : len(whole) - 1] = whole[:-1]  # padding at the end: out of sight of what counts
        targets[k, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
    model, reference = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in setting[:2])
    loss_of = chunked_loss.LigerFusedLinearDPOLoss(
        beta=0.3, alpha=ALPHA, compute_nll_loss=True, compiled=False, use_ref_model=True, **theirs
    )
    with torch.no_grad():
        reference_hidden = reference.model(input_ids=ids).last_hidden_state
    loss, _ = loss_of(
        model.lm_head.weight,
        model.model(input_ids=ids).last_hidden_state,
        targets,
        ref_input=reference_hidden,
        ref_weight=reference.lm_head.weight.detach(),
    )
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    options = {"loss": theirs["loss_type"], "label_smoothing": theirs.get("label_smoothing", 0.0)}
    assert_same(ours(policy_folder, reference_folder, pairs, beta=0.3, alpha=ALPHA, **options), (loss.item(), gradients))


def test_the_pairs_of_this_comparison_are_no_trivial_ones(setting):
    policy_folder, reference_folder, rows, pairs = setting
    with torch.no_grad():
        policy, lengths = side_logps(policy_folder, pairs)
        reference, _ = side_logps(reference_folder, pairs)
    assert float((policy - reference).abs().min()) > 1e-2 and len(set(lengths.tolist())) > 4
    assert len({json.dumps(row["prompt"]) for row in rows}) == 5
