"""Prompt rendering, ground-truth completions, and where outputs end."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from medtrain.trainer.demo.texts import STYLE
from medtrain.trainer.errors import InputError
from medtrain.trainer.exam.parse import parse_output
from medtrain.trainer.exam.prompts import MODES, PromptStyle, Stop, load_style
from medtrain.trainer.exam.questions import Question
from medtrain.trainer.exam.scoring import is_right

ONE = Question("1", "ルマ熱に効くのはどれか。", ("青い薬", "赤い薬", "白い薬"), ("b",), explanation="赤い薬が効く。")
TWO = replace(ONE, problem_id="2", answer=("a", "c"))
EITHER = replace(ONE, problem_id="3", answer=("a or c",))
NUMBER = Question("4", "量を求めよ。解答：①②mL", (), ("26",), explanation="20と6を足す。")
PLAIN = PromptStyle(instruction_answer="", instruction_explain="")
WORLD = PromptStyle(
    question="exam : {text} ? {choices}",
    choice="{text}",
    choice_joint=" / ",
    answer_marker="so :",
    explain_marker="why :",
    joint=" ",
    shot_joint=" ",
    answer_as="text",
    answer_end=" .",
    stops=(" exam :",),
    instruction_answer="",
    instruction_explain="",
)


class Chat:
    chat_template, bos_token_id = "a template", None

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def test_a_plain_prompt_ends_where_the_answer_or_explanation_begins():
    block = "問題: ルマ熱に効くのはどれか。\na. 青い薬\nb. 赤い薬\nc. 白い薬\n"
    assert PLAIN.prompt(ONE, "answer", None) == block + "答え:"
    assert PLAIN.prompt(ONE, "explain", None) == block + "説明:"
    assert PLAIN.prompt(NUMBER, "answer", None) == "問題: 量を求めよ。解答：①②mL\n答え:"


def test_demonstrations_are_prompt_and_completion_in_one():
    for mode in MODES:
        shot = PLAIN.prompt(ONE, mode, None) + PLAIN.completion(ONE, mode)
        assert PLAIN.prompt(TWO, mode, None, [ONE]) == shot + "\n\n" + PLAIN.prompt(TWO, mode, None)
    assert PLAIN.completion(TWO, "explain") == " 赤い薬が効く。\n答え: a,c"
    assert PLAIN.completion(TWO, "answer") == " a,c"
    assert PLAIN.completion(EITHER, "answer") == " a"


def test_prompts_say_nothing_about_the_key():
    style = PromptStyle()
    for mode in MODES:
        prompts = {style.prompt(replace(q, problem_id="x"), mode, None) for q in (ONE, TWO, EITHER)}
        assert len(prompts) == 1


def test_a_chat_prompt_starts_the_assistants_turn():
    style = PromptStyle(chat=True, system="医師。")
    prompt = style.prompt(TWO, "explain", Chat(), [ONE])
    assert prompt.startswith("<system>医師。<user>次の") and prompt.endswith("c. 白い薬<assistant>")
    assert "<assistant>赤い薬が効く。\n答え: b<user>" in prompt
    assert style.completion(TWO, "answer") == "答え: a,c"
    with pytest.raises(InputError, match="no chat template"):
        style.prompt(ONE, "answer", SimpleNamespace(chat_template=None))


def test_a_bos_that_the_tokenizer_adds_by_itself_is_written_out(tokenizer):
    assert PLAIN.prompt(ONE, "answer", tokenizer).startswith("問題")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    for named in ({"bos_token": "<s>"}, {}):
        bos = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **named)
        assert PLAIN.prompt(ONE, "answer", bos).startswith("<s>問題")


@pytest.mark.parametrize(
    "style", [PLAIN, PromptStyle(), PromptStyle(chat=True), WORLD, load_style("official"), load_style("official", chat=True)]
)
@pytest.mark.parametrize("question", [ONE, TWO, EITHER, NUMBER])
@pytest.mark.parametrize("mode", MODES)
def test_every_ground_truth_completion_parses_as_right_and_survives_its_stop_rule(style, question, mode):
    completion = style.completion(question, mode)
    text, stopped = style.stop(mode).cut(completion + style.answer_end + " more")
    assert style.chat or (text, stopped) == (completion, True)
    assert is_right(question, parse_output(completion, question, **style.parse_settings(mode)))


def test_the_made_up_worlds_style_runs_through_the_same_code():
    assert WORLD.prompt(ONE, "answer", None) == "exam : ルマ熱に効くのはどれか。 ? 青い薬 / 赤い薬 / 白い薬 so :"
    assert WORLD.completion(ONE, "explain") == " 赤い薬が効く。 so : 赤い薬"


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (Stop(("\n問題:",)), "答え: a\n問題: 次", ("答え: a", True)),
        (Stop(("x", "y")), "ayx", ("a", True)),
        (Stop(), "a\nb", ("a\nb", False)),
        (Stop((), "答え:"), "説明\n答え: a\n続き", ("説明\n答え: a", True)),
        (Stop((), "答え:"), "説明\n答え:\n\na\n続き", ("説明\n答え:\n\na", True)),
        (Stop((), "答え:"), "説明\n答え: a", ("説明\n答え: a", False)),
        (Stop((), ""), "\n a\n続き", ("\n a", True)),
        (Stop((), ""), "\n \n", ("\n \n", False)),
    ],
)
def test_an_output_ends_at_the_first_stop_or_after_its_answer(stop, text, expected):
    assert stop.cut(text) == expected


OFFICIAL = load_style("official")


def test_the_official_prompt_is_that_of_the_official_scripts():
    # As written out by create_input of scripts/generation/gpt3.py and chatgpt.py of IgakuQA, for these questions.
    one = "問題: ルマ熱に効くのはどれか。\na: 青い薬\nb: 赤い薬\nc: 白い薬\n"
    one += "必ずa,b,c,d,eの中からちょうど1個選んでください。\n答え:"
    two = one.replace("ちょうど1個", "ちょうど2個")
    assert OFFICIAL.prompt(TWO, "answer", None, [ONE]) == f"{one}\nb\n{two}"
    chat = load_style("official", chat=True)
    assert chat.prompt(TWO, "answer", Chat(), [ONE]) == (
        f"<system>医師国家試験を解きます。<user>{one}<assistant>b<user>{two}<assistant>"
    )
    assert chat.prompt(ONE, "explain", Chat()).endswith("ちょうど1個選んでください。\n説明:<assistant>")
    assert "個選んで" not in OFFICIAL.prompt(NUMBER, "answer", None)


def test_only_the_official_prompt_tells_how_many_answers_are_right():
    for name in ("default", "english", "demo", "official"):
        style = load_style(name)
        for mode in MODES:
            prompts = {style.prompt(replace(q, problem_id="x"), mode, None) for q in (ONE, TWO)}
            assert len(prompts) == (2 if name == "official" else 1), name


def test_named_styles_are_files_and_the_default_and_the_demos_are_those_in_use():
    assert load_style("default") == load_style(None) == PromptStyle()
    assert load_style("demo") == STYLE
    assert load_style("english", chat=True).chat and not load_style("english").chat
    for mode in MODES:
        completion = load_style("english").completion(ONE, mode)
        parsed = parse_output(completion, ONE, **load_style("english").parse_settings(mode))
        assert parsed.letters == ("b",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("answer_as: x", "answer_as"),
        ("question: '{texts}'", "question"),
        ("choice: '{letter}'", "choice"),
        ("count_line: '{n}'", "count_line"),
        ("answer_marker: ''", "answer_marker"),
        ("answer_markers: x", "nearest known key, 'answer_marker'"),
        ("stops: x", "stops"),
        ("lead: 3", "lead"),
        ("[1]", "not a config"),
    ],
)
def test_a_wrong_style_file_is_refused_by_the_name_of_the_setting(tmp_path, text, message):
    (tmp_path / "style.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        load_style(tmp_path / "style.yaml")
    assert message in str(error.value)


def test_wrong_requests_are_refused(tmp_path):
    (tmp_path / "style.yaml").write_text("stops: [x]\nlead: ''")
    assert load_style(tmp_path / "style.yaml") == PromptStyle(stops=("x",), lead="")
    with pytest.raises(InputError, match="no such prompt style .found nowhere; expected default, demo, english, official"):
        load_style("nowhere")
    with pytest.raises(InputError, match="needs an explanation"):
        PLAIN.completion(replace(ONE, explanation=None), "explain")
