"""What other libraries print by themselves."""

from __future__ import annotations

from transformers.utils import logging


def quiet_libraries() -> None:
    """No progress bars and hints of transformers between our own lines."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
