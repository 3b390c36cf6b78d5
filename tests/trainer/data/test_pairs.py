"""Preference pairs: tokens, what counts, cutting and refusing, chat templates, and the text of every error."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from medtrain.trainer.config.source import Source
from medtrain.trainer.data.batch import pair_batch
from medtrain.trainer.data.ledger import describe, pair_ledger
from medtrain.trainer.data.packing import plan_pairs
from medtrain.trainer.data.pairs import BOS_DOUBLED, EOS_DOUBLED, EOS_MISSING, PROMPT_REPEATED, PairSet, load_pairs
from medtrain.trainer.errors import InputError

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"
WORDS = "which fever is it the answer a b c d e why because of".split()
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def make_tokenizer(template=TEMPLATE, eos="<eos>"):
    vocab = ["<unk>", "<eos>", "<end>", "\n", "\n\n", "<user>", "<assistant>", "<system>", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n+"), "isolated"), pre_tokenizers.Split(Regex(" +"), "removed")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def ids(text):
    return make_tokenizer()(text, add_special_tokens=False)["input_ids"]


def row(prompt="which fever is it", chosen="the answer a", rejected="b", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def chat(prompt="which fever", chosen="the answer a", rejected="b"):
    sides = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return row([{"role": "user", "content": prompt}], *sides)


def load(tmp_path, rows, max_length=100, tokenizer=None, **options):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return load_pairs(Source(str(file)), tokenizer or make_tokenizer(), max_length=max_length, **options)


def segments(pairs: PairSet, i: int):
    return pairs.prompt(i).tolist(), pairs.chosen(i).tolist(), pairs.rejected(i).tolist()


def message(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def test_strings_are_tokenised_apart_and_completions_end_in_eos(tmp_path):
    pairs = load(tmp_path, [row(), row("why", "because of a", "because of b")] * 200)
    assert pairs.num_pairs == 400 and pairs.name == "pairs"
    for i in (0, 398):
        assert segments(pairs, i) == (ids("which fever is it"), [*ids("the answer a"), 1], [*ids("b"), 1])
    assert segments(pairs, 399) == (ids("why"), [*ids("because of a"), 1], [*ids("because of b"), 1])
    assert pairs.separate_lengths[:2].tolist() == [(4 + 4 - 1) + (4 + 2 - 1), (1 + 4 - 1) * 2]
    assert pairs.lengths[:2].tolist() == [4 + (4 - 1) + (2 - 1), 1 + (4 - 1) * 2]
    assert pairs.completion_lengths[:4].tolist() == [4, 2, 4, 4]
    assert pairs.rows.tolist() == list(range(1, 401))


def test_a_pair_batch_counts_exactly_the_completions(tmp_path):
    pairs = load(tmp_path, [row(), row("why", "because of a", "because of b c")])
    batch = pair_batch([pairs, pairs], [(1, 1), (0, 0)], share=False)
    prompt, completion = ids("which fever is it"), [*ids("the answer a"), 1]
    sequences = [ids("why because of a <eos>"), ids("why because of b c <eos>"), prompt + completion, [*prompt, *ids("b"), 1]]
    targets = [s[1:] for s in sequences[:2]] + [completion, [*ids("b"), 1]]
    assert batch.input_ids.tolist() == [t for s in sequences for t in s[:-1]]
    assert batch.targets.tolist() == [t for s in targets for t in s]
    assert batch.target_cu_seqlens.tolist() == np.cumsum([0, *map(len, targets)]).tolist()
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *(len(s) - 1 for s in sequences)]).tolist()
    assert batch.position_ids.tolist() == [p for s in sequences for p in range(len(s) - 1)]
    assert batch.counted.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 19, 20]
    assert batch.max_seqlen == 7 and len(batch.pair_ids) == 2 and batch.sides.tolist() == [0, 1, 2, 3]
    assert batch.pair_ids.tolist() == [1, 0] and batch.source_ids.tolist() == [1, 0]


# Few tokens of few kinds, so that prompts and completions repeat.
SHAPES = st.tuples(st.integers(0, 3), *[st.lists(st.integers(0, 2), min_size=1, max_size=4)] * 3)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(SHAPES, min_size=1, max_size=6), st.booleans())
def test_what_each_side_sees_and_must_find_is_its_own_prompt_and_completion(shapes, share):
    segments = [np.array([salt, *p]) if k == 0 else np.array(p) for salt, *rest in shapes for k, p in enumerate(rest)]
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in segments])])
    pairs = PairSet("p", None, "", np.concatenate(segments).astype(np.int32), offsets, np.arange(len(shapes)), "", {}, {})
    items = [(0, i) for i in range(len(shapes))]
    batch = pair_batch([pairs], items, share=share)
    assert len(batch.input_ids) == len(batch.position_ids) == batch.cu_seqlens[-1]
    assert batch.max_seqlen == batch.cu_seqlens.diff().max() and batch.max_key_seqlen == batch.key_cu_seqlens.diff().max()
    keys = torch.arange(len(batch.input_ids)) if batch.key_index is None else batch.key_index
    segment_of = torch.repeat_interleave(torch.arange(len(batch.cu_seqlens) - 1), batch.cu_seqlens.diff())
    for k, number in enumerate(batch.sides.tolist()):
        prompt, completion = pairs.prompt(k // 2), (pairs.chosen, pairs.rejected)[k % 2](k // 2)
        mine = slice(batch.target_cu_seqlens[number], batch.target_cu_seqlens[number + 1])
        counted = batch.counted[mine]
        assert batch.targets[mine].tolist() == completion.tolist()
        for n, place in enumerate(counted.tolist()):
            s = segment_of[place]
            own_end = int(batch.cu_seqlens[s + 1])
            seen = keys[batch.key_cu_seqlens[s] : int(batch.key_cu_seqlens[s + 1]) - (own_end - 1 - place)]
            assert int(seen[-1]) == place, "a segment's keys end with its own tokens"
            assert batch.input_ids[seen].tolist() == [*prompt.tolist(), *completion[:n].tolist()]
            assert batch.position_ids[seen].tolist() == list(range(len(seen)))
    plan, counts = plan_pairs([pairs], items, share=share, capacity=10_000, world_size=1)
    assert sorted(plan[0][0]) == [i for _, i in items]
    assert counts.computed == len(batch.input_ids) and counts.separate == pairs.separate_lengths.sum()
    if share:
        prompts = {tuple(pairs.prompt(i)) for _, i in items}
        assert counts.needed == counts.computed and counts.prompt == sum(map(len, prompts))


def test_an_empty_pair_batch_has_no_pair_and_counts_nothing():
    batch = pair_batch([], [])
    assert batch.input_ids.tolist() == [0] and len(batch.pair_ids) == 0 == len(batch.targets)
    assert batch.target_cu_seqlens.tolist() == [0] and batch.pair_ids.tolist() == []


def test_chat_lists_are_the_templates_tokens_up_to_the_eos(tmp_path):
    tokenizer, example = make_tokenizer(), chat()
    pairs = load(tmp_path, [row(), example])
    assert segments(pairs, 1) == (ids("<user> which fever <eos>\n<assistant>"), ids("the answer a <eos>"), ids("b <eos>"))
    options = {"tokenize": True, "return_dict": False}
    prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template(example["prompt"] + example["chosen"], **options)
    assert pairs.prompt(1).tolist() == prompt
    assert whole == [*prompt, *pairs.chosen(1).tolist(), ids("\n")[0]]


def test_eos_is_appended_where_the_template_has_none_or_text_follows_it(tmp_path):
    no_eos = load(tmp_path, [chat()], tokenizer=make_tokenizer(eos="<end>"))
    assert no_eos.chosen(0).tolist() == [*ids("the answer a <eos>\n"), 2]
    within = load(tmp_path, [chat(chosen="a <end> b")], tokenizer=make_tokenizer(eos="<end>"))
    assert within.chosen(0).tolist() == [*ids("a <end> b <eos>\n"), 2]


def test_a_completion_that_melts_into_the_prompt_is_divided_where_the_prompt_ends(tmp_path):
    tokenizer = make_tokenizer(TEMPLATE.replace("> '", ">\\n'"))
    example = chat(chosen="\nthe answer a")
    whole = tokenizer.apply_chat_template(example["prompt"] + example["chosen"], return_dict=False)
    pairs = load(tmp_path, [example], tokenizer=tokenizer)
    prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] != prompt, "the tokenizer should join the two line breaks"
    assert segments(pairs, 0) == (prompt, ids("\nthe answer a <eos>"), ids("b <eos>"))


def test_chat_lists_of_parquet_have_their_null_keys_dropped(tmp_path):
    example = chat()
    example["prompt"].insert(0, {"role": "system", "content": "it is a", "name": "d"})
    pq.write_table(pa.Table.from_pylist([example]), tmp_path / "a.parquet")
    template = "{% for m in messages %}{{ '<user> ' if 'name' in m else '' }}{% endfor %}" + TEMPLATE
    pairs = load_pairs(Source(str(tmp_path / "a.parquet")), make_tokenizer(template), max_length=50)
    assert pairs.prompt(0).tolist() == ids("<user> <system> it is a <eos>\n<user> which fever <eos>\n<assistant>")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row(prompt=""), ["field 'prompt'", "empty text"]),
        (row(chosen=" \n"), ["field 'chosen'", "empty text"]),
        (row(rejected=""), ["field 'rejected'", "empty text"]),
        (row(rejected="the answer a"), ["field 'rejected'", "the same tokens as 'chosen'"]),
        (row(rejected="the  answer  a"), ["field 'rejected'", "the same tokens as 'chosen'"]),
        (row(prompt=7), ["field 'prompt'", "found a number", "expected a string or a list of messages"]),
        (row(chosen=None), ["field 'chosen'", "found null"]),
        ({"prompt": "why", "chosen": "a"}, ["field 'rejected'", "missing", "chosen, prompt"]),
        (chat() | {"rejected": "b"}, ["field 'rejected'", "wrong type", "found a string", "expected a list"]),
        (chat() | {"prompt": "b"}, ["field 'chosen'", "wrong type", "found a list", "expected a string"]),
        (chat() | {"prompt": []}, ["field 'prompt'", "empty list of messages"]),
        (chat() | {"chosen": ["a"]}, ["field 'chosen[0]'", "found a string", "expected a message"]),
        (chat(rejected=" "), ["field 'rejected[0].content'", "empty text"]),
        (chat() | {"prompt": [{"role": "user"}]}, ["field 'prompt[0].content'", "found null"]),
        (chat() | {"chosen": chat()["prompt"]}, ["field 'chosen[0].role'", "found user", "expected assistant"]),
        (chat() | {"prompt": chat()["chosen"]}, ["field 'prompt[0].role'", "ends with the assistant's turn"]),
        (chat(rejected="the answer a"), ["field 'rejected'", "the same tokens as 'chosen'"]),
    ],
)
def test_a_bad_pair_is_named_with_file_row_and_field(tmp_path, bad, words):
    text = message(lambda: load(tmp_path, [row(), chat(), bad]))
    assert text.startswith(f"{tmp_path / 'pairs.jsonl'}: row 3: ")
    for word in words:
        assert word in text


def test_chat_lists_need_a_template_whose_prompt_stays_the_beginning(tmp_path):
    text = message(lambda: load(tmp_path, [chat()], tokenizer=make_tokenizer(template=None)))
    assert "row 1: field 'prompt': the tokenizer has no chat template" in text
    last_only = "{{ messages[-1].content }}"
    text = message(lambda: load(tmp_path, [row(), chat()], tokenizer=make_tokenizer(template=last_only)))
    assert "row 2: field 'chosen': the prompt is not a prefix" in text
    raising = "{{ raise_exception('roles must alternate') }}"
    text = message(lambda: load(tmp_path, [chat()], tokenizer=make_tokenizer(template=raising)))
    assert "row 1: the chat template fails: roles must alternate" in text


# Tokens with eos: prompt 4 + chosen 4 = 8; prompt 6 + chosen 6 = 12; prompt 2 + rejected 9 = 11.
LONG = [row(), row("which fever is it the answer", "a b c d e", "b"), row("which fever", "a", "the answer a b c d e b")]


def test_overlong_pairs_are_an_error_with_the_first_row_the_count_and_what_helps(tmp_path):
    text = message(lambda: load(tmp_path, LONG, max_length=10))
    assert "row 2: overlong pair (found 12 tokens; expected at most 10, data.max_length) (2 rows are" in text
    for way in ("data.max_length", "data.overlong", "drop", "cut_completion", "cut_prompt"):
        assert way in text
    assert load(tmp_path, LONG, max_length=12).num_pairs == 3


def test_dropped_pairs_are_in_the_ledger(tmp_path):
    pairs = load(tmp_path, LONG, max_length=10, overlong="drop")
    assert pairs.num_pairs == 1 and pairs.rows.tolist() == [1]
    assert pairs.refused == {"overlong": (2, (6 + 6 + 2) + (2 + 2 + 9))}
    assert "no pair is left (found 3 refused)" in message(lambda: load(tmp_path, LONG, max_length=3, overlong="drop"))


def test_cutting_completions_keeps_the_eos_and_treats_both_sides_alike(tmp_path):
    pairs = load(tmp_path, LONG, max_length=10, overlong="cut_completion")
    assert segments(pairs, 1) == (ids("which fever is it the answer"), [*ids("a b c"), 1], [*ids("b"), 1])
    assert segments(pairs, 2) == (ids("which fever"), [*ids("a"), 1], [*ids("the answer a b c d e"), 1])
    assert pairs.cut == {"cut_completion": (2, 2 + 1)} and pairs.refused == {}


def test_cutting_prompts_cuts_from_the_left_what_both_sides_share(tmp_path):
    pairs = load(tmp_path, LONG, max_length=10, overlong="cut_prompt")
    assert segments(pairs, 1) == (ids("is it the answer"), [*ids("a b c d e"), 1], [*ids("b"), 1])
    assert segments(pairs, 2) == (ids("fever"), [*ids("a"), 1], [*ids("the answer a b c d e b"), 1])


def test_pairs_that_cutting_makes_useless_are_refused_and_counted(tmp_path):
    same, no_room = row("why", "a b c d", "a b c e"), row("which fever is it the", "a", "b c")
    rows = [same, no_room, row("why", "a", "b")]
    pairs = load(tmp_path, rows, max_length=5, overlong="cut_completion")
    assert pairs.rows.tolist() == [3] and pairs.cut == {}
    assert pairs.refused == {"identical after cutting": (1, 1 + 5 + 5), "cut_completion leaves no room": (1, 5 + 2 + 3)}
    pairs = load(tmp_path, rows, max_length=5, overlong="cut_prompt")
    assert pairs.rows.tolist() == [2, 3]
    assert pairs.refused == {"cut_prompt leaves no room": (1, 1 + 5 + 5)} and pairs.cut == {"cut_prompt": (1, 3)}


def test_the_ledger_loses_no_row_and_no_token(tmp_path):
    whole = load(tmp_path, LONG)
    for overlong in ("drop", "cut_completion", "cut_prompt"):
        ledger = pair_ledger([load(tmp_path, LONG, max_length=9, overlong=overlong)])
        total = ledger["total"]
        assert total["rows"] == 3 == total["kept"]["rows"] + total["refused"]["rows"]
        assert total["tokens"] == len(whole.tokens)
        assert total["tokens"] == sum(total[outcome]["tokens"] for outcome in ("kept", "cut", "refused"))
        json.dumps(ledger)


UNUSABLE = [
    row(),
    row(chosen=" "),
    row(rejected="the answer a"),
    row(rejected="the  answer  a"),
    chat(rejected=""),
    chat(prompt="why"),
]


def test_unusable_pairs_are_an_error_with_counts_by_reason_or_dropped_into_the_ledger(tmp_path):
    text = message(lambda: load(tmp_path, UNUSABLE))
    assert "row 2: field 'chosen': empty text" in text
    assert "(unusable rows: 2 empty, 2 identical; data.unusable: drop leaves them out)" in text
    pairs = load(tmp_path, UNUSABLE, unusable="drop")
    assert pairs.rows.tolist() == [1, 6]
    assert {reason: rows for reason, (rows, _) in pairs.refused.items()} == {"empty": 2, "identical": 2}
    assert pairs.refused["identical"][1] == 2 * (4 + 4 + 4)
    ledger = pair_ledger([pairs])
    assert ledger["total"]["rows"] == 6 and ledger["total"]["refused"]["rows"] == 4
    assert ledger["total"]["tokens"] == sum(ledger["total"][outcome]["tokens"] for outcome in ("kept", "cut", "refused"))
    assert describe(ledger) == ["pairs: refused: empty: 2 rows, 18 tokens", "pairs: refused: identical: 2 rows, 24 tokens"]
    forgetful = "{{ messages[0].content if messages|length > 1 and messages[0].content == 'why' else messages[-1].content }}"
    rows = [row(), chat(prompt="which is it")]
    pairs = load(tmp_path, rows, tokenizer=make_tokenizer(template=forgetful), unusable="drop")
    assert list(pairs.refused) == ["prompt not a prefix"] and pairs.num_pairs == 1
    with pytest.raises(InputError, match="wrong role"):  # the form is wrong, whatever is said of the unusable
        load(tmp_path, [row(), chat() | {"chosen": chat()["prompt"]}], unusable="drop")


def test_what_looks_wrong_is_kept_and_noted(tmp_path):
    bos = make_tokenizer()
    bos.bos_token = "<end>"
    rows = [
        row("<end> why"),
        row("<end> <end> why"),
        row("<end> why", "<end> a", "b"),
        row("why", "a <eos>", "b"),
        row("why", "why a", "why b"),
        row("why", "why a", "b"),
    ]
    pairs = load(tmp_path, rows, tokenizer=bos)
    assert pairs.num_pairs == 6
    assert pairs.noted == {BOS_DOUBLED: 2, EOS_DOUBLED: 1, PROMPT_REPEATED: 1}
    assert pair_ledger([pairs])["sources"]["pairs"]["noted"] == pairs.noted
    assert load(tmp_path, [chat(), row()], tokenizer=make_tokenizer(eos="<end>")).noted == {EOS_MISSING: 1}
    assert load(tmp_path, [chat(), row()]).noted == {}
    every_turn = make_tokenizer(template="{% for m in messages %}{{ '<end> ' + m.content + ' <eos>' }}{% endfor %}")
    every_turn.bos_token = "<end>"
    assert load(tmp_path, [chat()], tokenizer=every_turn).noted == {}


def test_eos_is_a_target_of_every_completion_where_it_is_also_the_padding_token(tmp_path):
    plain, padded = make_tokenizer(), make_tokenizer()
    padded.pad_token = padded.eos_token
    a, b = (load(tmp_path, [row(), chat()], tokenizer=tokenizer) for tokenizer in (plain, padded))
    assert a.digest == b.digest
    batch = pair_batch([b], [(0, 0), (0, 1)])
    last = batch.target_cu_seqlens[1:] - 1
    assert batch.targets[last].tolist() == [padded.eos_token_id] * 4


def test_the_ledger_tells_what_sharing_can_save(tmp_path):
    rows = [row("why", "a", "b"), row("why", "a", "c d"), row("which fever", "a", "b")]
    source = pair_ledger([load(tmp_path, rows)])["sources"]["pairs"]
    assert source["distinct_prompts"] == 2
    separate, by_pair = (1 + 1) * 2 + (1 + 1) + (1 + 2) + (2 + 1) * 2, (1 + 1 + 1) + (1 + 1 + 2) + (2 + 1 + 1)
    assert source["inputs"] == {"separate": separate, "by_pair": by_pair, "distinct": (1 + 1 + 1 + 2) + (2 + 1 + 1)}


def test_the_digest_follows_token_ids_and_their_division(tmp_path):
    digests = [
        load(tmp_path, [row("why a", "b", "c")]).digest,
        load(tmp_path, [row("why", "a b", "c")]).digest,
        load(tmp_path, [row("why a", "b", "d")]).digest,
        load(tmp_path, [row("why a", "b", "c")] * 2).digest,
    ]
    assert len(set(digests)) == 4
    assert load(tmp_path, [row("why  a", "b", "c", note="not a token")]).digest == digests[0]


def test_jmle_pairs_have_the_published_numbers_of_tokens():
    if not (SHARED / "jmle2026").is_dir():
        pytest.skip("../shared/data is absent")
    tokenizer = AutoTokenizer.from_pretrained(str(SHARED / "qwen2.5-tokenizer"))
    pairs = load_pairs(Source(str(SHARED / "jmle2026" / "pairs.jsonl")), tokenizer, max_length=1900)
    prompt, chosen, rejected = np.diff(pairs.offsets).reshape(-1, 3).sum(axis=0) - [0, 306, 306]
    assert (pairs.num_pairs, prompt, chosen, rejected) == (306, 80_918, 110_845, 112_988)


def test_qwens_template_makes_the_same_tokens_as_apply_chat_template(tmp_path):
    if not (SHARED / "qwen2.5-tokenizer").is_dir():
        pytest.skip("../shared/data is absent")
    tokenizer = AutoTokenizer.from_pretrained(str(SHARED / "qwen2.5-tokenizer"))
    example = chat("発熱の原因は何か。", "なぜなら……\n答え: a", "答え: b\n\n")
    pairs = load(tmp_path, [example], 500, tokenizer)
    for side in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(example["prompt"] + example[side], tokenize=True, return_dict=False)
        mine = [*pairs.prompt(0).tolist(), *getattr(pairs, side)(0).tolist()]
        assert mine == whole[:-1] and mine[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("eos", "kind"), [("<|endoftext|>", "base"), ("<|im_end|>", "instruct")])
def test_qwens_base_and_instruct_separators_end_what_is_learned(tmp_path, eos, kind):
    if not (SHARED / "qwen2.5-tokenizer").is_dir():
        pytest.skip("../shared/data is absent")
    tokenizer = AutoTokenizer.from_pretrained(str(SHARED / "qwen2.5-tokenizer"))
    tokenizer.eos_token = eos
    assert (tokenizer.pad_token == eos) is (kind == "base")
    pairs = load(tmp_path, [row("発熱は", "高い", "低い"), chat("発熱は", "高い", "低い")], 500, tokenizer)
    strings, lists = (tokenizer.decode(pairs.chosen(i)) for i in (0, 1))
    assert strings == f"高い{eos}" and tokenizer.decode(pairs.prompt(0)) == "発熱は"
    assert tokenizer.decode(pairs.prompt(1)).endswith("発熱は<|im_end|>\n<|im_start|>assistant\n")
    if kind == "instruct":
        assert lists == "高い<|im_end|>" and pairs.noted == {}
    else:  # the template knows only <|im_end|>: the turn is learned with it, and the document's end after it
        assert lists == "高い<|im_end|>\n<|endoftext|>" and pairs.noted == {EOS_MISSING: 1}
