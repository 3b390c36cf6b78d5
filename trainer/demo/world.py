"""A made-up medicine, from one seed: diseases with invented names, the facts about them, and examination questions.

Nothing here is real medicine. A disease has a two-syllable katakana name and one value for each of five relations
(drug of choice, finding, cause, test, contraindication). Diseases stand in chapters of a few neighbours, and a chapter
is of one of four kinds:

- ``general``: met in pretraining only, in prose and in examination questions;
- ``train``: in the textbook; preference pairs are made from questions about them;
- ``dev``: in the textbook; the settings of the recipe were chosen on questions about them;
- ``test``: in the textbook; the demo's table is about them and nothing else asks about them.

The textbook compares a disease with a neighbour of its own chapter, never across chapters.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

ALPHABET = "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロワ"
KINDS = ("general", "train", "dev", "test")
LETTERS = "abcde"


class Relation(NamedTuple):
    """A kind of fact: its Japanese word and the ending that its values share."""

    word: str
    ending: str


RELATIONS = (
    Relation("治療薬", "ミン"),  # drug of choice
    Relation("所見", "疹"),  # finding
    Relation("病因", "菌"),  # cause
    Relation("検査法", "法"),  # test
    Relation("禁忌", "剤"),  # contraindicated drug
)

Fact = tuple[str, int]  # (disease, index of the relation)


@dataclass(frozen=True)
class WorldSizes:
    """How much there is of everything. The defaults are the demo's; its tests use less."""

    general: int = 100  # diseases of each kind
    train: int = 30
    dev: int = 20
    test: int = 60
    chapter: int = 5  # diseases that are compared with one another
    values: int = 40  # words that a relation can take
    met: float = 0.4  # share of the textbook's facts that pretraining prose mentions too


@dataclass(frozen=True)
class World:
    """All facts. ``facts[disease, r]`` is a word of ``values[r]``; names are without their ending 病."""

    seed: int
    sizes: WorldSizes
    diseases: dict[str, tuple[str, ...]]  # kind -> names
    chapter_of: dict[str, tuple[str, ...]]  # name -> the names of its chapter
    values: tuple[tuple[str, ...], ...]  # per relation, its words
    facts: dict[Fact, str]
    met: frozenset[Fact]  # textbook facts that pretraining prose mentions
    spare_names: tuple[str, ...]  # names of no disease, for questions that no fact answers

    @property
    def textbook(self) -> tuple[str, ...]:
        """The diseases that the textbook is about."""
        return self.diseases["train"] + self.diseases["dev"] + self.diseases["test"]

    def neighbours(self, disease: str) -> list[str]:
        return [other for other in self.chapter_of[disease] if other != disease]

    def rng(self, purpose: str) -> random.Random:
        """A generator of its own for each purpose, so that one text's length does not change another text."""
        return random.Random(f"{self.seed}/{purpose}")


def facts_about(diseases: Sequence[str]) -> list[Fact]:
    return [(disease, r) for disease in diseases for r in range(len(RELATIONS))]


def make_world(seed: int, sizes: WorldSizes | None = None) -> World:
    """Draw names, values, facts and chapters; the same seed and sizes give the same world."""
    sizes = sizes or WorldSizes()
    rng = random.Random(f"{seed}/world")
    names = [a + b for a in ALPHABET for b in ALPHABET if a != b]
    rng.shuffle(names)
    unused = iter(names)
    diseases = {kind: tuple(next(unused) for _ in range(getattr(sizes, kind))) for kind in KINDS}
    # Value words share their stems with names; only the ending tells a drug from a disease.
    values = tuple(tuple(stem + r.ending for stem in rng.sample(names, sizes.values)) for r in RELATIONS)
    chapter_of: dict[str, tuple[str, ...]] = {}
    facts: dict[Fact, str] = {}
    for of_kind in diseases.values():
        for start in range(0, len(of_kind), sizes.chapter):
            chapter = of_kind[start : start + sizes.chapter]
            chapter_of |= dict.fromkeys(chapter, chapter)
            facts |= draw_facts(chapter, values, rng)
    of_textbook = [fact for kind in KINDS[1:] for fact in facts_about(diseases[kind])]
    met = frozenset(rng.sample(of_textbook, round(sizes.met * len(of_textbook))))
    return World(seed, sizes, diseases, chapter_of, values, facts, met, tuple(unused))


def draw_facts(chapter: Sequence[str], values: Sequence[Sequence[str]], rng: random.Random) -> dict[Fact, str]:
    """Facts for the diseases of a chapter. Neighbours differ in every relation, or there would be nothing to compare."""
    return {
        (disease, r): value
        for r in range(len(RELATIONS))
        for disease, value in zip(chapter, rng.sample(values[r], len(chapter)), strict=True)
    }


@dataclass(frozen=True)
class Quiz:
    """A question about one fact: the disease, the relation, the options in order, and the one that is right."""

    disease: str
    relation: int
    options: tuple[str, ...]
    right: str
    neighbours: tuple[str, ...]  # options that are right for a neighbour

    @property
    def text(self) -> str:
        return f"{self.disease}病の{RELATIONS[self.relation].word}はどれか。"

    @property
    def letter(self) -> str:
        return LETTERS[self.options.index(self.right)]


def quiz_on_fact(world: World, fact: Fact, rng: random.Random) -> Quiz:
    """A question about a fact: up to three of the four wrong options are right for a neighbour."""
    disease, r = fact
    right = world.facts[fact]
    near = [world.facts[other, r] for other in world.neighbours(disease)]
    near = rng.sample(near, min(3, len(near)))
    far = [value for value in world.values[r] if value != right and value not in near]
    options = [right, *near, *rng.sample(far, len(LETTERS) - 1 - len(near))]
    rng.shuffle(options)
    return Quiz(disease, r, tuple(options), right, tuple(near))
