"""Exams in other forms: MedQA, MedMCQA, and any CSV or JSON Lines file through a mapping."""

import json
from pathlib import Path

import pytest
from helpers import write_jsonl

from medtrain.trainer.errors import InputError
from medtrain.trainer.exam.questions import load_questions

CONFIGS = Path(__file__).parents[3] / "configs"
MEDQA = {
    "question": "A man coughs. Which drug?",
    "answer": "Red",
    "answer_idx": "B",
    "meta_info": "step1",
    "options": {"A": "Blue", "B": "Red", "C": "White"},
}
MEDMCQA = {
    "id": "m1",
    "question": "Which vitamin?",
    "opa": "A",
    "opb": "B",
    "opc": "C",
    "opd": "D",
    "cop": 0,
    "exp": "Since.",
    "choice_type": "single",
    "subject_name": "Made up",
}


def test_medqa_rows_are_known(tmp_path):
    first, second = load_questions(write_jsonl(tmp_path / "q.jsonl", [MEDQA, MEDQA | {"answer_idx": "C"}]))
    assert (first.problem_id, first.problem_text, first.choices) == ("1", MEDQA["question"], ("Blue", "Red", "White"))
    assert (first.answer, second.answer, first.points, second.problem_id) == (("b",), ("c",), 1, "2")


def test_medmcqa_keys_count_from_where_the_file_shows(tmp_path):
    hub = [MEDMCQA, MEDMCQA | {"id": "m2", "cop": 2}]
    own = [MEDMCQA | {"cop": 4}, MEDMCQA | {"id": "m2", "cop": 2, "exp": None}]
    assert [q.answer for q in load_questions(write_jsonl(tmp_path / "hub.jsonl", hub))] == [("a",), ("c",)]
    questions = load_questions(write_jsonl(tmp_path / "own.jsonl", own))
    assert [(q.problem_id, q.answer, q.explanation) for q in questions] == [("m1", ("d",), "Since."), ("m2", ("b",), None)]
    for keys in ((1, 2), (0, 4)):
        rows = [MEDMCQA | {"id": str(key), "cop": key} for key in keys]
        with pytest.raises(InputError, match=r"'cop': whether keys count from 0 or from 1 does not show"):
            load_questions(write_jsonl(tmp_path / "q.jsonl", rows))
    with pytest.raises(InputError, match="row 2: field 'cop': not the number of a choice"):
        load_questions(write_jsonl(tmp_path / "q.jsonl", [MEDMCQA, MEDMCQA | {"id": "x", "cop": -1}]))


CSV = """\
id,case,question,A,B,C,D,E,key,points,forbidden,explanation,text_only
q1,"A man,
30 years old.",Which two?,x,y,z,,,"A, C",3,b,Because.,true
q2,-,How much?,,,,,,26,1,,,false
"""


def test_a_csv_file_is_read_through_the_shipped_mapping(tmp_path):
    (tmp_path / "exam.csv").write_text(CSV, encoding="utf-8-sig")
    one, two = load_questions(tmp_path / "exam.csv", mapping=CONFIGS / "exams/csv.yaml")
    assert one.problem_text == "A man,\n30 years old.\nWhich two?"
    assert (one.choices, one.answer, one.points, one.kinki) == (("x", "y", "z"), ("a", "c"), 3, ("b",))
    assert (one.explanation, one.text_only, two.text_only, two.is_numeric, two.answer) == ("Because.", True, False, True, ("26",))


def mapped(tmp_path, mapping, *rows):
    (tmp_path / "map.yaml").write_text(mapping)
    return load_questions(write_jsonl(tmp_path / "q.jsonl", rows), mapping=tmp_path / "map.yaml")


BASE = "{problem_text: q, choices: c, answer: k, answer_as: %s}"
ROW = {"q": "Which?", "c": ["x", "y", "z"], "k": "y"}


@pytest.mark.parametrize(
    ("answer_as", "key", "letters"),
    [
        ("text", "y", ("b",)),
        ("text", ["z", " x "], ("c", "a")),
        ("letters", "B", ("b",)),
        ("letters", "A;C", ("a", "c")),
        ("letters", ["a", "b"], ("a", "b")),
        ("index0", 2, ("c",)),
        ("index1", "2", ("b",)),
        ("index1", [1, 3], ("a", "c")),
        ("index0", "0,1", ("a", "b")),
    ],
)
def test_keys_are_read_as_the_mapping_says(tmp_path, answer_as, key, letters):
    (question,) = mapped(tmp_path, BASE % answer_as, ROW | {"k": key})
    assert question.answer == letters


@pytest.mark.parametrize(
    ("answer_as", "change", "message"),
    [
        ("text", {"k": "w"}, "row 1: field 'k': not the text of one choice (found w"),
        ("text", {"c": ["y", "y"]}, "field 'k': not the text of one choice"),
        ("letters", {"k": "d"}, "field 'k': not a letter of the choices (found d; expected letters a to c"),
        ("letters", {"k": 1}, "field 'k': wrong type"),
        ("index1", {"k": 0}, "field 'k': not the number of a choice (found 0; expected 1 to 3 (answer_as: index1))"),
        ("index0", {"k": "b"}, "field 'k': not the number of a choice"),
        ("letters", {"k": ""}, "field 'k': empty"),
        ("letters", {"q": None}, "field 'q': empty"),
        ("letters", {"c": "x"}, "field 'c': wrong type"),
        ("letters", {"c": {"B": "x", "A": "y"}}, "field 'c': not the letters from A on"),
    ],
)
def test_a_wrong_mapped_row_is_named_by_its_own_field(tmp_path, answer_as, change, message):
    with pytest.raises(InputError) as error:
        mapped(tmp_path, BASE % answer_as, ROW | change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("{choices: c, answer: k}", "field 'problem_text': missing"),
        ("{problem_text: q, choices: c, answer: k, key: k}", "field 'key': unknown key"),
        ("{problem_text: q, choices: 3, answer: k}", "field 'choices': wrong type"),
        ("{problem_text: q, choices: c, answer: [k]}", "field 'answer': wrong type"),
        ("{problem_text: q, choices: c, answer: k, answer_as: number}", "field 'answer_as': not a known choice"),
        ("{problem_text: gone, choices: c, answer: k}", "field 'problem_text': no row of the exam has this field (found gone"),
    ],
)
def test_a_wrong_mapping_is_named(tmp_path, mapping, message):
    with pytest.raises(InputError) as error:
        mapped(tmp_path, mapping, ROW)
    assert message in str(error.value)


def test_csv_files_that_cannot_be_read_are_named(tmp_path):
    for text, message in (
        ("id,q\n1,2\n", "which columns hold what is not known"),
        (CSV + "q3,x\n", "row 5: not as many cells as the header"),
        (CSV.replace("x,y,z,,", "x,,z,,"), "field 'B': empty, and a later choice is not"),
        (CSV.replace("true", "yes"), "field 'text_only': wrong type"),
        (CSV.replace("q2", "q1"), "the same id as in row 3"),
        ('id,"q\n1', "not a CSV file"),
    ):
        (tmp_path / "exam.csv").write_text(text)
        mapping = None if text.startswith("id,q\n") else CONFIGS / "exams/csv.yaml"
        with pytest.raises(InputError) as error:
            load_questions(tmp_path / "exam.csv", mapping=mapping)
        assert message in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "cp.csv").write_bytes("問,q\n".encode("cp932"))
    with pytest.raises(InputError, match="UTF-8"):
        load_questions(tmp_path / "cp.csv", mapping=CONFIGS / "exams/csv.yaml")


def test_medmcqa_as_csv_needs_no_mapping(tmp_path):
    (tmp_path / "q.csv").write_text("id,question,opa,opb,opc,opd,cop,exp\nm,Which?,w,x,y,z,4,\n")
    assert load_questions(tmp_path / "q.csv")[0].answer == ("d",)


@pytest.mark.parametrize("setting", ["problem_text", "choices", "answer", "points", "kinki", "explanation", "text_only"])
def test_a_name_that_no_row_has_is_refused_and_not_taken_for_empty(setting, tmp_path):
    (tmp_path / "exam.csv").write_text("nr,frage,o1,o2,o3,key,pkt\n1,Which?,x,y,z,a,2\n", encoding="utf-8")
    right = {"problem_id": "nr", "problem_text": "frage", "choices": ["o1", "o2", "o3"], "answer": "key", "points": "pkt"}
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(json.dumps(right))
    (question,) = load_questions(tmp_path / "exam.csv", mapping=mapping)
    assert (question.choices, question.points) == (("x", "y", "z"), 2)
    mapping.write_text(json.dumps(right | {setting: ["o1", "o2", "o33"] if setting == "choices" else "nix"}))
    name = "o33" if setting == "choices" else "nix"
    with pytest.raises(InputError, match=rf"mapping\.yaml: field '{setting}': no row .*found {name}; expected one of nr, frage"):
        load_questions(tmp_path / "exam.csv", mapping=mapping)


def test_files_that_are_no_exam_are_named_for_what_they_are(tmp_path):
    (tmp_path / "exam.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"not a form of exam that is read \(found \.xlsx; expected \.jsonl, \.csv or \.tsv"):
        load_questions(tmp_path / "exam.xlsx")
    (tmp_path / "empty.csv").write_text("id,question\n")
    with pytest.raises(InputError, match=r"no questions \(expected one question per row"):
        load_questions(tmp_path / "empty.csv")
