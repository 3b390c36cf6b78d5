"""What we rely on from tokenizers, and from transformers' reading of tokenizer.json.

- ``PreTrainedTokenizerFast.from_pretrained`` takes tokenizer.json as it stands, whatever class or model type is named, and
  tokenizer_config.json's special tokens, added tokens and chat templates with it; ``add_bos_token`` can be set afterwards.
- ``Tokenizer.to_str`` writes tokenizer.json's form: ``added_tokens`` after what calls set (truncation, padding), and the
  names of the three ways to put a blank before a text; ``from_str`` reads it back.
- A call with ``add_special_tokens=False`` cuts and pads nothing, whatever tokenizer.json says.
"""

import json

import pytest
from tokenizer_kinds import PUTS_BLANK, PUTS_NONE, byte_level, digits, prepend, put_bos, save, unigram
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "mistral", "qwen3"])
@pytest.mark.parametrize("named", ["LlamaTokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_transformers_keeps_tokenizer_json_as_it_stands(tmp_path, named, model_type):
    for k, own in enumerate([digits(), unigram(normalizers.NFKC()), put_bos(prepend())]):
        folder = save(tmp_path / str(k), own, tokenizer_class=named, model_type=model_type, pad_token="</s>")
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_text("x")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))  # scores of a Unigram are rounded as they are read
        read, written = (json.loads(one.to_str()) for one in (tokenizer.backend_tokenizer, own))
        without = {"post_processor": read["post_processor"]} if written["post_processor"] is None else {}
        assert read == written | without and tokenizer("a").input_ids == own.encode("a").ids
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("</s>", "</s>", "<s>")
        assert tokenizer.chat_template == {"default": "{{ messages }}", "tools": "x"}
        assert tokenizer.name_or_path == str(folder) and not tokenizer.split_special_tokens


def test_bos_is_put_and_taken_by_add_bos_token(tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save(tmp_path, byte_level()))
    assert tokenizer.num_special_tokens_to_add() == 0
    tokenizer.add_bos_token = True
    assert tokenizer.num_special_tokens_to_add() == 1 and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    tokenizer.add_bos_token = False
    assert tokenizer.num_special_tokens_to_add() == 0


def test_what_calls_set_stands_before_added_tokens():
    backend = byte_level()
    backend.enable_padding(pad_id=2)
    backend.enable_truncation(3)
    names = list(json.loads(backend.to_str()))
    assert names[:4] == ["version", "truncation", "padding", "added_tokens"]
    assert names[4:] == ["normalizer", "pre_tokenizer", "post_processor", "decoder", "model"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    rows = tokenizer(["a b c d e", "a"], add_special_tokens=False).input_ids
    assert len(rows[0]) > 3 and len(rows[1]) == 1
    backend.no_truncation()
    backend.no_padding()
    assert backend.to_str() == Tokenizer.from_str(backend.to_str()).to_str()


def test_the_blank_before_a_text_has_three_names():
    def named(tokenizer):
        state = json.loads(tokenizer.to_str())
        text = json.dumps([state["normalizer"], state["pre_tokenizer"]])
        return (
            '"Prepend"' in text
            or '"prepend_scheme": "first"' in text
            or '"prepend_scheme": "always"' in text
            or ('"add_prefix_space": true' in text)
        )

    for make in (*PUTS_BLANK.values(), *PUTS_NONE.values()):
        tokenizer = make()
        blank = tokenizer.encode("の", add_special_tokens=False).tokens[0].startswith(("▁", "Ġ"))
        assert named(tokenizer) == blank == (make in PUTS_BLANK.values()), make
    old = Tokenizer(models.BPE())
    old.pre_tokenizer = pre_tokenizers.Metaspace()
    state = json.loads(old.to_str())
    # As files of tokenizers before 0.19 have it.
    state["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    assert json.loads(Tokenizer.from_str(json.dumps(state)).to_str())["pre_tokenizer"]["prepend_scheme"] == "always"
