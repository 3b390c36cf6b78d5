"""The official rule, its figures, and what a predictions file may hold."""

import json
from pathlib import Path

import pytest

from medtrain.trainer.errors import InputError
from medtrain.trainer.exam.questions import Question, load_questions
from medtrain.trainer.exam.scoring import load_predictions, run_score, score_rows, summarize, summarize_groups

IGAKUQA = Path(__file__).parents[4] / "shared/data/igakuqa"
needs_igakuqa = pytest.mark.skipif(not IGAKUQA.is_dir(), reason=f"the examination data is not at {IGAKUQA}")

ONE = Question("1", "どれか。", ("ア", "イ", "ウ", "エ", "オ"), ("c",), points=1, kinki=("e",))
TWO = Question("2", "2つ選べ。", ("ア", "イ", "ウ", "エ", "オ"), ("a", "c"), points=3)
EITHER = Question("112B30", "どれか。", ("ア", "イ", "ウ", "エ", "オ"), ("a or d",), points=3)
ALWAYS = Question("116A71", "どれか。", ("ア", "イ", "ウ", "エ", "オ"), ("e",), points=1)
WITHDRAWN = Question("3", "どれか。", ("ア", "イ"), ("a",), points=0)
NUMBER = Question("4", "求めよ。解答：①.②", (), ("04",), points=1)


def score(questions, predictions):
    return summarize_groups(questions, score_rows(questions, predictions))


def one(question, **row):
    return score([question], {question.problem_id: row})


@needs_igakuqa
@pytest.mark.parametrize("model", ["gpt4", "chatgpt"])
def test_every_published_figure_is_reproduced(model):
    expected = json.loads((IGAKUQA / "baseline_results/expected_scores.json").read_text())[model]
    questions, predictions = [], {}
    for year in range(2018, 2023):
        ours = load_questions(IGAKUQA / f"{year}.jsonl")
        questions += ours
        for file in sorted((IGAKUQA / f"baseline_results/{year}").glob(f"*_{model}.jsonl")):
            predictions |= load_predictions(file, ours)
    result = score(questions, predictions)
    groups = result["by_section"] | result["by_year"] | {"all": result}
    assert set(groups) == set(expected)
    for name, figures in expected.items():
        ours = groups[name]
        found = {"accuracy": ours["accuracy"], "correct": ours["correct"], "count": ours["questions"]}
        found |= {"score": ours["points"], "total": ours["max_points"]}
        if name == "all":
            found["mean_score_per_year"] = ours["mean_points_per_year"]
        assert found == figures, name
    assert result["missing"] == 0


@needs_igakuqa
def test_the_official_key_itself_gets_every_point():
    for year in range(2018, 2023):
        questions = load_questions(IGAKUQA / f"{year}.jsonl")
        keys = {q.problem_id: q.answer[0].split(" or ")[0] if " or " in q.answer[0] else ",".join(q.answer) for q in questions}
        for rows in ({"prediction": ""}, {"output": "答え: "}):
            (field, before), *_ = rows.items()
            result = score(questions, {i: {field: before + key} for i, key in keys.items()})
            assert (result["points"], result["correct"]) == (result["max_points"], 400)
            assert (result["parse_failures"], result["forbidden_choices"]) == (0, 0)


def test_letters_count_in_any_order_and_only_all_of_them():
    assert one(TWO, prediction="c,a")["points"] == 3
    assert one(TWO, prediction="a")["points"] == one(TWO, prediction="a,b,c")["points"] == 0
    assert one(TWO, output="答え: c、a")["points"] == 3


def test_a_prediction_is_held_to_the_official_form():
    for prediction in ("a, c", "A,C", "ac", "a,c,c"):
        assert one(TWO, prediction=prediction)["correct"] == 0
    assert one(TWO, prediction="a, c")["parse_failures"] == 1


def test_either_letter_counts_where_the_key_says_or():
    for letter, right in zip("abcd", (1, 0, 0, 1), strict=True):
        assert one(EITHER, prediction=letter)["correct"] == right
        assert one(EITHER, output=f"答え: {letter}")["correct"] == right
    assert one(EITHER, prediction="a,d")["correct"] == 0
    assert one(EITHER, prediction="a or d")["correct"] == 1  # the official scorer compares with the key itself too


def test_the_void_question_counts_for_every_answer_but_not_for_none():
    assert one(ALWAYS, prediction="a")["correct"] == one(ALWAYS, output="わからない")["correct"] == 1
    assert one(ALWAYS, output="わからない")["parse_failures"] == 1
    assert score([ALWAYS], {})["correct"] == 0


def test_a_missing_prediction_is_wrong_and_counted():
    result = score([ONE, TWO], {"1": {"prediction": "c"}})
    assert (result["points"], result["max_points"], result["correct"], result["questions"]) == (1, 4, 1, 2)
    assert (result["missing"], result["parse_failures"], result["points_ratio"]) == (1, 0, 0.25)


def test_a_forbidden_choice_is_counted_once_a_question():
    assert one(ONE, prediction="e")["forbidden_choices"] == one(ONE, output="答え: a,e")["forbidden_choices"] == 1
    assert one(ONE, prediction="c")["forbidden_choices"] == 0


def test_a_withdrawn_question_counts_as_correct_and_gives_no_points():
    result = one(WITHDRAWN, prediction="a")
    assert (result["correct"], result["points"], result["max_points"], result["points_ratio"]) == (1, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"prediction": "04"}, 1),
        ({"prediction": "0.4"}, 0),
        ({"output": "答え: 0.4"}, 1),
        ({"output": "答え: 04"}, 1),
        ({"output": "答え: 0.40"}, 1),
        ({"output": "答え: 4"}, 0),
        ({"output": "答え: ①0 ②4"}, 1),
        ({"output": "答え: a"}, 0),
    ],
)
def test_numbers_count_by_the_boxes_of_the_answer_sheet(row, right):
    assert one(NUMBER, **row)["correct"] == right


def test_no_questions_sum_up_to_zero():
    assert summarize([], [])["points_ratio"] == summarize([], [])["accuracy"] == 0.0


EXAM_ROW = {"problem_id": "1", "problem_text": "どれか。", "choices": ["ア", "イ"], "answer": ["a"], "points": "1"}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_score_writes_one_detail_a_question(tmp_path):
    exam = write(tmp_path / "exam.jsonl", EXAM_ROW, EXAM_ROW | {"problem_id": "2"}, EXAM_ROW | {"problem_id": "3"})
    predictions = write(
        tmp_path / "p.jsonl", {"problem_id": "3", "output": "うーん"}, {"problem_id": "1", "output": "理由。\n答え: ａ"}
    )
    result = run_score(exam, predictions, tmp_path / "new/details.jsonl")
    assert (result["correct"], result["questions"], result["missing"], result["parse_failures"]) == (1, 3, 1, 1)
    rows = [json.loads(line) for line in (tmp_path / "new/details.jsonl").read_text().splitlines()]
    assert [(r["problem_id"], r["parsed"], r["correct"]) for r in rows] == [
        ("1", ["a"], True),
        ("2", None, False),
        ("3", None, False),
    ]
    assert rows[0]["read_from"] == "答え: ａ"
    assert not list(tmp_path.glob("**/*.part*"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "p.jsonl: row 1: not valid JSON"),
        (["[1]"], "row 1: not a JSON object"),
        ([{"prediction": "a"}], "row 1: field 'problem_id': missing"),
        ([{"problem_id": "9", "prediction": "a"}], "row 1: field 'problem_id': the exam has no such question (found 9"),
        ([{"problem_id": "1", "prediction": "a"}] * 2, "row 2: field 'problem_id': the same id as in row 1"),
        ([{"problem_id": "1"}], "row 1: one of 'prediction' and 'output' is needed (found neither"),
        ([{"problem_id": "1", "prediction": "a", "output": "a"}], "(found both"),
        ([{"problem_id": "1", "prediction": 1}], "row 1: field 'prediction': wrong type (found 1; expected a text"),
        ([{"problem_id": "1", "output": None}], "row 1: field 'output': wrong type"),
    ],
)
def test_a_wrong_predictions_file_is_named_with_its_row_and_field(tmp_path, rows, message):
    exam = write(tmp_path / "exam.jsonl", EXAM_ROW)
    with pytest.raises(InputError) as error:
        run_score(exam, write(tmp_path / "p.jsonl", *rows))
    assert message in str(error.value)


def test_a_list_of_letters_is_the_same_prediction(tmp_path):
    exam = write(tmp_path / "exam.jsonl", EXAM_ROW)
    assert run_score(exam, write(tmp_path / "p.jsonl", {"problem_id": "1", "prediction": ["a"]}))["correct"] == 1
