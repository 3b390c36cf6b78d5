"""What an export holds beside its weights: as the source has it, read by everybody, rehearsed, and kept by the run."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import SIZES, run, run_on_ranks
from safetensors.torch import load_file
from tokenizer_kinds import byte_level
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from medtrain.trainer.config.settings import ModelConfig, config_from_dict
from medtrain.trainer.data.tokenizer import PROBES, read_tokenizer
from medtrain.trainer.errors import InputError
from medtrain.trainer.model.hf_config import load_model_config, load_tokenizer
from medtrain.trainer.run.export import export_run
from medtrain.trainer.train import loop
from medtrain.trainer.train import setup as prepare
from medtrain.trainer.train.setup import check
from medtrain.trainer.weights.small_files import generation_config, rehearse, write_small_files

TEMPLATES = [{"name": "default", "template": "{{ messages[0]['content'] }}"}, {"name": "tools", "template": "tools"}]


@pytest.fixture
def base(tokenizer_dir, tmp_path):
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes)).save_pretrained(tmp_path / "base")
    shutil.copytree(tokenizer_dir, tmp_path / "base", dirs_exist_ok=True)
    return tmp_path / "base"


def change(file, **content):
    """Change keys of a JSON file, made where it is not there; a key that becomes None is taken out."""
    changed = (json.loads(file.read_text()) if file.is_file() else {}) | content
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def written(folder, tmp_path, **settings):
    model = ModelConfig(path=str(folder), **settings)
    tokenizer = load_tokenizer(model)
    (tmp_path / "out").mkdir()
    write_small_files(tmp_path / "out", load_model_config(model, tokenizer), tokenizer, dtype=torch.bfloat16, source=folder)
    return tmp_path / "out"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("scaling", [None, YARN])
@pytest.mark.parametrize("form", ["old", "new"])
def test_the_config_has_both_forms_of_the_rope_and_the_dtype(base, tmp_path, scaling, form):
    rope = {"rope_type": "default"} | (scaling or {}) | {"rope_theta": 5e5}
    old = {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": scaling}
    change(base / "config.json", **(old if form == "old" else {"rope_parameters": rope}))
    config = json.loads((written(base, tmp_path) / "config.json").read_text())
    assert config["rope_parameters"] == rope
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, scaling)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["architectures"] == ["Qwen2ForCausalLM"]


def test_other_settings_of_the_config_are_kept_and_code_that_does_not_come_along_is_not_named(base, tmp_path):
    change(base / "config.json", temperature=0.7, my_note="x", auto_map={"AutoConfig": "code.Config"})
    change(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    out = written(base, tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert (config["temperature"], config["my_note"], config.get("auto_map")) == (0.7, "x", None)
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())


def test_generation_settings_of_an_old_config_are_the_export_s_where_it_has_no_others(base):
    tokenizer = read_tokenizer(base)
    (base / "generation_config.json").unlink()
    change(base / "config.json", temperature=0.7, eos_token_id=[4], use_cache=False)
    assert generation_config(tokenizer, base) == {"eos_token_id": [1, 4], "pad_token_id": 1, "temperature": 0.7}
    change(base / "generation_config.json", top_p=0.5)
    assert generation_config(tokenizer, base) == {"eos_token_id": [1], "top_p": 0.5}
    assert generation_config(tokenizer, None) == {"eos_token_id": 1, "pad_token_id": 1}


def test_an_unchanged_tokenizer_is_copied_byte_for_byte(base, tmp_path):
    change(base / "config.json", model_type="llama")  # AutoTokenizer would make another one of it in a qwen2 folder
    change(base / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", chat_template=TEMPLATES)
    change(base / "special_tokens_map.json", eos_token={"content": "</s>", "lstrip": False})
    (base / "vocab.json").write_text("{}")
    out = written(base, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_a_changed_end_token_is_in_every_file_that_names_it(base, tmp_path):
    change(base / "special_tokens_map.json", eos_token={"content": "</s>", "lstrip": False}, unk_token="<unk>")
    out = written(base, tmp_path, eos_token="<unk>")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((out / name).read_text())
        assert (content["eos_token"], content["unk_token"]) == ("<unk>", "<unk>")
    assert read_tokenizer(out).eos_token == "<unk>"
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_what_transformers_5_writes_of_a_tokenizer_is_written_so_that_4_reads_it(base, tmp_path):
    change(base / "config.json", model_type="llama")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base, local_files_only=True, extra_special_tokens=["咳"])
    tokenizer.chat_template = {one["name"]: one["template"] for one in TEMPLATES}
    tokenizer.save_pretrained(base)
    assert json.loads((base / "tokenizer_config.json").read_text())["extra_special_tokens"] == ["咳"]
    out = written(base, tmp_path)
    content = json.loads((out / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert content["additional_special_tokens"] == ["咳"] and "extra_special_tokens" not in content
    assert "local_files_only" not in content, "how it was loaded says nothing about it"
    again = read_tokenizer(out)
    assert again.chat_template == tokenizer.chat_template and again.extra_special_tokens == ["咳"]


@pytest.mark.parametrize("named", ["TokenizersBackend", "LlamaTokenizerFast", None])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_class_is_one_by_which_others_make_the_tokens_of_the_training(model_type, named, base):
    byte_level().save(str(base / "tokenizer.json"))
    settings = {"tokenizer_class": named, "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, out = read_tokenizer(base), base.parent / "out"
    out.mkdir()
    config = AutoConfig.for_model(model_type, vocab_size=400)
    read_alike = write_small_files(out, config, ours, dtype=torch.bfloat16, source=None)
    assert (ours("a").input_ids[0] == ours.bos_token_id) == (named == "LlamaTokenizerFast")
    for text in PROBES:
        assert read_tokenizer(out)(text).input_ids == ours(text).input_ids
        if read_alike:
            assert AutoTokenizer.from_pretrained(out)(text).input_ids == ours(text).input_ids
    # In a qwen2 folder transformers 5 builds a tokenizer of its own, whatever class is named.
    assert read_alike == (model_type == "llama")


def test_a_tokenizer_that_autotokenizer_would_change_is_told(cpt_tree, capsys):
    check(config_from_dict("cpt", cpt_tree))
    assert "AutoTokenizer makes other tokens of this tokenizer.json in a qwen2 folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["merges.txt", "generation_config.json", "config.json"])
def test_a_file_of_the_source_that_cannot_be_read_is_named_and_a_full_disk_is_not_the_users(name, base, monkeypatch):
    (base / "merges.txt").write_text("a b")
    (base / "generation_config.json").write_text("{}")
    model = ModelConfig(path=str(base))
    tokenizer = load_tokenizer(model)
    hf_config = load_model_config(model, tokenizer)
    read = Path.read_bytes

    def refuse(path):
        if path == base / name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(InputError, match=f"{name}: cannot be read.*Permission denied"):
            rehearse(hf_config, tokenizer, dtype=torch.bfloat16, source=base)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        rehearse(hf_config, tokenizer, dtype=torch.bfloat16, source=base)


@pytest.mark.parametrize(
    "content", ["{broken", "[]", '{"max_new_tokens": -5}', '{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}']
)
def test_a_generation_config_that_the_export_could_not_read_is_refused_before_anything_runs(base, cpt_tree, tmp_path, content):
    (base / "generation_config.json").write_text(content)
    cpt_tree["model"] = {"path": str(base)}
    with pytest.raises(InputError, match=r"base/generation_config\.json: "):
        check(config_from_dict("cpt", cpt_tree))
    assert not (tmp_path / "cpt").exists()


def test_a_tokenizer_that_reads_back_otherwise_is_refused(base):
    tokenizer = read_tokenizer(base)
    tokenizer.add_tokens(["新"])
    hf_config = load_model_config(ModelConfig(path=str(base)), tokenizer)
    with pytest.raises(InputError, match=r"base/tokenizer_config\.json: not the same after.*tokens: 21 became 20"):
        rehearse(hf_config, tokenizer, dtype=torch.float32, source=base)


def test_several_chat_templates_come_through_a_run(tokenizer_dir, cpt_tree, tmp_path):
    tokenizer = read_tokenizer(tokenizer_dir)
    tokenizer.chat_template = {one["name"]: one["template"] for one in TEMPLATES}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    cpt_tree["model"]["tokenizer"] = str(tmp_path / "tokenizer")
    result = run("cpt", cpt_tree, tmp_path / "run", optim__steps=1, optim__warmup_steps=0)
    assert (result.model_dir / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    assert read_tokenizer(result.model_dir).chat_template == tokenizer.chat_template


def test_export_and_a_finished_run_do_without_the_base_model_and_others_say_what_is_missing(base, cpt_tree, tmp_path):
    change(base / "generation_config.json", top_p=0.5)
    cpt_tree["model"] = {"path": str(base), "eos_token": "<unk>"}
    result = run("cpt", cpt_tree, tmp_path / "run")
    base.rename(tmp_path / "elsewhere")
    out = export_run(tmp_path / "run", tmp_path / "out")
    for path in result.model_dir.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert run("cpt", cpt_tree, tmp_path / "run").metrics["step"] == 6
    shutil.rmtree(result.model_dir)
    with pytest.raises(InputError, match=r"model\.path.*the weights the run began with are gone.*medtrain export"):
        run("cpt", cpt_tree, tmp_path / "run")
    cpt_tree["model"]["path"] = str(tmp_path / "elsewhere")
    again = load_file(run("cpt", cpt_tree, tmp_path / "run").model_dir / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in load_file(out / "model.safetensors").items())
    shutil.rmtree(tmp_path / "run" / "base")  # as a run of an older version left its folder
    assert (export_run(tmp_path / "run", tmp_path / "old") / "config.json").read_bytes() == (out / "config.json").read_bytes()


def test_a_run_from_sizes_does_without_its_tokenizer_s_folder(tokenizer_dir, cpt_tree, tmp_path):
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    cpt_tree["model"]["tokenizer"] = str(tmp_path / "tokenizer")
    result = run("cpt", cpt_tree, tmp_path / "run")
    shutil.rmtree(tmp_path / "tokenizer")
    shutil.rmtree(result.model_dir)
    assert run("cpt", cpt_tree, tmp_path / "run").model_dir.is_dir()
    (tmp_path / "run" / "manifest.json").write_text("{cut short")
    with pytest.raises(InputError, match=r"manifest\.json: unreadable manifest"):
        run("cpt", cpt_tree, tmp_path / "run")


def test_the_export_has_the_tokenizer_of_the_start_whatever_became_of_its_folder(base, cpt_tree, tmp_path, monkeypatch):
    build = loop.build

    def build_and_change(*args, **kwargs):
        change(base / "tokenizer_config.json", chat_template="another")
        (base / "tokenizer.json").unlink()
        return build(*args, **kwargs)

    monkeypatch.setattr(loop, "build", build_and_change)
    cpt_tree["model"] = {"path": str(base)}
    result = run("cpt", cpt_tree, tmp_path / "run")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (result.model_dir / name).read_bytes() == (tmp_path / "run" / "base" / name).read_bytes()
    assert "another" not in (result.model_dir / "tokenizer_config.json").read_text()


def _run_where_one_rank_misses(base, tree, out):
    exists, mine = os.path.exists, dist.get_rank() == 0
    prepare.os.path.exists = lambda path: exists(path) and (mine or str(path) != str(base))
    assert run("cpt", tree, out).metrics["step"] == 6


def test_where_the_base_model_is_missing_on_one_node_all_ranks_take_the_kept_files(base, cpt_tree, tmp_path):
    cpt_tree["model"] = {"path": str(base)}
    run("cpt", cpt_tree, tmp_path / "run")
    run_on_ranks(2, tmp_path, _run_where_one_rank_misses, base, cpt_tree, tmp_path / "run")
