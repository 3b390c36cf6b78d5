"""Every configuration that is shipped is read without a mistake and says nothing that its stage ignores."""

from pathlib import Path

import pytest

from medtrain.trainer.config import load_config, load_pairs_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("*cpt.yaml")) + sorted(CONFIGS.glob("*rpo*.yaml")), ids=lambda p: p.name
)
def test_a_shipped_training_config_is_valid_and_every_setting_in_it_counts(path):
    config = load_config(None, path)
    assert config.stage in path.stem
    assert config.unused() == []


def test_the_shipped_pairs_config_is_valid():
    assert load_pairs_config(CONFIGS / "pairs.yaml").num_paths == 8
