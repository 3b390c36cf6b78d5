"""The policy gives Hugging Face's own log-probabilities, and loads and exports Hugging Face's own weights."""

import json
import subprocess

import pytest
import torch
from helpers import SIZES, documents, hf_logps, run_on_ranks
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from medtrain.trainer.config.settings import ModelConfig
from medtrain.trainer.data.batch import windows_batch
from medtrain.trainer.distributed import World, join_world
from medtrain.trainer.errors import InputError
from medtrain.trainer.model.hf_config import load_model_config, load_tokenizer, parameter_shapes
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.weights import safetensors
from medtrain.trainer.weights.export import export_model
from medtrain.trainer.weights.load import Checkpoint, init_weights, load_weights

ALONE = World(0, 1, torch.device("cpu"), None)


def policy_of(settings: ModelConfig, world: World = ALONE):
    tokenizer = load_tokenizer(settings)
    policy = build_model(settings, load_model_config(settings, tokenizer), world, torch.float32, backend="sdpa")
    return policy, tokenizer


@pytest.fixture
def hf_folder(tokenizer_dir, tmp_path):
    def make(model_type="qwen2", tied=False, **sizes):
        torch.manual_seed(0)
        sizes = {**SIZES, "vocab_size": 24, "tie_word_embeddings": tied, **sizes, "model_type": model_type}
        if model_type == "mistral":
            sizes["sliding_window"] = None
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
        folder = tmp_path / f"{model_type}-{tied}"
        model.save_pretrained(folder)
        load_tokenizer(ModelConfig(tokenizer=str(tokenizer_dir))).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_logps_of_packed_documents_equal_hugging_face_on_each_alone(hf_folder, model_type, tied):
    folder = hf_folder(model_type, tied)
    policy, _ = policy_of(ModelConfig(path=str(folder)))
    load_weights(policy, Checkpoint(folder))
    theirs = hf_logps(AutoModelForCausalLM.from_pretrained(folder), documents())
    torch.testing.assert_close(policy(windows_batch(documents())), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_export_is_the_loaded_weights_bit_for_bit(hf_folder, tmp_path, tied):
    folder = hf_folder(tied=tied)
    policy, tokenizer = policy_of(ModelConfig(path=str(folder)))
    load_weights(policy, Checkpoint(folder))
    out = export_model(policy, tokenizer, tmp_path / "out", ALONE, dtype=torch.float32, source=folder)
    a, b = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder, out))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]


def test_export_in_several_files_loads_the_same(hf_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("medtrain.trainer.weights.export.MAX_FILE_BYTES", 4000)
    folder = hf_folder()
    policy, tokenizer = policy_of(ModelConfig(path=str(folder)))
    load_weights(policy, Checkpoint(folder))
    out = export_model(policy, tokenizer, tmp_path / "out", ALONE, dtype=torch.float32)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    a, b = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder, out))
    assert all(torch.equal(a[name], b[name]) for name in a)
    again, _ = policy_of(ModelConfig(path=str(out)))
    load_weights(again, Checkpoint(out))
    assert torch.equal(again.lm_head.weight, policy.lm_head.weight)


def test_exported_weights_carry_their_sha256_and_are_refused_when_they_differ(hf_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("medtrain.trainer.weights.export.MAX_FILE_BYTES", 4000)
    monkeypatch.setattr("medtrain.trainer.weights.safetensors.BLOCK_BYTES", 100)
    folder = hf_folder()
    policy, tokenizer = policy_of(ModelConfig(path=str(folder)))
    load_weights(policy, Checkpoint(folder))
    out = export_model(policy, tokenizer, tmp_path / "out", ALONE, dtype=torch.bfloat16)
    checked = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out, capture_output=True, text=True)
    files = sorted(out.glob("*.safetensors"))
    assert checked.returncode == 0 and checked.stdout.count(": OK") == len(files) > 2
    digest = Checkpoint(out).digest()
    loaded = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert all(torch.equal(loaded[name], p.bfloat16()) for name, p in policy.named_parameters())
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    with pytest.raises(InputError, match=rf"{files[1].name}: damaged or changed .*SHA256SUMS"):
        Checkpoint(out).digest()
    (out / "SHA256SUMS").unlink()
    assert Checkpoint(out).digest() != digest


def _spoiled_on_the_way(folder, out):
    sync = safetensors.sync

    def spoiling(path):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)

    safetensors.sync = spoiling
    try:
        with join_world() as world:
            policy, tokenizer = policy_of(ModelConfig(path=str(folder)), world)
            load_weights(policy, Checkpoint(folder))
            with pytest.raises(RuntimeError, match=r"model\.safetensors: what was read back is not what was written"):
                export_model(policy, tokenizer, out, world, dtype=torch.float32)
    finally:
        safetensors.sync = sync


def test_an_export_that_reads_back_otherwise_leaves_no_folder(hf_folder, tmp_path):
    run_on_ranks(2, tmp_path, _spoiled_on_the_way, hf_folder(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _sharded_equals_whole(folder, out):
    with join_world() as world:
        policy, tokenizer = policy_of(ModelConfig(path=str(folder)), world)
        load_weights(policy, Checkpoint(folder))
        theirs = hf_logps(AutoModelForCausalLM.from_pretrained(folder), documents())
        torch.testing.assert_close(policy(windows_batch(documents())), theirs, rtol=0, atol=1e-5)
        export_model(policy, tokenizer, out, world, dtype=torch.float32)
        whole, _ = policy_of(ModelConfig(path=str(folder)))
        init_weights(whole, 5)
        init_weights(policy, 5)
        for a, b in zip(policy.parameters(), whole.parameters(), strict=True):
            assert torch.equal(a.full_tensor(), b)


@pytest.mark.parametrize("tied", [False, True])
def test_on_two_ranks_shards_load_compute_export_and_init_as_the_whole(hf_folder, tmp_path, tied):
    folder = hf_folder(tied=tied)
    run_on_ranks(2, tmp_path, _sharded_equals_whole, folder, tmp_path / "out")
    a, b = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder, tmp_path / "out"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_activation_checkpointing_changes_no_gradient(hf_folder):
    folder = hf_folder()
    gradients = []
    for choice in ("none", "full"):
        policy, _ = policy_of(ModelConfig(path=str(folder), activation_checkpointing=choice))
        load_weights(policy, Checkpoint(folder))
        policy(windows_batch(documents())).sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_generation_settings_that_transformers_would_not_save_are_kept(hf_folder, tmp_path):
    folder = hf_folder()
    settings = {"do_sample": False, "temperature": 0.7, "num_return_sequences": 2, "eos_token_id": 7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    policy, tokenizer = policy_of(ModelConfig(path=str(folder)))
    out = export_model(policy, tokenizer, tmp_path / "out", ALONE, dtype=torch.float32, source=folder)
    assert json.loads((out / "generation_config.json").read_text()) == settings | {"eos_token_id": [1, 7]}


def test_quantized_weights_are_refused(hf_folder):
    from safetensors.torch import save_file

    folder = hf_folder()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="'lm_head.weight': quantized"):
        Checkpoint(folder).check({"lm_head.weight": (24, 16)}, tied=False)


def test_a_truncated_file_is_named_before_anything_is_built(hf_folder):
    folder = hf_folder()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: damaged or truncated"):
        Checkpoint(folder)


def test_a_missing_or_misshapen_tensor_is_named(hf_folder):
    checkpoint = Checkpoint(hf_folder())
    with pytest.raises(InputError, match="'model.other': missing tensor"):
        checkpoint.check({"model.other": (3,)}, tied=False)
    with pytest.raises(InputError, match="'lm_head.weight': wrong shape"):
        checkpoint.check({"lm_head.weight": (3,)}, tied=False)


def test_a_tokenizer_that_does_not_fit_the_weights_is_refused(hf_folder, tokenizer_dir, tmp_path):
    small = hf_folder(vocab_size=10)
    with pytest.raises(InputError, match="tokenizer does not fit"):
        policy_of(ModelConfig(path=str(small)))
    folder = hf_folder(tied=True)
    other = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    vocab = other["model"]["vocab"]
    vocab["咳"], vocab["患者"] = vocab["患者"], vocab["咳"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    (tmp_path / "other" / "tokenizer_config.json").write_text((tokenizer_dir / "tokenizer_config.json").read_text())
    with pytest.raises(InputError, match="tokenizer does not fit"):
        policy_of(ModelConfig(path=str(folder), tokenizer=str(tmp_path / "other")))


def test_sizes_of_random_weights_are_checked(tokenizer_dir):
    for change, message in (
        ({"hiden_size": 4}, "hidden_size"),
        ({"model_type": "gpt2"}, "qwen2"),
        ({"num_attention_heads": 3}, "fit together"),
        ({"vocab_size": 4}, "tokenizer does not fit"),
    ):
        with pytest.raises(InputError, match=message):
            policy_of(ModelConfig(init={**SIZES, **change}, tokenizer=str(tokenizer_dir)))


@pytest.mark.parametrize(
    "size", ["hidden_size=0", "hidden_size=-32", "num_attention_heads=0", "num_hidden_layers=0", "vocab_size=0"]
)
def test_a_size_below_one_is_refused(size, tokenizer_dir):
    name, _, value = size.partition("=")
    sizes = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    } | {name: int(value)}
    config = ModelConfig(init=sizes, tokenizer=str(tokenizer_dir))
    with pytest.raises(InputError, match=name):
        load_model_config(config, load_tokenizer(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "foo"}, "builds no model from this config .*KeyError: 'foo'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "builds no model from this config"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "config.json: sizes that do not fit together .*4 heads of 4"),
        ({"head_dim": 1}, "config.json: sizes that do not fit together .*2 heads of 1"),
        ({"hidden_size": 18, "num_key_value_heads": 2}, "config.json: sizes that do not fit together .*2 heads of 9"),
        ({"rms_norm_eps": "x"}, "config.json: unreadable config .*rms_norm_eps"),
    ],
)
def test_a_config_of_which_there_is_no_model_is_one_line(hf_folder, change, message):
    folder = hf_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message) as caught:
        parameter_shapes(load_model_config(ModelConfig(path=str(folder)), None))
    assert "\n" not in str(caught.value)
