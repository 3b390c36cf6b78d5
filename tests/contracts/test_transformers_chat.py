"""What we rely on from transformers' chat templates: one gets now from ``strftime_now`` alone, a copy of a tokenizer has a
template of its own, and a template raises what ``raise_exception`` is given."""

import copy
from datetime import datetime

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

CHAT = [{"role": "user", "content": "fever"}]


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "fever": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def render(tokenizer, template, **given):
    tokenizer.chat_template = template
    return tokenizer.apply_chat_template(CHAT, tokenize=False, **given)


def test_strftime_now_is_todays_date_by_strftime(tokenizer):
    before = datetime.now()
    text = render(tokenizer, "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y|%%|%j') }}{% endif %}")
    assert text in {time.strftime("%d %b %Y|%%|%j") for time in (before, datetime.now())}


def test_a_copy_has_a_template_of_its_own_and_the_same_ids(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    other = copy.copy(tokenizer)
    other.chat_template = "fixed"
    assert other.apply_chat_template(CHAT, tokenize=False) == "fixed"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "fever"
    assert other("fever").input_ids == tokenizer("fever").input_ids == [2]
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    other = copy.copy(tokenizer)
    other.chat_template = {"default": "c", "tool_use": "b"}
    assert [t.apply_chat_template(CHAT, tokenize=False) for t in (tokenizer, other)] == ["a", "c"]


def test_a_template_sees_the_messages_keys_the_generation_prompt_and_can_refuse(tokenizer):
    template = "{{ messages[0].name }}{% if add_generation_prompt %}<think>{% endif %}"
    tokenizer.chat_template = template
    named = [CHAT[0] | {"name": "Ann"}]
    assert tokenizer.apply_chat_template(named, tokenize=False, add_generation_prompt=True) == "Ann<think>"
    assert tokenizer.apply_chat_template(named, tokenize=False) == "Ann"
    with pytest.raises(Exception, match="no system"):
        render(tokenizer, "{{ raise_exception('no system') }}")
