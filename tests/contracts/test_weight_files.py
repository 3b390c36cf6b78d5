"""We rely on transformers to read ``model.safetensors``, else what the index names, and nothing else that lies in the folder."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "vocab_size": 24,
}


def test_the_whole_file_comes_before_the_index_and_the_index_before_all_else(tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    marked = {number: tensors | {"lm_head.weight": torch.full((24, 16), float(number))} for number in (1, 2, 3)}
    for number, name in ((1, "model.safetensors"), (2, "model-00001-of-00001.safetensors"), (3, "consolidated.safetensors")):
        save_file(marked[number], tmp_path / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    def head():
        return AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight[0, 0].item()

    assert head() == 1
    (tmp_path / "model.safetensors").unlink()
    assert head() == 2
