"""The demo's world: the same seed gives the same texts, and the examination is about things no training question holds."""

import dataclasses

import pytest

from medtrain.benchmarks.evidence.seeds import states_fact
from medtrain.trainer.demo.texts import (
    STYLE,
    Corpus,
    exam_rows,
    make_tokenizer,
    names_in,
    pretraining_texts,
    textbook_texts,
    write_world,
)
from medtrain.trainer.demo.world import KINDS, LETTERS, RELATIONS, WorldSizes, make_world, quiz_on_fact
from medtrain.trainer.exam.parse import parse_output
from medtrain.trainer.exam.questions import load_questions

SIZES = WorldSizes(general=25, train=10, dev=10, test=15)
CORPUS = Corpus(prose=300, answer=200, explain=200, textbook=400, questions=2)


@pytest.fixture(scope="module")
def world():
    return make_world(7, SIZES)


def check_disjoint(world, corpora, exams):
    """That the experiment is fair.

    No training text holds a question about a textbook disease; the three examinations ask about different diseases;
    no question from which pairs are made names a disease of another kind.
    """
    questions = [{row["problem_text"] for row in rows} for rows in exams.values()]
    tested = set().union(*questions)
    assert sum(map(len, questions)) == len(tested), "two examinations share a question"
    for text in (text for texts in corpora for text in texts):
        if text.startswith("問題:"):
            question = text.removeprefix("問題:").split("\n", 1)[0]
            assert question not in tested, f"a training text holds an exam question: {question}"
        else:
            assert "どれか" not in text, f"a question inside prose: {text}"
    for row in exams["train"]:
        named = names_in(world, row["problem_text"] + row["explanation"])
        assert named <= set(world.diseases["train"]), f"a pair's question names another kind of disease: {named}"


def test_the_same_seed_writes_the_same_files_and_another_seed_others(tmp_path, world):
    roots = [tmp_path / "first", tmp_path / "again", tmp_path / "other"]
    for root, seed in zip(roots, (7, 7, 8), strict=True):
        write_world(make_world(seed, SIZES), CORPUS, root)
    names = sorted(path.name for path in roots[0].glob("*.jsonl"))
    assert len(names) == 7
    for name in names:
        first, again, other = ((root / name).read_bytes() for root in roots)
        assert first == again
        assert first != other


def test_neighbours_share_a_chapter_and_differ_in_every_value(world):
    for kind in KINDS:
        for disease in world.diseases[kind]:
            assert set(world.chapter_of[disease]) <= set(world.diseases[kind])
            for other in world.neighbours(disease):
                assert all(world.facts[disease, r] != world.facts[other, r] for r in range(len(RELATIONS)))


def test_no_exam_question_stands_in_a_training_text_and_no_tested_disease_in_a_paper(world):
    papers = pretraining_texts(world, CORPUS)
    textbook = textbook_texts(world, CORPUS)
    exams = {kind: exam_rows(world, kind, CORPUS) for kind in KINDS[1:]}
    check_disjoint(world, [*papers.values(), textbook], exams)
    tested = set(world.diseases["test"]) | set(world.diseases["dev"])
    for source in ("answer", "explain"):
        assert not any(names_in(world, text) & tested for text in papers[source])
    # All the training text there is, searched without any knowledge of its form.
    everything = "\n".join(text for texts in [*papers.values(), textbook] for text in texts)
    for rows in exams.values():
        assert not any(row["problem_text"] in everything for row in rows)


def test_check_disjoint_finds_a_leaked_question(world):
    exams = {kind: exam_rows(world, kind, CORPUS) for kind in KINDS[1:]}
    leaked = exams["test"][3]
    paper = STYLE.question.format(text=leaked["problem_text"], choices="\na. アアミン") + "\n答え:アアミン"
    with pytest.raises(AssertionError, match="exam question"):
        check_disjoint(world, [[paper]], exams)


def test_pretraining_prose_tells_only_the_met_facts_of_the_textbook(world):
    of_textbook = set(world.textbook)
    stated = set()
    for text in pretraining_texts(world, CORPUS)["prose"]:
        for sentence in text.rsplit("\n", 1)[-1].split("。")[:-1]:
            if sentence[:2] in of_textbook:
                (r,) = [i for i, relation in enumerate(RELATIONS) if relation.word in sentence]
                assert world.facts[sentence[:2], r] in sentence
                stated.add((sentence[:2], r))
    assert stated and stated <= world.met


def test_the_textbook_tells_true_facts_and_compares_within_a_chapter(world):
    compared = total = 0
    for text in textbook_texts(world, CORPUS):
        for sentence in text.split("。")[:-1]:
            disease = sentence[:2]
            (r,) = [i for i, relation in enumerate(RELATIONS) if relation.word in sentence]
            assert f"{RELATIONS[r].word}は{world.facts[disease, r]}" in sentence
            others = names_in(world, sentence) - {disease}
            assert all(other in world.neighbours(disease) for other in others)
            assert all(world.facts[other, r] in sentence for other in others)
            compared += bool(others)
            total += 1
    assert 0.85 < compared / total < 0.95


def test_exam_files_are_read_back_with_the_right_answer_and_explanation(tmp_path, world):
    write_world(world, CORPUS, tmp_path)
    for kind in KINDS[1:]:
        for question in load_questions(tmp_path / f"exam-{kind}.jsonl"):
            right = question.choices[question.letters.index(question.answer[0])]
            assert right in question.explanation
            for mode in ("answer", "explain"):
                completion = STYLE.completion(question, mode)
                assert parse_output(completion, question, **STYLE.parse_settings(mode)).letters == question.answer


def test_explanations_of_several_steps_are_true_and_end_with_the_fact_that_is_asked(world):
    corpus = dataclasses.replace(CORPUS, steps=3, contrast=0.5)
    contrasted = before = 0
    rows = exam_rows(world, "train", corpus, repeats=8)
    for row in rows:
        disease = row["problem_text"][:2]
        sentences = row["explanation"].split("。")[:-1]
        stated = []
        for sentence in sentences:
            (r,) = [i for i, relation in enumerate(RELATIONS) if relation.word in sentence]
            assert world.facts[sentence[:2], r] in sentence
            stated.append((sentence[:2], r))
        (asked,) = [i for i, relation in enumerate(RELATIONS) if relation.word in row["problem_text"]]
        own, others = [fact for fact in stated if fact[0] == disease], [fact for fact in stated if fact[0] != disease]
        assert len(set(own)) == 3 and own[-1] == (disease, asked)
        for other, r in others:
            assert r == asked and stated.index((other, r)) >= 2
            assert world.facts[other, r] in row["choices"] and other in world.neighbours(disease)
        assert len(others) <= 1
        contrasted += len(others)
        before += bool(others) and stated[-1] == own[-1]
    assert 0.4 < contrasted / len(rows) < 0.6
    assert 0.35 < before / contrasted < 0.65


def test_a_fact_is_stated_of_the_disease_asked_about_and_before_the_answer(world):
    row = exam_rows(world, "dev", CORPUS)[7]
    prompt, (right,) = f"問題:{row['problem_text']}\na. アアミン", {row["choices"][LETTERS.index(row["answer"][0])]}
    disease, other = row["problem_text"][:2], world.neighbours(row["problem_text"][:2])[0]
    word = row["problem_text"][4:].split("は")[0]
    assert states_fact(world, prompt, row["explanation"] + f"\n答え:{right}")
    assert states_fact(world, prompt, f"{disease}病の{word}は{right}であり、{other}病のアアとは異なる。\n答え:アア")
    assert states_fact(world, prompt, f"{other}病の{word}はアアであって、{disease}病なら{right}である。\n答え:アア")
    assert not states_fact(world, prompt, f"{other}病の{word}は{right}である。\n答え:{right}")
    assert not states_fact(world, prompt, f"{disease}病の{word}はアアである。\n答え:{right}")
    assert not states_fact(world, prompt, f"\n答え:{disease}病の{word}は{right}である。")


def test_papers_about_passing_diseases_name_nothing_that_is_met_elsewhere(world):
    corpus = dataclasses.replace(CORPUS, steps=3, contrast=0.5, passing=0.5)
    papers = pretraining_texts(world, corpus)["explain"]
    about = [text.removeprefix("問題:")[:2] for text in papers]
    passing = [text for text, disease in zip(papers, about, strict=True) if disease in world.spare_names]
    assert 0.4 < len(passing) / len(papers) < 0.6
    assert all(not names_in(world, text) for text in passing)
    assert len({text[:5] for text in passing}) > 0.8 * len(passing)
    for text in passing:
        explanation, answer = text.split("説明:")[1].split("\n答え:")
        (stated,) = {s for s in explanation.split("。") if s.startswith(text[3:5]) and answer in s}
        assert stated


def test_up_to_three_wrong_options_are_right_for_a_neighbour(world):
    fact = (world.diseases["test"][0], 2)
    quiz = quiz_on_fact(world, fact, world.rng("test"))
    near = {world.facts[other, 2] for other in world.neighbours(fact[0])}
    assert len(set(quiz.options)) == 5
    assert len(near & set(quiz.options)) >= 3
    assert quiz.right not in near


def test_every_text_survives_the_tokenizer_and_holds_no_unknown_token(tmp_path, world):
    from medtrain.trainer.data.tokenizer import read_tokenizer

    make_tokenizer(world, CORPUS).save_pretrained(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.eos_token == "<eos>" and tokenizer.pad_token == "<pad>"
    everything = [*pretraining_texts(world, CORPUS).values(), textbook_texts(world, CORPUS)]
    for text in (text for texts in everything for text in texts[:100]):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_prompt_and_completion_have_the_same_tokens_apart_and_together(tmp_path, world):
    tokenizer = make_tokenizer(world, CORPUS)
    write_world(world, CORPUS, tmp_path)
    for question in load_questions(tmp_path / "exam-test.jsonl"):
        for mode in ("answer", "explain"):
            parts = STYLE.prompt(question, mode, tokenizer), STYLE.completion(question, mode)
            apart = [i for part in parts for i in tokenizer(part, add_special_tokens=False).input_ids]
            assert apart == tokenizer("".join(parts), add_special_tokens=False).input_ids
