"""Tiny models whose every next token is known, and an exam for them."""

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
