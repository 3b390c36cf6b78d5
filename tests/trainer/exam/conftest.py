"""Tiny models whose every next token is known, and an exam for them."""

import logging

import pytest
from exam_models import CHAIN, chain_model, chain_tokenizer, write_exam


@pytest.fixture(scope="session")
def tokenizer():
    return chain_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    """Answers b, always."""
    return chain_model(tokenizer, CHAIN)


@pytest.fixture(scope="session")
def unsure_model(tokenizer):
    """Answers b or c, as often."""
    return chain_model(tokenizer, CHAIN, either=" ")


@pytest.fixture
def exam(tmp_path):
    return write_exam(tmp_path / "exam.jsonl")


class _Lines(logging.Handler):
    """The lines that are logged; ``on_line`` is called with each."""

    def __init__(self):
        super().__init__()
        self.lines, self.on_line = [], lambda line: None

    def emit(self, record):
        self.lines.append(record.getMessage())
        self.on_line(self.lines[-1])


@pytest.fixture
def log():
    """What medtrain's modules log."""
    logger, lines = logging.getLogger("medtrain"), _Lines()
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(lines)
    logger.setLevel(logging.NOTSET)
