"""Tokens: the ids are tokenizer.json's, sequences begin with BOS where the tokenizer puts one, completions go on from prompts."""

import hashlib
from pathlib import Path

import pytest
import torch
from helpers import write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import PUTS_BLANK, PUTS_NONE, TEXTS, byte_level, digits, metaspace, prepend, put_bos, save, unigram
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM

from medtrain.trainer.config.source import Source
from medtrain.trainer.data.ledger import cpt_ledger
from medtrain.trainer.data.pairs import BOS_DOUBLED, BOS_MISSING, load_pairs
from medtrain.trainer.data.tokenizer import (
    continuations,
    opening,
    read_tokenizer,
    tokenize_starts,
    tokenize_texts,
    tokenizer_digest,
)
from medtrain.trainer.data.tokens import make_windows, tokenize_source
from medtrain.trainer.errors import InputError
from medtrain.trainer.exam.generate import HFEngine
from medtrain.trainer.exam.prompts import PromptStyle
from medtrain.trainer.exam.questions import Question

QWEN = Path(__file__).parents[3] / ".." / "shared" / "data" / "qwen2.5-tokenizer"
CHATML = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
PAIR = {"prompt": "問題: 正しい の は どれ か 。\n", "chosen": "答え: a", "rejected": " 答え: 腎"}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A tokenizer of each kind, read from its folder."""
    folder = tmp_path_factory.mktemp("kinds")
    every = PUTS_BLANK | PUTS_NONE
    return {name: read_tokenizer(save(folder / name.replace(" ", "-"), make())) for name, make in every.items()}


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    """The same of some kinds, with BOS before every text."""
    folder = tmp_path_factory.mktemp("bos")
    made = {"byte-level": byte_level(), "prepend": prepend(), "metaspace first": metaspace()}
    return {name: read_tokenizer(save(folder / name.replace(" ", "-"), put_bos(t))) for name, t in made.items()}


# The ids are tokenizer.json's


@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast", "GPT2TokenizerFast", "T5Tokenizer", None])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
def test_ids_are_those_of_tokenizer_json_whatever_class_and_model_are_named(tmp_path, model_type, named):
    texts = [*TEXTS[:4], "1234 567", "ｶﾞｽ ㎎ Ａ", "</s>a <s>", " two  blanks "]
    for k, own in enumerate([digits(), unigram(normalizers.NFKC()), prepend()]):
        folder = save(tmp_path / str(k), own, model_type=model_type, **({"tokenizer_class": named} if named else {}))
        tokenizer = read_tokenizer(folder)
        assert tokenize_texts(tokenizer, texts) == [own.encode(text, add_special_tokens=False).ids for text in texts]
        assert (tokenizer.eos_token, tokenizer.bos_token) == ("</s>", "<s>")


def test_bos_by_tokenizer_config_alone_and_added_tokens_of_it_are_kept(tmp_path):
    added = {"content": "<|end|>", "lstrip": False, "normalized": False, "rstrip": True, "single_word": False}
    own = byte_level()
    folder = save(
        tmp_path,
        own,
        tokenizer_class="LlamaTokenizerFast",
        model_type="llama",
        add_bos_token=True,
        added_tokens_decoder={str(own.get_vocab_size()): added | {"special": True}},
        chat_template="x",
    )
    tokenizer = read_tokenizer(folder)
    assert opening(tokenizer) == ("<s>", [own.token_to_id("<s>")]) and tokenizer.chat_template == "x"
    off = read_tokenizer(save(tmp_path / "off", put_bos(prepend()), tokenizer_class="LlamaTokenizer", add_bos_token=False))
    assert opening(off) == ("", [])
    other = read_tokenizer(save(tmp_path / "other", put_bos(prepend()), add_bos_token=False))  # no version obeyed it
    assert opening(other) == ("<s>", [1])
    assert tokenize_texts(tokenizer, ["a<|end|>  b"])[0][1] == own.get_vocab_size()


def test_a_folder_whose_ids_nothing_decides_or_two_files_decide_is_refused(tmp_path):
    (tmp_path / "sp").mkdir()
    (tmp_path / "sp" / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no tokenizer.json, which decides the ids \(found tokenizer.model"):
        read_tokenizer(tmp_path / "sp")
    with pytest.raises(InputError, match="add_prefix_space.*found False; expected True"):
        read_tokenizer(save(tmp_path / "off", prepend(), add_prefix_space=False))
    with pytest.raises(InputError, match="add_prefix_space.*found True; expected False"):
        read_tokenizer(save(tmp_path / "on", byte_level(), add_prefix_space=True))
    read_tokenizer(save(tmp_path / "agreed", byte_level(True), add_prefix_space=True))
    (tmp_path / "agreed" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="no usable tokenizer here"):
        read_tokenizer(tmp_path / "agreed")


def test_half_a_surrogate_pair_is_told_by_row(kinds, tmp_path):
    (tmp_path / "d.jsonl").write_text(r'{"text": "a \ud800"}')
    (tmp_path / "p.jsonl").write_text(r'{"prompt": "a \ud800", "chosen": "a", "rejected": "b"}')
    with pytest.raises(InputError, match="row 1: field 'text': half a surrogate pair"):
        tokenize_source(Source(tmp_path / "d.jsonl"), kinds["byte-level"], tmp_path / "cache")
    with pytest.raises(InputError, match="row 1: field 'prompt': half a surrogate pair"):
        load_pairs(Source(tmp_path / "p.jsonl"), kinds["byte-level"], max_length=100)


# BOS


def test_documents_begin_with_bos_where_the_tokenizer_puts_one(tmp_path, with_bos):
    texts = ["高熱 と 咳 が ある", "<s>The patient", "<s><s>a", "<s>", "b </s> c"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    for name, tokenizer in with_bos.items():
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        tokenized = tokenize_source(Source(str(path)), tokenizer, tmp_path / "cache")
        found = [tokenized.tokens(*tokenized.offsets[i : i + 2]).tolist() for i in range(len(texts))]
        assert found[0] == [*tokenizer(texts[0]).input_ids, eos] and found[0][0] == bos, name
        assert found[1] == [*tokenizer("The patient").input_ids, eos], "not two"
        assert found[2][:2] == [bos, bos], "the text's own second one stays"
        assert found[3] == [eos], "a text without tokens has nothing to learn, as ever"
        windows = make_windows(tokenized, 4)
        ledger = cpt_ledger([windows])["sources"]["a"]
        assert ledger["counted"] == sum(len(one) - 1 for one in found) == ledger["tokens"] - len(texts)
        assert ledger["refused"] == {"no tokens but eos": {"rows": 1, "tokens": 1}}
        assert tokenized.num_bytes.tolist() == [len(text.encode()) for text in texts]
        targets = [token for i in range(int(windows.first[1])) for token in windows.window(i)[1:].tolist()]
        assert targets == found[0][1:], "every token after BOS is predicted, the first of the text too"


def test_the_key_of_the_token_cache_changes_with_bos_and_not_without(with_bos, kinds):
    def before(tokenizer):
        state = tokenizer.backend_tokenizer.to_str()
        state = state[state.index('"added_tokens"') :]
        return hashlib.sha256(f"{tokenizer.eos_token_id} False {state}".encode()).hexdigest()

    assert all(tokenizer_digest(tokenizer) == before(tokenizer) for tokenizer in kinds.values())
    assert all(tokenizer_digest(tokenizer) != before(tokenizer) for tokenizer in with_bos.values())


def test_the_key_of_the_token_cache_holds_nothing_that_decides_no_ids(tmp_path):
    def digest(name, cut, decoder):
        own = byte_level()
        own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(**cut), decoder
        return tokenizer_digest(read_tokenizer(save(tmp_path / name, own)))

    one = digest("one", {"add_prefix_space": False}, decoders.ByteLevel())
    assert one == digest("two", {"add_prefix_space": False, "trim_offsets": False}, decoders.ByteLevel(use_regex=False))
    assert one != digest("three", {"add_prefix_space": True}, decoders.ByteLevel())
    assert one != digest("four", {"add_prefix_space": False, "use_regex": False}, decoders.ByteLevel())


def test_prompts_of_string_pairs_begin_with_bos_and_chat_templates_write_their_own(tmp_path, with_bos):
    for tokenizer in with_bos.values():
        bos = tokenizer.bos_token_id
        rows = [PAIR, PAIR | {"prompt": "<s>" + PAIR["prompt"]}, PAIR | {"prompt": "<s><s>" + PAIR["prompt"]}]
        pairs = load(tmp_path, rows, tokenizer)
        assert pairs.prompt(0).tolist() == pairs.prompt(1).tolist() == tokenizer(PAIR["prompt"]).input_ids
        assert pairs.prompt(0)[0] == bos and bos not in pairs.chosen(0).tolist()
        assert pairs.prompt(2)[:2].tolist() == [bos, bos] and pairs.noted == {BOS_DOUBLED: 1}
        longest = max(len(pairs.chosen(0)), len(pairs.rejected(0)))
        cut = load(tmp_path, rows[:1], tokenizer, max_length=longest + 3, overlong="cut_prompt")
        assert cut.prompt(0).tolist() == [bos, *pairs.prompt(0)[-2:].tolist()]
        assert cut.cut == {"cut_prompt": (1, len(pairs.prompt(0)) - 3)}
        for template, noted in ((CHATML, {BOS_MISSING: 1}), ("{{ bos_token }}" + CHATML, {})):
            tokenizer.chat_template = template
            found = load(tmp_path, [chat()], tokenizer)
            assert found.noted == noted
            ids = tokenizer.apply_chat_template(chat()["prompt"], add_generation_prompt=True, return_dict=False)
            assert found.prompt(0).tolist() == ids and (ids[0] == bos) == (not noted)


def test_exam_and_training_make_the_same_of_a_prompt(tmp_path, with_bos):
    question = Question("1", "正しい の は どれ か 。", ("x", "y"), ("a",), explanation="腎 の 低形成")
    for tokenizer in with_bos.values():
        style = PromptStyle()
        prompt = style.prompt(question, "explain", tokenizer)
        (ids,) = tokenize_starts(tokenizer, [prompt], as_written=True)
        assert prompt.startswith("<s>") and ids == tokenizer(prompt.removeprefix("<s>")).input_ids
        pairs = load(tmp_path, [PAIR | {"prompt": prompt}], tokenizer)
        assert pairs.prompt(0).tolist() == ids
        assert tokenize_starts(tokenizer, ["[user]a"], as_written=True) == tokenize_texts(tokenizer, ["[user]a"])


# What goes on from a prompt


def check_seam(tokenizer, prompt, completion):
    def decode(ids):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    (before,), (after,) = tokenize_starts(tokenizer, [prompt]), continuations(tokenizer)([completion])
    assert decode(before + after) == decode(before) + completion


@pytest.mark.parametrize("kind", [*PUTS_BLANK, "byte-level", "metaspace never"])
def test_prompt_and_completion_decode_to_their_texts(kinds, kind):
    for prompt in ("答え:", "答え: ", "説明:\n", "The patient", "腎</s>"):
        for completion in ("a", " a", "答え: a", "\n答え: a\n", "の 低形成", "a</s> の", "</s>a"):
            check_seam(kinds[kind], prompt, completion)


@given(st.text("a の腎\n答え:", max_size=8), st.text("a の腎\n答え:", min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_completion_decodes_behind_its_prompt(kinds, prompt, completion):
    for kind in ("prepend", "metaspace first", "metaspace always", "byte-level with a blank", "byte-level"):
        check_seam(kinds[kind], "問" + prompt, completion)


@pytest.mark.parametrize("kind", PUTS_NONE)
def test_where_no_blank_is_put_completions_are_tokenised_apart_as_ever(kinds, kind):
    texts = [*TEXTS[:4], " a", "a</s>b", "\n"]
    tokenizer = kinds[kind]
    assert continuations(tokenizer)(texts) == tokenizer(texts, add_special_tokens=False).input_ids
    assert opening(tokenizer) == ("", [])


def test_both_sides_of_a_pair_are_what_the_model_would_write(tmp_path, kinds):
    for kind in PUTS_BLANK:
        tokenizer = kinds[kind]
        tokenizer.chat_template = CHATML
        pairs = load(tmp_path, [PAIR, chat(PAIR["chosen"], PAIR["rejected"])], tokenizer)
        for i, prompt in enumerate((PAIR["prompt"], "[user]どれ か[assistant]")):
            for side, text in ((pairs.chosen(i), PAIR["chosen"]), (pairs.rejected(i), PAIR["rejected"])):
                before = pairs.prompt(i).tolist()
                assert tokenizer.decode(before + side.tolist()) == tokenizer.decode(before) + text + "</s>", (kind, prompt)


def test_choices_are_scored_as_the_tokens_that_training_makes_of_them(kinds):
    torch.manual_seed(0)
    tokenizer = kinds["prepend"]
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.5,
        )
    ).eval()
    prompts, answers = ["答え:", "答え:", "どれ か 。\n"], ["a", " a", "答え: a"]
    for prompt, answer, logp in zip(prompts, answers, HFEngine(model, tokenizer).logps(prompts, answers), strict=True):
        (before,), (after,) = tokenize_texts(tokenizer, [prompt]), continuations(tokenizer)([answer])
        with torch.no_grad():
            table = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        expected = sum(float(table[len(before) + i - 1, token]) for i, token in enumerate(after))
        assert logp == pytest.approx(expected, abs=1e-4)
    assert tokenizer.convert_ids_to_tokens(continuations(tokenizer)(["a"])[0]) == ["a"]


@pytest.mark.skipif(not QWEN.is_dir(), reason="no shared data here")
def test_qwens_tokens_are_those_of_its_file():
    tokenizer, own = read_tokenizer(QWEN), Tokenizer.from_file(str(QWEN / "tokenizer.json"))
    texts = [*TEXTS[:4], " a", "<|im_end|>\n", "\n\n答え"]
    expected = [own.encode(text, add_special_tokens=False).ids for text in texts]
    assert continuations(tokenizer)(texts) == tokenize_starts(tokenizer, texts) == expected
    # The key of its token caches ever since there are any.
    assert tokenizer_digest(tokenizer) == "0f9c9b33d9cfd3fb94eaf49e0a4f96d41f6ca9773d0e88b641966411ee522fe4"


def load(tmp_path, rows, tokenizer, max_length=1000, **options):
    return load_pairs(Source(str(write_jsonl(tmp_path / "pairs.jsonl", rows))), tokenizer, max_length=max_length, **options)


def chat(chosen="a", rejected="の"):
    sides = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))}
    return {"prompt": [{"role": "user", "content": "どれ か"}], **sides}
