"""What is written about the made-up medicine: prose, the textbook, examination papers, and their tokenizer.

Every file that a model of the demo reads is made here. Two rules make the experiment fair (tests/trainer/demo/test_world.py):
no training text holds a question about a tested disease, and nothing that preference pairs are made from names one.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medtrain.trainer.demo.world import (
    ALPHABET,
    KINDS,
    LETTERS,
    RELATIONS,
    Fact,
    Quiz,
    World,
    draw_facts,
    facts_about,
    quiz_on_fact,
)
from medtrain.trainer.exam.prompts import load_style
from medtrain.trainer.exam.questions import Question
from medtrain.trainer.files import write_jsonl

# One fact, in three wordings. Pretraining prose and ground-truth explanations are written like this.
PLAIN = ("{d}病の{r}は{v}である。", "{d}病では{r}は{v}とされる。", "{d}病なら{r}は{v}になる。")
# The textbook compares: a fact and, in the same breath, the neighbour's.
COMPARING = ("{d}病の{r}は{v}であり、{d2}病の{v2}とは異なる。", "{d}病の{r}は{v}であって、{d2}病なら{v2}である。")

# As short as a tiny model needs, through the same code as real examinations. The answer is the text of an option: to tie
# a letter to its option takes a larger model than this one.
STYLE = load_style("demo")

# The tokenizer's units besides names, values and syllables.
_PHRASES = (
    ["病の", "病では", "病なら", "である。", "とされる。", "になる。", "であり、", "であって、", "とは異なる。"]
    + ["問題:", "どれか。", "\n答え:", "\n説明:", "一覧:", "\n"]
    + [f"\n{letter}. " for letter in LETTERS]
    + [f"{relation.word}は" for relation in RELATIONS]
)


@dataclass(frozen=True)
class Corpus:
    """How many documents of each kind are written; the training steps may read them more than once."""

    prose: int = 24_000
    answer: int = 8_000  # examination papers that give the answer alone
    explain: int = 8_000  # examination papers that explain, then answer
    textbook: int = 6_000
    sentences: int = 4  # per prose document
    listed: float = 0.5  # share of prose documents that begin with a list of words, as papers do
    comparing: float = 0.9  # share of the textbook's sentences that compare
    questions: int = 3  # per fact, for making pairs
    steps: int = 1  # facts of the disease that an explanation tells; the last of them is the one asked for
    contrast: float = 0.0  # share of explanations that tell a wrong option's disease, too
    passing: float = 0.0  # share of explaining papers about diseases that are met nowhere else


def plain_sentence(world: World, fact: Fact, rng: random.Random) -> str:
    disease, r = fact
    return rng.choice(PLAIN).format(d=disease, r=RELATIONS[r].word, v=world.facts[fact])


def comparing_sentence(world: World, fact: Fact, rng: random.Random) -> str:
    disease, r = fact
    other = rng.choice(world.neighbours(disease))
    return rng.choice(COMPARING).format(d=disease, r=RELATIONS[r].word, v=world.facts[fact], d2=other, v2=world.facts[other, r])


def explanation(world: World, quiz: Quiz, corpus: Corpus, rng: random.Random) -> str:
    """Why the right option is right: other facts of the disease, then the one asked for.

    A share of ``corpus.contrast`` also tells whose value a wrong option is, before or after the fact asked for, as
    explanations of real examinations do.
    """
    others = rng.sample([r for r in range(len(RELATIONS)) if r != quiz.relation], corpus.steps - 1)
    before = [plain_sentence(world, (quiz.disease, r), rng) for r in others]
    end = [plain_sentence(world, (quiz.disease, quiz.relation), rng)]
    if corpus.contrast and rng.random() < corpus.contrast:
        owners = [d for d in world.neighbours(quiz.disease) if world.facts[d, quiz.relation] in quiz.neighbours]
        end.insert(rng.randrange(2), plain_sentence(world, (rng.choice(owners), quiz.relation), rng))
    return "".join(before + end)


def passing_world(world: World, rng: random.Random) -> World:
    """A chapter of diseases with facts of their own, drawn anew for each paper.

    What such a paper explains cannot have been learned, so the name has to be taken from the question and the answer
    from the explanation.
    """
    chapter = tuple(rng.sample(world.spare_names, world.sizes.chapter))
    facts = draw_facts(chapter, world.values, rng)
    return dataclasses.replace(world, chapter_of=dict.fromkeys(chapter, chapter), facts=facts)


def exam_rows(world: World, kind: str, corpus: Corpus, *, repeats: int = 1) -> list[dict]:
    """The examination about all facts of one kind of disease, in the form of IgakuQA with ground-truth explanations.

    The ``repeats`` questions per fact differ in their options.
    """
    rng, rows = world.rng(f"exam/{kind}"), []
    for fact in facts_about(world.diseases[kind]):
        for _ in range(repeats):
            quiz = quiz_on_fact(world, fact, rng)
            row = {"problem_id": f"{kind}-{len(rows) + 1:04d}", "problem_text": quiz.text, "choices": quiz.options}
            row |= {"text_only": True, "answer": [quiz.letter], "points": "1"}
            rows.append(row | {"explanation": explanation(world, quiz, corpus, rng)})
    return rows


def paper(quiz: Quiz, mode: str, explanation: str) -> str:
    """A question with its answer, as pretraining text: exactly the exam's prompt and the completion it hopes for."""
    question = Question("paper", quiz.text, quiz.options, (quiz.letter,), explanation=explanation)
    return STYLE.prompt(question, mode, None) + STYLE.completion(question, mode)


def pretraining_texts(world: World, corpus: Corpus) -> dict[str, list[str]]:
    """The general texts of the world, by source: ``prose``, ``answer``, ``explain``.

    Prose tells all facts of general diseases and those of the textbook's facts that are in ``world.met``. Papers ask
    about general diseases.
    """
    general = facts_about(world.diseases["general"])
    in_prose = general + sorted(world.met)

    def prose(rng: random.Random) -> str:
        sentences = "".join(plain_sentence(world, rng.choice(in_prose), rng) for _ in range(corpus.sentences))
        if rng.random() >= corpus.listed:
            return sentences
        words = rng.sample(rng.choice(world.values), len(LETTERS))
        return "一覧:" + "".join(f"\n{letter}. {word}" for letter, word in zip(LETTERS, words, strict=True)) + "\n" + sentences

    def answer(rng: random.Random) -> str:
        return paper(quiz_on_fact(world, rng.choice(general), rng), "answer", "")

    def explain(rng: random.Random) -> str:
        about, facts = world, general
        if corpus.passing and rng.random() < corpus.passing:
            about = passing_world(world, rng)
            facts = sorted(about.facts)
        quiz = quiz_on_fact(about, rng.choice(facts), rng)
        return paper(quiz, "explain", explanation(about, quiz, corpus, rng))

    def texts(source: str, make: Callable[[random.Random], str]) -> list[str]:
        rng = world.rng(source)
        return [make(rng) for _ in range(getattr(corpus, source))]

    return {"prose": texts("prose", prose), "answer": texts("answer", answer), "explain": texts("explain", explain)}


def textbook_texts(world: World, corpus: Corpus) -> list[str]:
    """The textbook: documents about one disease each, three of its facts, most of them next to a neighbour's."""
    rng = world.rng("textbook")

    def document() -> str:
        disease = rng.choice(world.textbook)
        sentences = []
        for r in rng.sample(range(len(RELATIONS)), 3):
            sentence = comparing_sentence if rng.random() < corpus.comparing else plain_sentence
            sentences.append(sentence(world, (disease, r), rng))
        return "".join(sentences)

    return [document() for _ in range(corpus.textbook)]


def make_tokenizer(world: World, corpus: Corpus):
    """A tokenizer whose tokens are the units the world is made of: names, value words, phrases, and syllables for the rest.

    It takes the longest unit at each place. No unit spans the end of a prompt (units that begin with a line break are
    markers as a whole), so a prompt and its completion have the same tokens apart and together.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = [disease for kind in KINDS for disease in world.diseases[kind]] + list(world.spare_names if corpus.passing else ())
    units = ["<pad>", "<eos>", "<unk>", *ALPHABET, *_PHRASES, *names, *(v for values in world.values for v in values)]
    ids = {unit: number for number, unit in enumerate(units)}
    limit = {"continuing_subword_prefix": "", "max_input_chars_per_word": 1_000_000}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="<unk>", **limit))
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **special)


def write_world(world: World, corpus: Corpus, root: Path) -> None:
    """Write all texts and examinations (``root/NAME.jsonl``) and the tokenizer."""
    texts = {f"pretraining-{source}": texts for source, texts in pretraining_texts(world, corpus).items()}
    texts["textbook"] = textbook_texts(world, corpus)
    exams = {kind: exam_rows(world, kind, corpus, repeats=corpus.questions if kind == "train" else 1) for kind in KINDS[1:]}
    root.mkdir(parents=True, exist_ok=True)
    for name, documents in texts.items():
        write_jsonl(root / f"{name}.jsonl", ({"text": text} for text in documents))
    for kind, rows in exams.items():
        write_jsonl(root / f"exam-{kind}.jsonl", rows)
    make_tokenizer(world, corpus).save_pretrained(root / "tokenizer")


def names_in(world: World, text: str) -> set[str]:
    """The diseases of the world that a text names."""
    return {text[i - 2 : i] for i in range(2, len(text)) if text[i] == "病"} & world.chapter_of.keys()
