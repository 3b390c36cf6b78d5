"""The table of stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from medtrain.trainer.train import cpt, rpo
from medtrain.trainer.train.stage import StageData, StageLoss


class Stage(NamedTuple):
    read_data: Callable[..., StageData]
    make_loss: Callable[..., StageLoss]


STAGES = {"cpt": Stage(cpt.read_data, cpt.make_loss), "rpo": Stage(rpo.read_data, rpo.make_loss)}
