"""A file or folder of rows that a run reads, as the settings name it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from medtrain.trainer.errors import bad_input


@dataclass(frozen=True)
class Source:
    """One entry of ``data.sources``, ``data.pairs`` or ``data.heldout``.

    ``path``: file or folder. ``weight``: share of every step relative to the other sources (all have one or none has).
    ``name``: what metrics and the ledger call it; the file's stem where not given.
    """

    path: str
    weight: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        weight = self.weight
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight is not None and not (is_number and math.isfinite(weight) and weight > 0):
            raise bad_input("wrong weight", file=self.path, field="weight", found=weight, expected="a number above 0")
