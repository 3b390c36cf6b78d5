"""A made-up medicine, from one seed: diseases with invented names, their facts, a textbook and examinations about them.

Nothing here is real medicine. A disease has a two-syllable katakana name and one value for each of five relations
(治療薬, 所見, 病因, 検査法, 禁忌). Diseases come in chapters of a few neighbours, and there are four kinds of chapters:

- **general**: met in pretraining only, as prose and as examination questions in both forms;
- **train**: in the textbook; preference pairs are made from their questions;
- **dev**: in the textbook; the settings of the recipe were chosen on their questions;
- **test**: in the textbook; asked only by the examination that the demo reports.

Three guarantees, which :func:`check_disjoint` verifies on the texts themselves: no question about a textbook disease
stands in any training text; no textbook sentence names diseases of two kinds (neighbours share a chapter); and the
names of tested diseases stand in nothing that preference pairs are made from.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

ALPHABET = "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロワ"
LETTERS = "abcde"
NUM_OPTIONS = len(LETTERS)


@dataclass(frozen=True)
class Relation:
    """A kind of fact: its Japanese word, the ending its values share, and a gloss for readers of the English text."""

    word: str
    ending: str
    gloss: str


RELATIONS = (
    Relation("治療薬", "ミン", "drug of choice"),
    Relation("所見", "疹", "finding"),
    Relation("病因", "菌", "cause"),
    Relation("検査法", "法", "test"),
    Relation("禁忌", "剤", "contraindicated drug"),
)


@dataclass(frozen=True)
class WorldSizes:
    """How much there is of everything; the defaults are the demo's, tests use less."""

    general: int = 120
    train: int = 40
    dev: int = 40
    test: int = 60
    chapter: int = 5  # diseases that are compared with one another
    values: int = 40  # words a relation can take
    met: float = 0.4  # share of the textbook's facts that pretraining prose mentions too


@dataclass(frozen=True)
class World:
    """The facts. ``facts[disease, r]`` is a value word of ``RELATIONS[r]``; ``chapter_of`` maps a disease to its chapter."""

    seed: int
    sizes: WorldSizes
    kinds: dict[str, tuple[str, ...]]  # "general" | "train" | "dev" | "test" -> disease names
    values: tuple[tuple[str, ...], ...]  # per relation
    facts: dict[tuple[str, int], str]
    chapter_of: dict[str, tuple[str, ...]]
    met: frozenset[tuple[str, int]]  # textbook facts that pretraining prose mentions
    spare_names: tuple[str, ...]  # names of no disease, for one-off patients' questions

    def rng(self, purpose: str) -> random.Random:
        """A generator for one purpose: texts do not change when another text's recipe does."""
        return random.Random(f"{self.seed}/{purpose}")

    @property
    def textbook(self) -> tuple[str, ...]:
        return self.kinds["train"] + self.kinds["dev"] + self.kinds["test"]


def make_world(seed: int, sizes: WorldSizes | None = None) -> World:
    """Draw names, values, facts and chapters. The same seed and sizes give the same world."""
    sizes = sizes or WorldSizes()
    rng = random.Random(f"{seed}/world")
    syllables = [a + b for a in ALPHABET for b in ALPHABET if a != b]
    rng.shuffle(syllables)
    counts = {kind: getattr(sizes, kind) for kind in ("general", "train", "dev", "test")}
    kinds, used = {}, 0
    for kind, count in counts.items():
        kinds[kind] = tuple(syllables[used : used + count])
        used += count
    # Value words take their stems from the same syllables; the ending tells them from disease names.
    values = []
    for relation in RELATIONS:
        stems = rng.sample(syllables, sizes.values)
        values.append(tuple(stem + relation.ending for stem in stems))
    chapter_of = {}
    facts = {}
    for names in kinds.values():
        for start in range(0, len(names), sizes.chapter):
            chapter = names[start : start + sizes.chapter]
            for disease in chapter:
                chapter_of[disease] = chapter
            for r in range(len(RELATIONS)):
                # Neighbours differ in every relation, or there would be nothing to compare.
                for disease, value in zip(chapter, rng.sample(values[r], len(chapter)), strict=True):
                    facts[disease, r] = value
    textbook_facts = [(d, r) for kind in ("train", "dev", "test") for d in kinds[kind] for r in range(len(RELATIONS))]
    met = frozenset(rng.sample(textbook_facts, round(sizes.met * len(textbook_facts))))
    return World(seed, sizes, kinds, tuple(values), facts, chapter_of, met, tuple(syllables[used:]))
