"""Chat templates: what they leave out of pairs, and dates that stay those of a run's first start.

The templates are those of published models, shortened: Llama 3.2, DeepSeek-R1 (January 2025 and later), QwQ, Qwen3, Gemma,
Mistral, SmolLM3.
"""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import run, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medtrain.trainer.config.source import Source
from medtrain.trainer.data.chat import HISTORY_SHORTENED, KEY_LEFT_OUT, fix_time, left_out
from medtrain.trainer.data.ledger import describe, pair_ledger
from medtrain.trainer.data.pairs import COLUMN_UNREAD, load_pairs
from medtrain.trainer.data.tokenizer import read_tokenizer
from medtrain.trainer.errors import InputError
from medtrain.trainer.exam.scoring import read_outputs
from medtrain.trainer.run import folder as run_folder
from medtrain.trainer.run.folder import RunFolder

YESTERDAY = datetime(2024, 7, 6, 8, 9, 10).astimezone()


def turns(turn, opening="", generation=""):
    """A template of ``turn`` for each message m, ended by eos."""
    end = "{% if add_generation_prompt %}<assistant>" + generation + "{% endif %}"
    return opening + "{% for m in messages %}<{{ m.role }}>" + turn + "</s>{% endfor %}" + end


PLAIN = turns("{{ m.content }}")
LAST_PART = "{{ m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content }}"
# Qwen3: reasoning stays in the last turn, in its own form, and goes from earlier ones.
QWEN3 = turns(
    "{% set r, c = m.reasoning_content or '', m.content %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1] %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ r.strip('\n') }}\n</think>\n\n{{ c.lstrip('\n') }}"
    "{% else %}{{ c }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
# Mistral: the system message stands in the first user's turn.
MERGED = (
    "{% set s = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set ms = messages[1:] if s else messages %}{% for m in ms %}{% if m.role == 'user' %}"
    "[INST] {{ (s if loop.first else '') ~ m.content }}[/INST]{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
DROPS_SYSTEM = PLAIN.replace("in messages", "in messages if m.role != 'system'")
ESCAPES = turns("{{ m.content | e }}")
DATED = turns(
    "{{ m.content }}",
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<system>Today Date: {{ date_string }}</s>",
)
THOUGHT = "<think>\n低い。\n</think>\n\n答え: "


def byte_tokenizer(template):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def user(text="どれか < 。", **more):
    return {"role": "user", "content": text, **more}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def pair(chosen, *prompt):
    return {"prompt": [*(prompt or [user()])], "chosen": [chosen], "rejected": [says("答え: c")]}


SYSTEM = {"role": "system", "content": "医師として 答える。"}


def load(tmp_path, template, *rows, **options):
    file = write_jsonl(tmp_path / "pairs.jsonl", list(rows))
    return load_pairs(Source(str(file)), byte_tokenizer(template), max_length=2000, **options)


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        (turns(LAST_PART), pair(says(THOUGHT + "a")), ["'chosen[0].content'", "leaves out", "'<think> 低い。 </think> 答"]),
        (turns(LAST_PART, generation="<think>\n"), pair(says(THOUGHT + "a")), ["the prompt ends with '<think>\\n'"]),
        (turns(LAST_PART, generation="<think>\n"), pair(says("答え: a")), ["where prompt and completion have '答え: a</s>'"]),
        (PLAIN, pair(says("答え: a", reasoning_content="低い。")), ["'chosen[0].reasoning_content'", "from '低い。' on"]),
        (PLAIN, pair(says("答え: a", thinking="低い。")), ["'chosen[0].thinking'"]),
        (PLAIN, pair(says("答え: a", tool_calls=[{"name": "f"}])), ["'chosen.tool_calls'", "leaves it out"]),
        (DROPS_SYSTEM, pair(says("答え: a"), SYSTEM, user()), ["'prompt[0].content'", "from '医師として 答える。' on"]),
        (turns(NO_SYSTEM + "{{ m.content }}"), pair(says("a"), SYSTEM, user()), ["fails: System role not supported"]),
        (ESCAPES, pair(says("答え: a")), ["'prompt[0].content'", "leaves out or changes", "from '< 。' on"]),
        (QWEN3, pair(says("a")) | {"chosen": [says(THOUGHT + "a"), says("b")]}, ["'chosen[0].content'", "leaves out"]),
    ],
)
def test_what_is_learned_and_what_system_and_user_say_must_stand_in_the_text(tmp_path, template, row, words):
    with pytest.raises(InputError) as caught:
        load(tmp_path, template, row)
    assert all(word in str(caught.value) for word in ["row 1: ", *words]), caught.value


def test_rows_of_which_something_is_left_out_are_dropped_if_told_and_counted(tmp_path):
    rows = [pair(says("答え: a")), pair(says(THOUGHT + "a"))]
    with pytest.raises(InputError, match="row 2: .*unusable rows: 1 left out by the chat template"):
        load(tmp_path, turns(LAST_PART), *rows)
    pairs = load(tmp_path, turns(LAST_PART), *rows, unusable="drop")
    assert pairs.rows.tolist() == [1] and pairs.refused["left out by the chat template"][0] == 1


@pytest.mark.parametrize(
    ("template", "row", "chosen"),
    [
        (turns("{{ m.content | trim }}"), pair(says(" 答え: a \n")), "答え: a"),
        (QWEN3, pair(says("<think>低い。</think>答え: a")), THOUGHT + "a"),
        (QWEN3, pair(says("答え: a", reasoning_content="低い。")), THOUGHT + "a"),
        (QWEN3.replace("<assistant>", "<assistant><think>\n"), pair(says(THOUGHT + "a")), "低い。\n</think>\n\n答え: a"),
        (MERGED, pair(says("答え: a"), SYSTEM, user()), " 答え: a"),
        (PLAIN, pair(says("答え: a", tool_calls=[], name=""), user(name=None)), "答え: a"),
    ],
)
def test_what_only_stands_elsewhere_or_in_other_white_space_is_neither_refused_nor_noted(tmp_path, template, row, chosen):
    pairs = load(tmp_path, template, row)
    assert byte_tokenizer("").decode(pairs.chosen(0)) == chosen + "</s>"
    assert pairs.noted == {} and pairs.refused == {}


def test_earlier_reasoning_unknown_keys_and_unread_columns_are_noted(tmp_path):
    history = [user(), says(THOUGHT + "b"), user("次は")]
    rows = [
        pair(says("答え: a"), *history),
        pair(says("答え: a", weight=0), user(name="Ann")) | {"tools": [{"name": "f"}], "system": ""},
    ]
    expected = {
        HISTORY_SHORTENED: 1,
        KEY_LEFT_OUT.format("name"): 1,
        KEY_LEFT_OUT.format("weight"): 1,
        COLUMN_UNREAD.format("tools"): 1,
    }
    pairs = load(tmp_path, turns(LAST_PART), *rows)
    assert pairs.noted == expected and len(describe(pair_ledger([pairs]))) == 4
    assert load(tmp_path, turns("{{ m.name }}{{ m.content }}"), rows[1]).noted == {key: 1 for key in list(expected)[2:]}
    strings = {"prompt": "どれか", "chosen": "a", "rejected": "b", "system": "医師として答える。"}
    pq.write_table(pa.Table.from_pylist([strings]), tmp_path / "a.parquet")
    pairs = load_pairs(Source(str(tmp_path / "a.parquet")), byte_tokenizer(PLAIN), max_length=100)
    assert pairs.noted == {COLUMN_UNREAD.format("system"): 1}


def test_what_is_left_out_begins_at_the_first_word_that_is_missing():
    assert left_out(" a \n b", "xaby") is None
    assert left_out("a b c d", "xabyc") == "c d" and left_out("a b", "ab", start=1) == "a b"


def rendered(tokenizer):
    return tokenizer.apply_chat_template([user("薬")], tokenize=False)


def test_a_date_is_fixed_in_a_copy_and_other_templates_are_not_touched():
    plain, dated = byte_tokenizer(PLAIN), byte_tokenizer(DATED)
    assert fix_time(plain, YESTERDAY) is plain
    fixed = fix_time(dated, YESTERDAY)
    assert rendered(fixed) == "<system>Today Date: 06 Jul 2024</s><user>薬</s>"
    assert dated.chat_template == DATED and "2024" not in rendered(dated)
    several = byte_tokenizer({"default": '{{ strftime_now( "%H:%M %% %j" ) }}', "tool_use": DATED})
    assert rendered(fix_time(several, YESTERDAY)) == "08:09 % 188"


# A word of the tests' tokenizer for the year, so that another date makes other tokens.
YEAR = "{{ '熱' if strftime_now('%Y') == '2024' else '咳' }} {% for m in messages %} {{ m.content }} </s> {% endfor %}"


def test_a_run_begun_yesterday_goes_on_today_with_the_same_tokens(rpo_tree, tokenizer_dir, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))
    tokenizer = read_tokenizer(folder)
    tokenizer.chat_template = YEAR
    tokenizer.save_pretrained(folder)
    chats = [{"prompt": [user(f"薬 は {word}")], "chosen": [says("答え a")], "rejected": [says("答え b")]} for word in "abc"]
    question = {"problem_id": "1", "problem_text": "薬 は", "choices": ["熱", "咳"], "answer": ["a"], "points": "1"}
    rpo_tree["model"]["tokenizer"] = str(folder)
    rpo_tree["data"]["pairs"] = [{"path": str(write_jsonl(tmp_path / "chats.jsonl", chats))}]
    rpo_tree["data"]["exam"] = str(write_jsonl(tmp_path / "exam.jsonl", [question]))
    rpo_tree["eval"] = {"exam_chat": True, "exam_max_new_tokens": 2, "exam_max_answer_tokens": 2}
    rpo_tree["optim"] |= {"steps": 1, "batch_pairs": 2, "micro_batch_tokens": 256}
    out = RunFolder(tmp_path / "run")
    monkeypatch.setattr(run_folder, "now", lambda: YESTERDAY)
    run("rpo", rpo_tree, out.root)
    monkeypatch.undo()
    digest = json.loads(out.manifest.read_text())["digests"]["data.pairs.0"]
    for path in (out.exam(1), *out.model.iterdir()):
        path.unlink()
    out.model.rmdir()
    shutil.rmtree(out.checkpoints)
    run("rpo", rpo_tree, out.root)
    manifest = json.loads(out.manifest.read_text())
    first, second = manifest["starts"]
    assert manifest["digests"]["data.pairs.0"] == digest
    assert datetime.fromisoformat(first["time"]) == YESTERDAY < datetime.fromisoformat(second["time"])
    assert all(row["prompt"].startswith("熱") for rows in read_outputs(out.exam(1)).values() for row in rows)
    assert read_tokenizer(out.model).chat_template == YEAR
    run("rpo", rpo_tree, tmp_path / "today")
    assert RunFolder(tmp_path / "today").starts()[0]["time"] != first["time"]
    assert json.loads((tmp_path / "today" / "manifest.json").read_text())["digests"]["data.pairs.0"] != digest
