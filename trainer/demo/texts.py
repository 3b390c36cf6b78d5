"""What is written about the made-up medicine: prose, the textbook, examination papers, and their tokenizer.

Every file that a model of the demo reads is made here. Two rules make the experiment fair, and :func:`check_disjoint`
verifies them on the texts themselves: no training text holds a question about a tested disease, and nothing that
preference pairs are made from names one.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from medtrain.trainer.demo.world import ALPHABET, KINDS, LETTERS, RELATIONS, Fact, Quiz, World, quiz_on_fact
from medtrain.trainer.exam.prompts import PromptStyle
from medtrain.trainer.exam.questions import Question

# One fact, said three ways. Pretraining prose and ground-truth explanations are written like this.
PLAIN = ("{d}病の{r}は{v}である。", "{d}病では{r}は{v}とされる。", "{d}病なら{r}は{v}になる。")
# The textbook compares: a fact and, in the same breath, the neighbour's.
COMPARING = ("{d}病の{r}は{v}であり、{d2}病の{v2}とは異なる。", "{d}病の{r}は{v}であって、{d2}病なら{v2}である。")

# Prompts of the demo: as short as a tiny model needs, through the same code as real examinations. The answer is the
# text of an option: to tie a letter to its option takes a larger model than this one.
STYLE = PromptStyle(
    question="問題:{text}{choices}",
    choice="\n{letter}. {text}",
    choice_joint="",
    lead="",
    joint="\n",
    answer_as="text",
    stops=(),
    instruction_answer="",
    instruction_explain="",
)

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
    sentences: int = 4  # a prose document
    listed: float = 0.5  # share of prose documents that begin with a list of words, as papers do
    comparing: float = 0.9  # share of the textbook's sentences that compare
    questions: int = 3  # questions a fact for making pairs
    steps: int = 1  # facts of the disease that an explanation tells; the last of them is the one asked for
    contrast: float = 0.0  # share of explanations that tell a wrong option's disease, too
    passing: float = 0.0  # share of explaining papers about diseases that are met nowhere else


def say_plainly(world: World, fact: Fact, rng: random.Random, value: str | None = None) -> str:
    disease, r = fact
    return rng.choice(PLAIN).format(d=disease, r=RELATIONS[r].word, v=value or world.facts[fact])


def say_comparing(world: World, fact: Fact, rng: random.Random) -> str:
    disease, r = fact
    other = rng.choice(world.neighbours(disease))
    return rng.choice(COMPARING).format(d=disease, r=RELATIONS[r].word, v=world.facts[fact], d2=other, v2=world.facts[other, r])


def explanation(world: World, quiz: Quiz, corpus: Corpus, rng: random.Random) -> str:
    """Why the right option is right: other facts of the disease, then the one asked for.

    A share of ``corpus.contrast`` also say of a wrong option whose it is, before or after the fact asked for, as
    explanations of real examinations do.
    """
    others = rng.sample([r for r in range(len(RELATIONS)) if r != quiz.relation], corpus.steps - 1)
    before = [say_plainly(world, (quiz.disease, r), rng) for r in others]
    end = [say_plainly(world, (quiz.disease, quiz.relation), rng)]
    if corpus.contrast and rng.random() < corpus.contrast:
        owners = [d for d in world.neighbours(quiz.disease) if world.facts[d, quiz.relation] in quiz.neighbours]
        end.insert(rng.randrange(2), say_plainly(world, (rng.choice(owners), quiz.relation), rng))
    return "".join(before + end)


def passing_world(world: World, rng: random.Random) -> World:
    """A chapter of diseases with facts of their own, drawn anew for each paper.

    What such a paper explains cannot have been learned, so the name has to be taken from the question and the answer
    from the explanation.
    """
    chapter = tuple(rng.sample(world.spare_names, world.sizes.chapter))
    facts = {}
    for r in range(len(RELATIONS)):
        for disease, value in zip(chapter, rng.sample(world.values[r], len(chapter)), strict=True):
            facts[disease, r] = value
    return dataclasses.replace(world, chapter_of=dict.fromkeys(chapter, chapter), facts=facts)


def exam_rows(world: World, kind: str, corpus: Corpus, *, repeats: int = 1) -> list[dict]:
    """The examination about all facts of one kind of disease, in the form of IgakuQA with explanations.

    ``repeats`` questions a fact differ in their options.
    """
    rng = world.rng(f"exam/{kind}")
    facts = [fact for fact in world.facts_of(kind) for _ in range(repeats)]
    rows = []
    for number, fact in enumerate(facts, start=1):
        quiz = quiz_on_fact(world, fact, rng)
        rows.append(quiz.row(f"{kind}-{number:04d}", explanation(world, quiz, corpus, rng)))
    return rows


def paper(quiz: Quiz, mode: str, explanation: str) -> str:
    """A question with its answer, as pretraining text: exactly the exam's prompt and the completion it hopes for."""
    row = quiz.row("paper", explanation)
    question = Question(
        row["problem_id"], row["problem_text"], tuple(row["choices"]), tuple(row["answer"]), explanation=explanation
    )
    return STYLE.prompt(question, mode, None) + STYLE.completion(question, mode)


def pretraining_texts(world: World, corpus: Corpus) -> dict[str, list[str]]:
    """The general texts of the world, by source: ``prose``, ``answer``, ``explain``.

    Prose tells all facts of general diseases and those of the textbook's facts that are in ``world.met``. Papers ask
    about general diseases.
    """
    general = world.facts_of("general")
    told = general + sorted(world.met)

    def prose(rng: random.Random) -> str:
        sentences = "".join(say_plainly(world, rng.choice(told), rng) for _ in range(corpus.sentences))
        if rng.random() >= corpus.listed:
            return sentences
        words = rng.sample(rng.choice(world.values), len(LETTERS))
        return "一覧:" + "".join(f"\n{letter}. {word}" for letter, word in zip(LETTERS, words, strict=True)) + "\n" + sentences

    def answer(rng: random.Random) -> str:
        return paper(quiz_on_fact(world, rng.choice(general), rng), "answer", "")

    def explain(rng: random.Random) -> str:
        about, fact = world, None
        if corpus.passing and rng.random() < corpus.passing:
            about = passing_world(world, rng)
            fact = rng.choice(sorted(about.facts))
        quiz = quiz_on_fact(about, fact or rng.choice(general), rng)
        return paper(quiz, "explain", explanation(about, quiz, corpus, rng))

    def texts(make: Callable[[random.Random], str]) -> list[str]:
        rng = world.rng(make.__name__)
        return [make(rng) for _ in range(getattr(corpus, make.__name__))]

    return {make.__name__: texts(make) for make in (prose, answer, explain)}


def textbook_texts(world: World, corpus: Corpus) -> list[str]:
    """The textbook: documents about one disease each, three of its facts, most of them beside a neighbour's."""
    rng = world.rng("textbook")
    documents = []
    for _ in range(corpus.textbook):
        disease = rng.choice(world.textbook)
        facts = [(disease, r) for r in rng.sample(range(len(RELATIONS)), 3)]
        documents.append(
            "".join((say_comparing if rng.random() < corpus.comparing else say_plainly)(world, fact, rng) for fact in facts)
        )
    return documents


def make_tokenizer(world: World, corpus: Corpus):
    """A tokenizer whose tokens are the units the world is made of: names, value words, phrases, and syllables for the rest.

    It takes the longest unit at each place. No unit spans the end of a prompt (units that begin with a line break are
    markers as a whole), so a prompt and its completion have the same tokens apart and together.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = [disease for kind in KINDS for disease in world.diseases[kind]]
    names += world.spare_names if corpus.passing else ()
    units = ["<pad>", "<eos>", "<unk>", *ALPHABET, *_PHRASES, *names, *(v for values in world.values for v in values)]
    model = models.WordPiece(
        {unit: number for number, unit in enumerate(units)},
        unk_token="<unk>",
        continuing_subword_prefix="",
        max_input_chars_per_word=1_000_000,
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", model_max_length=256
    )


@dataclass(frozen=True)
class WorldFiles:
    """Where everything that is written about a world stands."""

    root: Path

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def textbook(self) -> Path:
        return self.root / "textbook.jsonl"

    def pretraining(self, source: str) -> Path:
        return self.root / f"pretraining-{source}.jsonl"

    def exam(self, kind: str) -> Path:
        return self.root / f"exam-{kind}.jsonl"


def write_world(world: World, corpus: Corpus, root: Path) -> WorldFiles:
    """Write all texts, examinations and the tokenizer under ``root``; checks their disjointness first."""
    files = WorldFiles(root)
    pretraining, textbook = pretraining_texts(world, corpus), textbook_texts(world, corpus)
    exams = {kind: exam_rows(world, kind, corpus, repeats=corpus.questions if kind == "train" else 1) for kind in KINDS[1:]}
    check_disjoint(world, [*pretraining.values(), textbook], exams)
    root.mkdir(parents=True, exist_ok=True)
    for source, texts in pretraining.items():
        write_jsonl(files.pretraining(source), ({"text": text} for text in texts))
    write_jsonl(files.textbook, ({"text": text} for text in textbook))
    for kind, rows in exams.items():
        write_jsonl(files.exam(kind), rows)
    make_tokenizer(world, corpus).save_pretrained(files.tokenizer)
    return files


def check_disjoint(world: World, corpora: Iterable[Iterable[str]], exams: dict[str, list[dict]]) -> None:
    """Prove on the texts that the experiment is fair; an AssertionError is a mistake in this file.

    No training text holds a question about a textbook disease; the three examinations ask about different diseases;
    no question from which pairs are made names a disease of another kind.
    """
    asked = {kind: {row["problem_text"] for row in rows} for kind, rows in exams.items()}
    every = set().union(*asked.values())
    assert sum(map(len, asked.values())) == len(every), "two examinations share a question"
    for texts in corpora:
        for text in texts:
            if text.startswith("問題:"):
                question = text.removeprefix("問題:").split("\n", 1)[0]
                assert question not in every, f"a training text holds an exam question: {question}"
            else:
                assert "どれか" not in text, f"a question inside prose: {text}"
    for row in exams["train"]:
        named = names_in(world, row["problem_text"] + row["explanation"])
        assert named <= set(world.diseases["train"]), f"a pair's question names another kind of disease: {named}"


def states_fact(world: World, prompt: str, output: str) -> bool:
    """Whether an explanation says of the disease asked about what is right for it, wherever the answer came from."""
    about = prompt.removeprefix("問題:")
    disease, word = about[:2], about[3:].removeprefix("の").split("はどれか", 1)[0]
    (r,) = [i for i, relation in enumerate(RELATIONS) if relation.word == word]
    # The textbook's style leaves the relation out where it names the second disease.
    fact = rf"{disease}病(の|では|なら)({word}は)?{world.facts[disease, r]}"
    return re.search(fact, output.split(STYLE.answer_marker, 1)[0]) is not None


def names_in(world: World, text: str) -> set[str]:
    """The diseases of the world that a text names."""
    return {text[i - 2 : i] for i in range(2, len(text)) if text[i] == "病"} & world.chapter_of.keys()


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write rows to a file that appears only when it is whole."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    part.replace(path)
