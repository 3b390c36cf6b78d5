"""Reading exam files: both forms, the quirks of the real exams, and errors that say where they are."""

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from medtrain.trainer.errors import InputError
from medtrain.trainer.exam.questions import load_questions

DATA = Path(__file__).parents[4] / "shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the examination data is not at {DATA}")

ROW = {
    "problem_id": "900A1",
    "problem_text": "ルマ熱で正しいのはどれか。",
    "choices": ["青い薬", "赤い薬", "白い薬"],
    "text_only": True,
    "answer": ["b"],
    "points": "1",
}


def load(tmp_path, *rows, **settings):
    path = tmp_path / "exam.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return load_questions(path, **settings)


def test_a_row_becomes_a_question(tmp_path):
    (q,) = load(tmp_path, ROW | {"points": 3, "kinki": ["c"], "explanation": "赤い薬が効く。", "year": 2099})
    assert (q.problem_id, q.letters, q.answer, q.points, q.kinki) == ("900A1", "abc", ("b",), 3, ("c",))
    assert (q.explanation, q.year, q.section, q.text_only) == ("赤い薬が効く。", 2099, "900-A", True)


def test_the_other_exam_form_is_read(tmp_path):
    row = {"question_id": "120A-1", "context": "次を読め。", "question_text": "どれか。", "choices": ["ア", "イ"]}
    (q,) = load(tmp_path, row | {"answer": ["a"], "points": 1})
    assert (q.problem_id, q.problem_text, q.year, q.section) == ("120A-1", "次を読め。\nどれか。", 2026, "120-A")


def test_answers_may_be_one_text(tmp_path):
    rows = [ROW | {"problem_id": str(i), "answer": a} for i, a in enumerate(["b", "a,c", "a or c", ["a or c"]])]
    assert [q.accepted for q in load(tmp_path, *rows)] == [(("b",),), (("a", "c"),), (("a",), ("c",)), (("a",), ("c",))]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("求めよ。解答：①②Torr", "26", "26"),
        ("求めよ。解答：①.②", "1.2", "1.2"),
        ("求めよ。解答：①.②", "04", "0.4"),
        ("求めよ。解答：①②.③/人口1,000対", "100", "10"),
        ("求めよ。解答：1, ①②③ kcal", "130", "1130"),
        ("求めよ。\n解答：①．②③ g/gCr", "0.40", "0.4"),
        ("求めよ。", "-3.5", "-3.5"),
    ],
)
def test_a_numeric_key_is_read_through_the_boxes_of_the_answer_sheet(tmp_path, text, key, value):
    (q,) = load(tmp_path, ROW | {"problem_text": text, "choices": [], "answer": [key]})
    assert q.is_numeric and q.answer == (key,) and q.sheet_number == Decimal(value)


def test_line_separators_inside_texts_and_blank_lines_break_nothing(tmp_path):
    questions = load(tmp_path, ROW | {"problem_text": "あ\u2028い\x85う"}, b"", b"  ", ROW | {"problem_id": "2"})
    assert [q.problem_id for q in questions] == ["900A1", "2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem_id": None}, "row 2: field 'problem_id': wrong type"),
        ({"problem_id": 1}, "row 2: field 'problem_id': wrong type (found 1; expected a text)"),
        ({"problem_id": "900A1"}, "row 2: field 'problem_id': the same id as in row 1 (found 900A1)"),
        ({"problem_text": ...}, "row 2: field 'problem_text': missing"),
        ({"problem_text": " "}, "row 2: field 'problem_text': empty"),
        ({"choices": ...}, "row 2: field 'choices': missing"),
        ({"choices": "ア"}, "row 2: field 'choices': wrong type"),
        ({"choices": ["ア", 1]}, "row 2: field 'choices': wrong type (found 1"),
        ({"choices": ["ア"]}, "row 2: field 'choices': wrong number of choices"),
        ({"answer": ...}, "row 2: field 'answer': missing"),
        ({"answer": []}, "row 2: field 'answer': wrong type"),
        ({"answer": 2}, "row 2: field 'answer': wrong type"),
        ({"answer": ["d"]}, "row 2: field 'answer': not a letter of the choices (found d; expected letters a to c)"),
        ({"answer": ["a", "a"]}, "row 2: field 'answer': a letter occurs twice"),
        ({"answer": ["a or x"]}, "row 2: field 'answer': not a letter of the choices (found x"),
        ({"choices": [], "answer": ["a"]}, "row 2: field 'answer': not a number"),
        ({"choices": [], "answer": ["1", "2"]}, "row 2: field 'answer': not a number"),
        ({"points": ...}, "row 2: field 'points': missing"),
        ({"points": "x"}, "row 2: field 'points': not a number"),
        ({"points": -1}, "row 2: field 'points': negative"),
        ({"points": True}, "row 2: field 'points': wrong type"),
        ({"text_only": "yes"}, "row 2: field 'text_only': wrong type"),
        ({"kinki": ["d"]}, "row 2: field 'kinki': not a letter of the choices"),
        ({"explanation": 1}, "row 2: field 'explanation': wrong type"),
    ],
)
def test_a_wrong_row_is_named_with_its_field(tmp_path, change, message):
    row = {k: v for k, v in (ROW | {"problem_id": "2"} | change).items() if v is not ...}
    with pytest.raises(InputError) as error:
        load(tmp_path, ROW, row)
    assert str(error.value).startswith(f"{tmp_path}/exam.jsonl: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "row 2: not valid JSON"),
        (b"[" * 100_000, "row 2: not valid JSON"),
        (b'"a"', "row 2: not a JSON object"),
        ("問".encode("cp932"), "row 2: not UTF-8"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, ROW, line)


def test_files_without_questions_are_named(tmp_path):
    with pytest.raises(InputError, match="no questions"):
        load(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        load_questions(tmp_path)


def test_points_may_be_left_out_only_where_nothing_is_scored(tmp_path):
    row = {k: v for k, v in ROW.items() if k != "points"}
    assert load(tmp_path, row, points_required=False)[0].points == 1


@needs_data
def test_the_real_exams_have_their_known_counts():
    questions = [q for year in range(2018, 2023) for q in load_questions(DATA / f"igakuqa/{year}.jsonl")]
    assert len(questions) == 2000 and sum(q.points for q in questions) == 2485
    assert sum(q.text_only for q in questions) == 1471 and sum(bool(q.kinki) for q in questions) == 135
    assert sum(q.is_numeric for q in questions) == 12 and sum(q.points == 0 for q in questions) == 11
    assert Counter(len(q.choices) for q in questions)[5] == 2000 - 12 - 4
    assert all(q.explanation for q in load_questions(DATA / "igakuqa/prompt.jsonl", points_required=False))
    assert len(load_questions(DATA / "jmle2026/questions.jsonl")) == 277
