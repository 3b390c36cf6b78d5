"""Copies of the sharded model, weights kept whole and gathers ahead: the same curve and files, and each does what it says."""

import copy

import pytest
import torch
from helpers import SIZES, assert_same_curve, documents, read_metrics, run, run_on_ranks, stopped_after, without_timing
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from medtrain.trainer.config.settings import ModelConfig, ParallelConfig, config_from_dict
from medtrain.trainer.data.batch import windows_batch
from medtrain.trainer.distributed import join_world
from medtrain.trainer.errors import InputError
from medtrain.trainer.model.hf_config import load_model_config, load_tokenizer
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.weights.checkpoint import Saver
from medtrain.trainer.weights.load import init_weights

WIDE = SIZES | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
}


def with_heldout(tree, stage):
    tree["data"]["heldout"] = [{"path": tree["data"]["sources" if stage == "cpt" else "pairs"][0]["path"], "name": "h"}]
    return tree


def assert_same_export(a, b, tolerance=2e-4):
    a, b = (AutoModelForCausalLM.from_pretrained(folder / "model").state_dict() for folder in (a, b))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("stage", "tied", "parallel"),
    [
        ("rpo", True, {"replicate": 2, "prefetch": 2}),
        ("cpt", False, {"replicate": 4}),
        ("rpo", False, {"reshard_after_forward": False}),
        ("cpt", True, {"replicate": 2, "reshard_after_forward": False, "prefetch": 1}),
    ],
    ids=["copies-prefetch", "whole-copies", "whole-layers", "all"],
)
def test_four_ranks_give_the_curve_and_weights_of_one_process(stage, tied, parallel, request, tmp_path):
    tree = with_heldout(request.getfixturevalue(f"{stage}_tree"), stage)
    tree["model"]["init"]["tie_word_embeddings"] = tied
    tree["optim"] |= {"steps": 6, "grad_clip": 0.05}
    run(stage, tree, tmp_path / "one")
    assert min(row["grad_norm"] for row in read_metrics(tmp_path / "one")[1:]) > 0.05  # so that clipping is at work
    tree["parallel"] = parallel
    run_on_ranks(4, tmp_path, run, stage, tree, tmp_path / "four")
    assert_same_curve(tmp_path / "one", tmp_path / "four")
    assert_same_export(tmp_path / "one", tmp_path / "four")


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"optim": {"state": "8bit"}, "precision": {"compute": "bfloat16", "weights": "bf16"}}, 2e-3),
        ({"precision": {"fp8": "rowwise", "fp8_emulate": True, "fp8_check_every": 4}}, 2e-2),
        ({"lora": {"rank": 4, "base": "nf4"}, "model": {"activation_checkpointing": "selective"}}, 1e-5),
    ],
    ids=["8bit-bf16", "fp8", "qlora-checkpointing"],
)
def test_copies_train_whatever_else_is_trained(changes, tolerance, cpt_tree, tmp_path):
    cpt_tree["model"]["init"] = dict(WIDE)
    cpt_tree["optim"]["lr"] = 2e-3
    for section, values in changes.items():
        cpt_tree.setdefault(section, {}).update(values)
    run("cpt", cpt_tree, tmp_path / "one")
    cpt_tree["parallel"] = {"replicate": 2}
    run_on_ranks(4, tmp_path, run, "cpt", cpt_tree, tmp_path / "four")
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "four"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)


@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_a_run_moves_between_copies_shards_and_one_process(state, cpt_tree, tmp_path):
    cpt_tree["model"]["init"] = dict(WIDE)
    cpt_tree["optim"] |= {"lr": 2e-3, "steps": 8, "state": state}
    run("cpt", cpt_tree, tmp_path / "whole")
    copies = copy.deepcopy(cpt_tree) | {"parallel": {"replicate": 2}}
    run_on_ranks(4, tmp_path, stopped_after, 2, "cpt", copies, tmp_path / "moved")
    run_on_ranks(2, tmp_path, stopped_after, 4, "cpt", cpt_tree, tmp_path / "moved")
    run_on_ranks(4, tmp_path, stopped_after, 6, "cpt", copies, tmp_path / "moved")
    run("cpt", cpt_tree, tmp_path / "moved")
    assert_same_curve(tmp_path / "whole", tmp_path / "moved", tolerance=1e-5 if state == "fp32" else 1e-4)


def _killed_and_started_again(tree, out, at_step):
    commit = Saver.commit

    def dying(self):
        step = self._begun[0]
        commit(self)
        if step == at_step:
            raise KeyboardInterrupt

    Saver.commit = dying
    with pytest.raises(KeyboardInterrupt):
        run("cpt", tree, out)
    Saver.commit = commit
    run("cpt", tree, out)


def test_copies_started_again_repeat_every_bit(cpt_tree, tmp_path):
    cpt_tree |= {"parallel": {"replicate": 2, "prefetch": 1}, "checkpoint": {"every": 2}}
    run_on_ranks(4, tmp_path, run, "cpt", cpt_tree, tmp_path / "whole")
    run_on_ranks(4, tmp_path, _killed_and_started_again, cpt_tree, tmp_path / "killed", 4)
    assert without_timing(read_metrics(tmp_path / "whole")) == without_timing(read_metrics(tmp_path / "killed"))


def policy_of(parallel, world, tokenizer_dir, **sizes):
    settings = ModelConfig(init={**SIZES, "num_hidden_layers": 4, **sizes}, tokenizer=str(tokenizer_dir))
    hf_config = load_model_config(settings, load_tokenizer(settings))
    policy = build_model(settings, hf_config, world, torch.float32, backend="sdpa", parallel=ParallelConfig(**parallel))
    init_weights(policy, 0)
    return policy


def _copies_hold_halves(tokenizer_dir):
    with join_world(replicate=2) as world:
        assert world.replicas == 2
        weight = policy_of({"replicate": 2}, world, tokenizer_dir).model.layers[0].mlp.up_proj.weight
        assert weight.to_local().shape[0] == weight.shape[0] // 2
        # Ranks 0 and 1 are the first copy, 2 and 3 the second.
        parts = [torch.empty_like(weight.to_local().data) for _ in range(4)]
        torch.distributed.all_gather(parts, weight.to_local().data)
        assert torch.equal(parts[0], parts[2]) and torch.equal(parts[1], parts[3])
        assert torch.equal(torch.cat(parts[:2]), weight.full_tensor())


def test_a_copy_is_sharded_over_neighbouring_ranks(tokenizer_dir, tmp_path):
    run_on_ranks(4, tmp_path, _copies_hold_halves, tokenizer_dir)


def _whole_layers(tokenizer_dir):
    with join_world() as world:
        for reshard in (True, False):
            policy = policy_of({"reshard_after_forward": reshard}, world, tokenizer_dir)
            weight = lambda policy=policy: policy.model.layers[1].mlp.up_proj.weight  # noqa: E731
            assert isinstance(weight(), DTensor)
            logps = policy(windows_batch(documents()))
            assert isinstance(weight(), DTensor) == reshard
            assert isinstance(policy.lm_head.weight, DTensor)
            logps.sum().backward()
            assert isinstance(weight(), DTensor) and isinstance(weight().grad, DTensor)


def test_layers_stay_whole_between_forward_and_backward_only_where_asked(tokenizer_dir, tmp_path):
    run_on_ranks(2, tmp_path, _whole_layers, tokenizer_dir)


def _gathered_ahead(tokenizer_dir, num_ahead, tied):
    with join_world() as world:
        policy = policy_of({"prefetch": num_ahead}, world, tokenizer_dir, tie_word_embeddings=tied)
        units = [*policy.model.layers, policy.lm_head]

        def on_their_way():
            groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
            return [i for i, group in enumerate(groups) if group._all_gather_result is not None]

        seen = {"forward": [], "backward": []}
        policy.model.layers[1].mlp.register_forward_pre_hook(lambda *_: seen["forward"].append(on_their_way()))
        policy.model.layers[3].mlp.register_full_backward_hook(lambda *_: seen["backward"].append(on_their_way()))
        policy(windows_batch(documents())).sum().backward()
        # FSDP2's own order has none on its way in the forward, and one in the backward.
        assert seen["forward"] == [list(range(2, 2 + num_ahead))] if num_ahead else seen["forward"] == [[]]
        assert seen["backward"] == [list(range(3 - max(num_ahead, 1), 3))]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("num_ahead", [0, 1, 2])
def test_so_many_layers_are_gathered_ahead(num_ahead, tied, tokenizer_dir, tmp_path):
    run_on_ranks(2, tmp_path, _gathered_ahead, tokenizer_dir, num_ahead, tied)


def _refused(tree, out):
    with pytest.raises(InputError, match=r"parallel\.replicate.*does not divide.*found 2; expected a divisor of 3"):
        run("cpt", tree, out)


def test_copies_that_do_not_divide_the_ranks_are_refused(cpt_tree, tmp_path):
    cpt_tree["parallel"] = {"replicate": 2}
    run_on_ranks(3, tmp_path, _refused, cpt_tree, tmp_path / "run")
    with pytest.raises(InputError, match="a divisor of 1"):
        run("cpt", cpt_tree, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"replicate": 0}}, "parallel.replicate.*expected 1 or more"),
        ({"parallel": {"prefetch": -1}}, "parallel.prefetch.*expected 0 or more"),
        ({"parallel": {"replicate": 2}, "precision": {"fp8": "tensorwise", "fp8_all_gather": True}}, "fp8_all_gather"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message, cpt_tree):
    with pytest.raises(InputError, match=message):
        config_from_dict("cpt", cpt_tree | changes)


def test_settings_without_effect_on_one_rank_are_told(cpt_tree, tmp_path, capsys):
    from medtrain.trainer.train.setup import check

    cpt_tree["parallel"] = {"prefetch": 2, "reshard_after_forward": False}
    check(config_from_dict("cpt", cpt_tree))
    told = capsys.readouterr().err
    assert "parallel.prefetch has no effect on one rank" in told
    assert "parallel.reshard_after_forward has no effect on one rank" in told
