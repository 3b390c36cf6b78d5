"""Which file holds the weights: those that transformers reads, or one line that says why there is no answer."""

import json
import os
import shutil

import pytest
import torch
from helpers import SIZES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from medtrain.trainer.config.settings import ModelConfig, config_from_dict
from medtrain.trainer.distributed import World
from medtrain.trainer.errors import InputError
from medtrain.trainer.model.hf_config import load_model_config, load_tokenizer, parameter_shapes
from medtrain.trainer.train.setup import prepare
from medtrain.trainer.weights import safetensors
from medtrain.trainer.weights.load import INDEX, SINGLE, Checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, vocab_size=24)).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def sharded(folder):
    """Two files and their index: the head and all else."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    save(folder / SHARDS[0], {name: t for name, t in tensors.items() if name != HEAD})
    save(folder / SHARDS[1], {HEAD: tensors[HEAD]})
    write_index(folder, {name: SHARDS[name == HEAD] for name in tensors})
    return folder


def save(path, tensors):
    save_file(tensors, path, {"format": "pt"})


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_map(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def checked(folder, tied=False):
    checkpoint = Checkpoint(folder)
    checkpoint.check(parameter_shapes(load_model_config(ModelConfig(path=str(folder)), None)), tied=tied)
    return checkpoint


def tensors_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def as_transformers(folder):
    checkpoint, theirs = checked(folder), tensors_of(folder)
    assert checkpoint.tensors.keys() == theirs.keys()
    return all(torch.equal(load_file(stored.file)[name], theirs[name]) for name, stored in checkpoint.tensors.items())


def test_the_files_are_those_that_transformers_reads(sharded, tmp_path):
    save(sharded / "consolidated.safetensors", {HEAD: torch.zeros(24, 16)})  # as Mistral's: the index does not name it
    save(sharded / "extra.safetensors", {EMBEDDING: torch.zeros(24, 16)})
    assert as_transformers(sharded)
    whole = tmp_path / "whole"
    shutil.copytree(sharded, whole, ignore=shutil.ignore_patterns("model*"))
    AutoModelForCausalLM.from_pretrained(sharded).save_pretrained(whole)
    for name in ("consolidated", "extra"):
        (whole / f"{name}.safetensors").unlink()
    save(whole / "vision.safetensors", {"tower.weight": torch.zeros(3)})
    assert as_transformers(whole) and Checkpoint(whole).files == [whole / SINGLE]


def test_a_download_cache_of_links_is_read(sharded, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), sharded))
    assert as_transformers(sharded)
    (sharded / SHARDS[1]).resolve().unlink()
    with pytest.raises(InputError, match=rf"{SHARDS[1]}: missing .*as {INDEX} says"):
        Checkpoint(sharded)
    (sharded / INDEX).resolve().unlink()
    with pytest.raises(InputError, match=rf"{INDEX}: unreadable index"):
        Checkpoint(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(InputError, match=rf"{SHARDS[1]}: missing .*dead link"):
        Checkpoint(sharded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [SHARDS[0], "consolidated.safetensors", "model.fp16.safetensors"])
def test_a_tensor_in_two_files_is_refused(folder, name, dtype):
    save(folder / name, {HEAD: torch.zeros(24, 16, dtype=dtype)})
    with pytest.raises(InputError, match=rf"hf: field '{HEAD}': a tensor in two files .*{name}"):
        Checkpoint(folder)


def test_a_tensor_in_two_files_of_an_index_is_refused(sharded):
    save(sharded / SHARDS[1], {HEAD: torch.zeros(24, 16), EMBEDDING: torch.zeros(24, 16)})
    with pytest.raises(InputError, match=rf"field '{EMBEDDING}': a tensor in two files .*{SHARDS[0]} and {SHARDS[1]}"):
        Checkpoint(sharded)


def test_an_index_beside_another_whole_file_is_refused(sharded):
    save(sharded / SINGLE, {HEAD: torch.zeros(24, 16)})
    with pytest.raises(InputError, match="two sets of weights .*which transformers reads"):
        Checkpoint(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(InputError, match="in two files"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({HEAD: "model-00003-of-00002.safetensors"}, "model-00003-of-00002.safetensors: missing"),
        ({HEAD: "/etc/hosts"}, "a file outside the folder .*/etc/hosts"),
        ({HEAD: "../other/model.safetensors"}, r"a file outside the folder .*\.\./other"),
        ({HEAD: "shards/../../model.safetensors"}, "a file outside the folder"),
        ({EMBEDDING: SHARDS[1]}, rf"'{EMBEDDING}': the index is not of these .*{SHARDS[1]}; expected {SHARDS[0]}"),
        ({HEAD: SHARDS[0]}, rf"'{HEAD}': the index is not of these files .*{SHARDS[0]}; expected a file that holds it"),
        ({"model.other": SHARDS[0]}, "'model.other': the index is not of these files .*a file that holds it"),
        ({HEAD: None}, "'weight_map': unreadable index"),
        ({HEAD: [SHARDS[1]]}, "'weight_map': unreadable index"),
        ({HEAD: ""}, "hf: damaged or truncated"),
    ],
)
def test_an_index_that_is_not_of_the_files_is_refused(sharded, change, message):
    write_index(sharded, weight_map(sharded) | change)
    with pytest.raises(InputError, match=message):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["{}", "[]", "3", "{", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": 3}'])
def test_an_index_that_says_nothing_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(InputError, match=rf"{INDEX}.* unreadable index"):
        Checkpoint(sharded)


def test_a_tied_head_is_the_embedding_to_the_last_bit(folder, monkeypatch):
    tensors = load_file(folder / SINGLE)
    with pytest.raises(InputError, match=rf"'{HEAD}': another head than the embedding, .*tie_word_embeddings: false"):
        checked(folder, tied=True)
    monkeypatch.setattr(safetensors, "BLOCK_BYTES", 5 * 16 * 4)  # 24 rows: four blocks of 5 and one of 4
    save(folder / SINGLE, tensors | {HEAD: tensors[EMBEDDING].clone()})
    checked(folder, tied=True)
    last_bit = tensors[EMBEDDING].clone()
    last_bit[-1, -1] *= 1 + 2**-20
    for other in (last_bit, tensors[EMBEDDING].bfloat16(), tensors[EMBEDDING][:20].clone()):
        save(folder / SINGLE, tensors | {HEAD: other})
        with pytest.raises(InputError, match=rf"{SINGLE}: field '{HEAD}': another head"):
            checked(folder, tied=True)
    save(folder / SINGLE, {name: t for name, t in tensors.items() if name != HEAD})
    checked(folder, tied=True)
    with pytest.raises(InputError, match=rf"'{HEAD}': missing tensor .*or tie_word_embeddings: true"):
        checked(folder)


def test_other_formats_and_adapters_are_named(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no weights here \(found pytorch_model\.bin; expected \*\.safetensors, as"):
        Checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(InputError, match=r"'transformers_weights': another name .*other\.safetensors"):
        load_model_config(ModelConfig(path=str(folder)), None)
    (folder / "adapter_config.json").write_text("{}")
    for unlinked in ((), ("config.json", "pytorch_model.bin")):  # beside a model, and alone
        for name in unlinked:
            (folder / name).unlink()
        with pytest.raises(InputError, match=r"adapter_config\.json: an adapter is no model .*lora\.path"):
            load_model_config(ModelConfig(path=str(folder)), None)


@pytest.mark.parametrize("proof", ["auto", "tensors", "none"])
def test_a_run_is_refused_before_anything_is_built_whatever_is_proved(folder, cpt_tree, tokenizer_dir, proof):
    load_tokenizer(ModelConfig(tokenizer=str(tokenizer_dir))).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    del cpt_tree["model"]["init"]
    cpt_tree["model"] |= {"path": str(folder), "proof": proof}
    cpt_tree["data"]["sources"] = [{"path": "not-looked-at.jsonl"}]
    cpt_tree["run"]["out"] = str(folder.parent / "run")
    with pytest.raises(InputError, match="another head than the embedding"):
        prepare(config_from_dict("cpt", cpt_tree), World(0, 1, torch.device("cpu"), None))
    assert not (folder.parent / "run").exists()
