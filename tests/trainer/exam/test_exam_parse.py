"""What the answer parser reads, and what it refuses to guess."""

import json
import string
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtrain.trainer.exam.parse import parse_output
from medtrain.trainer.exam.questions import Question, load_questions

JMLE = Path(__file__).parents[4] / "shared/data/jmle2026"

FIVE = Question("X1", "ルマ熱で最も適切なのはどれか。", ("青い薬", "赤い薬", "白い薬", "赤い薬の点滴", "経過観察"), ("c",))
BLOOD = Question("X2", "血液型はどれか。", ("B", "A", "O", "AB"), ("a",))
NUMERIC = Question("X3", "総量を求めよ。解答：①②mL", (), ("26",))
DECIMAL = Question("X4", "比を求めよ。解答：①.②③", (), ("7.20",))
EXPLANATION = "ルマ熱では青い薬は無効である。a 誤り。b 誤り。c 正しい。"

READ = [
    # letters after a marker
    ("答え: c", "c"),
    ("答え:c", "c"),
    ("答え：ｃ", "c"),
    ("答え： Ｃ", "c"),
    ("答え c", "c"),
    ("答え→c", "c"),
    ("答え = c", "c"),
    ("答えはｃ", "c"),
    ("答えはcです。", "c"),
    ("答えは c である。", "c"),
    ("正解はcです", "c"),
    ("正解：c", "c"),
    ("正答: c", "c"),
    ("解答: c", "c"),
    ("【回答】c", "c"),
    ("【正解】ｃ", "c"),
    ("[答え] c", "c"),
    ("回答: 「c」", "c"),
    ("答え: (c)", "c"),
    ("答え：（ｃ）", "c"),
    ("答え: c)", "c"),
    ("答え: c.", "c"),
    ("答え: c。", "c"),
    ("答え: 'c'", "c"),
    ('答え: "c"', "c"),
    ("答え: ⓒ", "c"),
    ("**答え: c**", "c"),
    ("**答え:** c", "c"),
    ("答え: **c**", "c"),
    ("### 答え\nc", "c"),
    ("答え:\nc", "c"),
    ("答え: 選択肢c", "c"),
    ("最終的な答え: c", "c"),
    ("Answer: B", "b"),
    ("answer: b", "b"),
    ("Answer: (b)", "b"),
    ("Answer: b.", "b"),
    ("ANSWER - b", "b"),
    ("The answer is B.", "b"),
    ("The correct answer is (b).", "b"),
    ("Therefore, the answer is b because the others are wrong.", "b"),
    ("Final answer: b", "b"),
    ("The correct option is b.", "b"),
    ("Option b is the correct answer.", "b"),
    ("Option a is incorrect. Hence option (b) is correct.", "b"),
    ("Therefore, the best choice is b.", "b"),
    ("So the answer would be (b).", "b"),
    ("The answer to this question is b", "b"),
    ("Ans. b", "b"),
    ("\\boxed{b}", "b"),
    ("$\\boxed{\\text{b}}$", "b"),
    ('{"answer": "b"}', "b"),
    ('{"answer": ["a", "c"]}', "ac"),
    ("答え: ['a', 'c']", "ac"),
    # several letters
    ("答え: a,c", "ac"),
    ("答え: c,a", "ac"),
    ("答え: a, c", "ac"),
    ("答え：ａ、ｃ", "ac"),
    ("答え: 「a、c」", "ac"),
    ("答え: aとc", "ac"),
    ("答え: a・c", "ac"),
    ("答え: a および c", "ac"),
    ("答え: a と c です。", "ac"),
    ("答え: a c", "ac"),
    ("答え: ac", "ac"),
    ("答え: ace", "ace"),
    ("Answer: a and c", "ac"),
    ("Answer: (a), (c)", "ac"),
    ("Answer: (a) and (c)", "ac"),
    ("Answer: a, c, and e", "ace"),
    ("答え:\n- a\n- c", "ac"),
    ("答え: a,a", "a"),
    # the choice's text beside the letter, or in its place
    ("答え: c. 白い薬", "c"),
    ("答え: c 白い薬", "c"),
    ("答え: c（白い薬）", "c"),
    ("答え: c: 白い薬です。", "c"),
    ("答え: b 赤い薬, d 赤い薬の点滴", "bd"),
    ("答え: 白い薬", "c"),
    ("答え: 「白い薬」", "c"),
    ("答え： 白 い薬。", "c"),
    ("答えは白い薬です。", "c"),
    ("答え: 赤い薬", "b"),
    ("答え: 赤い薬の点滴", "d"),
    ("答え: 白い薬 (c)", "c"),
    ("答え: 青い薬、白い薬", "ac"),
    ("答え: c、白い薬が有効だからである。", "c"),
    ("答え: c (赤い薬は無効)", "c"),
    ("正答はc、eの2つである。", "ce"),
    ("答えは次のとおり。\n- c\n- e", "ce"),
    ("<answer>c</answer>", "c"),
    ("正しい選択肢は c です。", "c"),
    ("答え: c\nただし、eも検討した。", "c"),
    # beside an explanation
    (f"{EXPLANATION}\n答え: c", "c"),
    (f"答え: c\n{EXPLANATION}", "c"),
    (f"答え: c\n\n説明: {EXPLANATION}", "c"),
    (f"答え: c 理由: {EXPLANATION}", "c"),
    (f"c\n{EXPLANATION}", "c"),
    (f"c。{EXPLANATION}", "c"),
    (f"{EXPLANATION}\nc", "c"),
    (f"{EXPLANATION}\n\n(c)", "c"),
    (f"{EXPLANATION}よって、c。", "c"),
    (f"{EXPLANATION}したがって、cを選択する。", "c"),
    (f"{EXPLANATION}cが正解です。", "c"),
    ("最も適切なのはcである。", "c"),
    ("ルマ熱で最も適切なのは白い薬です。", "c"),
    ("答えはaと思われがちだが違う。\n答え: c", "c"),
    ("まず答えはbと考えた。しかし白い薬が要る。\n答え: c", "c"),
    ("答え: a\n見直した。\n最終的な答え: c", "c"),
    ("正解はaではない。\n正解はcです。", "c"),
    ("不正解: a\n答え: c", "c"),
    ("例: 答え: a\n答え: c", "c"),
    ("最後に「答え: a」のように書く。\n答え: c", "c"),
    ("<think>答え: a かもしれない</think>答え: c", "c"),
    ("答え: c<|im_end|>\n答え: a", "c"),
    ("a", "a"),
    (" c\n", "c"),
    ("a,c", "ac"),
    ("(c)", "c"),
    ("c. 白い薬", "c"),
    ("白い薬", "c"),
    ("- a\n- c", "ac"),
    # reasoning that speaks of the question, and of answers on the way
    ("The question: which drug? a is old. So answer c.\n\n答え: c", "c"),
    ("Question: which drug is best? Probably white.\nSo c.", "c"),
    ("Maybe a? So answer a. But the question: which is best? Thus c.\n答え: c", "c"),
    ("So answer c.", "c"),
    ("I'd say white. I'll choose c.", "c"),
    ("a is old, b is new. Therefore c.", "c"),
    # self-made questions after the answer
    ("答え: c\n\n問題: 次はどれか。\na. あ\nb. い\n答え: a", "c"),
    ("答え: c\n\n【問題】次はどれか。\n答え: a", "c"),
    ("答え: c\n\nQuestion: which?\nAnswer: a", "c"),
    ("答え: c\n\nQuestion 2\nAnswer: a", "c"),
    ("答え: c\n### 問題 2\n答え: a", "c"),
    ("c\n\n問題: 次はどれか。\n答え: a", "c"),
    ("答え: c 問題: 次はどれか。 答え: a", "c"),
    ("答え: c ユーザー: 次は？ 答え: a", "c"),
    ("答え: c\n\n問2 次のうち正しいのはどれか。\na. あ\nb. い\n答え: b", "c"),
    ("答え: c\n\n第2問 次はどれか。\n答え: b", "c"),
    ("問題: ルマ熱で最も適切なのはどれか。\n答え: c", "c"),
    ("答え: c\n\n問題: ルマ熱で最も適切なのはどれか。\n答え: a", "c"),
]

REFUSED = [
    "",
    "   \n",
    "わかりません。",
    EXPLANATION,
    "答え:",
    "答え: わかりません",
    "答え: なし",
    "答え: aまたはc",
    "答え: a or c",
    "答え: aかc",
    "答え: a/c",
    "答え: a〜c",
    "答え: a-c",
    "答えはaもしくはcです。",
    "答え: a\n答え: c",
    "答え: a\nやはり違う。よって正解はcです。",
    "正解はaです。正解はcです。",
    "答え: f",
    "答え: a,f",
    "答え: z",
    "答え: 3",
    "答え: a以外",
    "答えはcではない。",
    "正解はcでしょうか。",
    "答えはcですか？",
    "答え: c 赤い薬",
    "答え: c (赤い薬)",
    "答え: 白い薬 (b)",
    "答え: a (c)",
    "答え: 赤い薬または白い薬",
    "答え: 黒い薬",
    "答え: 青い薬ではない",
    "Answer: A patient came in.",
    "The answer is not b.",
    "incorrect answer: b",
    "A: c",
    "答え: a: c",
    "正答はc、eの3つである。",
    "答え: cだと思いますが、eかもしれません。",
    "正解はcだと考えられるが、eの可能性もある。",
    "考えた結果\n- c\n- e",
    "答え: d-ダイマー",
    "答え: b12",
    "答え: bad",
    "a. 青い薬\nb. 赤い薬\nc. 白い薬\nd. 赤い薬の点滴\ne. 経過観察",
    "- a\n- b\n- c\n- d\n- e",
    "a\nc",
    "a 誤り。\nc 正しい。",
    "<think>答え: c",
    "説明の途中\n\n問題: 次はどれか。\n答え: a",
    "問題: 別の問題はどれか。\n答え: a",
    "I am not sure.\n\nQuestion: which?\na. one\nb. two\nAnswer: a",
    "So a patient may recover.",
    "I would not choose a.",
    "一般に答え合わせは大切である。",
    "正解率は80%である。",
    "回答者は30人。",
]


@pytest.mark.parametrize(("output", "letters"), READ)
def test_reads_the_answer(output, letters):
    parsed = parse_output(output, FIVE)
    assert (tuple(letters or ()), bool(letters)) == (parsed.letters, parsed.failure is None), parsed
    assert parsed.read_from in output


ENGLISH = Question(
    "E1",
    "A 45-year-old man has a fever. What is the most likely diagnosis?",
    ("Malaria", "Influenza", "Dengue fever", "Typhoid fever", "Measles"),
    ("c",),
)


@pytest.mark.parametrize(
    ("output", "letters"),
    [
        ("Answer: C) Dengue fever", "c"),
        ("**Answer: C. Dengue fever**", "c"),
        ("The correct answer is C: Dengue fever because of the rash.", "c"),
        ("The answer is Dengue fever.", "c"),
        ("The best answer is option C.", "c"),
        ("So the most likely diagnosis is Dengue fever.", "c"),
        ("The answer is C, not B.", "c"),
        ("The answer is B? No, the answer is C.", "c"),
        ("I would answer C.", "c"),
        ("The final answer is $\\boxed{C}$.", "c"),
        ("Answer: Both A and C", "ac"),
        ("Answer: A, B, C, D, E", "abcde"),
        ("C) Dengue fever", "c"),
        ("Answer: C\n\nExplanation: A is wrong. Answer A would be right in June.", "c"),
        ("Answer: C\n\nQuestion: A woman coughs. Which?\nA. x\nB. y\nAnswer: B", "c"),
        ("Answer: either A or C", None),
        ("Answer: None of the above", None),
        ("Answer: A fever", None),
        ("The answer is a bit unclear.", None),
        ("The answer is neither A nor B.", None),
        ("The answer isn't C.", None),
        ("The answer cannot be C.", None),
        ("The most likely diagnosis is Malaria, but C is possible.", None),
    ],
)
def test_reads_english_or_refuses_it(output, letters):
    parsed = parse_output(output, ENGLISH)
    assert ("".join(parsed.letters) or None) == letters, parsed
    assert parsed.read_from in output


def test_what_is_right_is_no_answer_where_the_question_asks_for_what_is_wrong():
    asked = Question("W", "ルマ熱で誤っているのはどれか。", FIVE.choices, ("c",))
    assert parse_output("正しい選択肢は c です。", asked).failure
    assert parse_output("正しい選択肢は c です。", FIVE).letters == ("c",)


@pytest.mark.parametrize("output", REFUSED)
def test_never_guesses(output):
    parsed = parse_output(output, FIVE)
    assert parsed.letters == () and parsed.number is None, parsed
    assert parsed.failure


@pytest.mark.parametrize(
    ("output", "letters"),
    [
        (" c", "c"),
        (" c\n答え: a", "c"),
        ("ｃ。理由は", "c"),
        (" a,c\n\n問題: ", "ac"),
        (" 白い薬 。", "c"),
        ("答え: c", "c"),
        (" \n\n問題: 次\n答え: a", None),
        (" aまたはb", None),
        (" わからない", None),
    ],
)
def test_reads_on_from_a_prompt_that_ends_with_the_marker(output, letters):
    assert parse_output(output, FIVE, cue=True).letters == tuple(letters or ())


@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("答え: 26", "26"),
        ("答え: 26mL", "26"),
        ("答え：２６ ｍＬ", "26"),
        ("答えは26mLです。", "26"),
        ("答え: 約26 mL", "26"),
        ("答え: 0.375 ≒ 0.4", "0.4"),
        ("解答: 肥満度 = (28/22-1)×100 = 27%", "27"),
        ("解答: 総再生産率は2333です。", "2333"),
        ("解答: ①26torr", "26"),
        ("答え: ①2 ②6", "26"),
        ("答え: ①:2, ②:6 mL", "26"),
        ("答え: 04", "04"),
        ("答え: 1,130 kcal", "1130"),
        ("答え: -3.5 mEq/L", "-3.5"),
        ("答え: 10.0/人口1,000対", "10.0"),
        ("答え: 2.1g/日", "2.1"),
        ("Answer: 26 mL/m2", "26"),
        ("The answer is 26.", "26"),
        ("計算すると26.4である。\n答え: 26", "26"),
        ("答え: 26\n計算の説明 100-74=26", "26"),
        ("26", "26"),
        ("26 Torr", "26"),
        ("**答え: 26**", "26"),
        ("\\boxed{26}", "26"),
        ("解答：①②mL\n答え: 26", "26"),
        ("答え: 26\n\n問題: 次を求めよ。\n答え: 99", "26"),
        ("答え: 26〜27", None),
        ("答え: 26 または 27", None),
        ("答え: 3/4", None),
        ("答え: 1.2×10^3", None),
        ("答え: 20 30", None),
        ("答え: ①13②③.87ml", None),
        ("解答: ①②mL", None),
        ("答え: c", None),
        ("計算すると26である", None),
        ("①163\n②27.3%\n計算過程", None),
        ("答え: 26\n答え: 27", None),
    ],
)
def test_reads_numbers(output, number):
    parsed = parse_output(output, NUMERIC)
    assert (parsed.number, parsed.letters) == (number, ()), parsed
    assert parsed.read_from in output


def test_boxes_filled_one_by_one_take_the_decimal_point_of_the_answer_sheet():
    assert parse_output("答え: ①7 ②2 ③0", DECIMAL).number == "7.20"


def test_a_letter_that_is_also_another_choice_is_not_guessed():
    assert parse_output("答え: A", BLOOD).failure == "a letter that is also the text of another choice"
    assert parse_output("答え: a", BLOOD).letters == ("a",)
    assert parse_output("答え: AB", BLOOD).letters == ("d",)


def test_blank_and_shared_choice_texts_name_no_choice():
    question = Question("X5", "図で正しいのはどれか。", ("　", "　", "同じ", "同じ", "別"), ("a",))
    assert parse_output("答え: 同じ", question).failure
    assert parse_output("答え: 別", question).letters == ("e",)
    assert parse_output("答え: a", question).letters == ("a",)


def test_a_marker_of_the_prompt_style_is_read_like_a_usual_one():
    question = Question("T1", "lumo sign ?", ("te_1", "te_2", "te_3", "te_4"), ("c",))
    assert parse_output("lumo has te_1 . so : te_3 .", question, markers=("so :",)).letters == ("c",)
    assert parse_output("lumo has te_1 . so : te_3 . so : te_2 .", question, markers=("so :",)).failure


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_with_a_reason(text):
    for question in (FIVE, NUMERIC):
        for cue in (False, True):
            parsed = parse_output(text, question, cue=cue)
            assert bool(parsed.failure) == (parsed.value is None)
            assert parsed.read_from in text
            assert set(parsed.letters) <= set(question.letters)


pieces = st.sampled_from(
    ["答え", "正解", "は", ":", "：", " ", "\n", "a", "c", "ｃ", "f", "、", ",", "または", "白い薬", "赤い薬", "の点滴"]
    + [
        "です",
        "ではない",
        "「",
        "」",
        "(",
        ")",
        "。",
        "問題:",
        "answer",
        "the ",
        " is ",
        "or",
        "and",
        "したがって",
        "26",
        "①",
        "=",
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(pieces, max_size=25).map("".join))
def test_any_mixture_of_answer_words_is_read_or_refused(text):
    for question in (FIVE, NUMERIC):
        parsed = parse_output(text, question)
        assert bool(parsed.failure) == (parsed.value is None)
        assert parsed.read_from in text
        assert set(parsed.letters) <= set(question.letters)


plain_text = st.text(st.sampled_from("ルマ熱は冬に多く、白い班がでる。\n患者では高値である "), max_size=80)
some_letters = st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True)
wide = str.maketrans(string.ascii_lowercase, "".join(chr(0xFF41 + i) for i in range(26)))


@settings(max_examples=200, deadline=None)
@given(plain_text, some_letters, plain_text, st.sampled_from([",", "、", ", ", "・"]), st.booleans())
def test_a_marked_answer_is_read_between_any_explanations(before, letters, after, joint, is_wide):
    said = joint.join(letters)
    output = f"{before}\n答え: {said.translate(wide) if is_wide else said}\n{after}"
    assert parse_output(output, FIVE).letters == tuple(sorted(letters))


@settings(max_examples=100, deadline=None)
@given(plain_text, st.integers(0, 10**7), st.sampled_from(["", " mL", "kcal", "％", " g/日"]))
def test_a_marked_number_is_read_after_any_explanation(before, number, unit):
    for written in (str(number), f"{number:,}"):
        assert parse_output(f"{before}\n答え: {written}{unit}", NUMERIC).number == str(number)


def test_reading_takes_linear_time():
    for piece in (
        "答え",
        "答え: ",
        "a, ",
        "「" * 3,
        "正解はcではない。",
        "問題: ",
        "\n- a",
        " ",
        "①",
        "1,",
        "問題: " + FIVE.problem_text,
        "\n問1 ",
        "正しい選択肢は",
    ):
        text = piece * (20_000 // len(piece))
        began = time.process_time()  # other processes do not count
        parse_output(text, FIVE), parse_output(text, NUMERIC)
        assert time.process_time() - began < 2, piece


@pytest.mark.skipif(not JMLE.is_dir(), reason=f"the examination data is not at {JMLE}")
def test_real_reasoning_is_read_as_its_last_line_says():
    questions = {q.problem_id: q for q in load_questions(JMLE / "questions.jsonl")}
    rows = [json.loads(line) for line in (JMLE / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        for side in ("chosen", "rejected"):
            reasoning, _, last = row[side].rstrip().rpartition("\n答え: ")
            parsed = parse_output(row[side], questions[row["question_id"]])
            assert sorted(last.split(",")) == list(parsed.letters), (row["question_id"], parsed)
            # Without that line most traces still say their answer in words; what is read then is hardly ever another.
            spoken = parse_output(reasoning, questions[row["question_id"]])
            row[side] = "unread" if spoken.failure else spoken.letters == parsed.letters
    spoken = [row[side] for row in rows for side in ("chosen", "rejected")]
    assert spoken.count(True) > len(spoken) / 2 and spoken.count(False) <= 5


@pytest.mark.parametrize("stop", ["", "."])
@pytest.mark.parametrize(
    "output",
    [
        "d. stamina",
        "Answer: stamina",
        "**D. Stamina**",
        "D) Stamina",
        "The correct answer is D - Stamina.",
        "D. Stamina. It lasts.",
    ],
)
def test_case_and_a_final_stop_of_choices_do_not_count(output, stop):
    choices = tuple(text + stop for text in ("Strength", "Power training", "Stride length", "Stamina"))
    assert parse_output(output, Question("E1", "What does a runner need most?", choices, ("d",))).letters == ("d",)


def test_case_counts_where_it_tells_choices_apart():
    question = Question("E2", "Which notation is used?", ("mmHG", "mmHg", "Torr", "Pa"), ("b",))
    assert parse_output("Answer: mmHg", question).letters == ("b",)
    assert parse_output("Answer: MMHG", question).letters == ()


@pytest.mark.parametrize(
    "output",
    ["Option a is correct. Option b is correct.", "A. Strength. It helps.\nD. Stamina. It lasts.", "Is option d correct?"],
)
def test_several_right_options_and_a_list_of_them_are_no_answer(output):
    choices = ("Strength", "Power training", "Stride length", "Stamina")
    assert parse_output(output, Question("E1", "What does a runner need most?", choices, ("d",))).letters == ()


def test_a_statement_that_is_correct_is_no_answer_to_a_question_for_the_wrong_one():
    question = Question("E3", "Which of the following is NOT true?", ("w", "x", "y", "z"), ("d",))
    assert parse_output("Option a is correct.", question).letters == ()
