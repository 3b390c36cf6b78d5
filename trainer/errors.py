"""The exceptions that are no failure of the program: a mistake of the user's (one line, exit status 2), a stop by a signal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """A wrong input (setting, file, row, field). Its text is the one line the user sees.

    Build it with :func:`bad_input` where a file, row or field is to be named.
    """


class StopRequested(Exception):
    """A signal requested the run's end; what is on disk is whole, and the same command goes on from there."""


def bad_input(
    problem: str,
    *,
    file: str | Path | None = None,
    row: int | None = None,
    field: str | None = None,
    found: object = None,
    expected: str | None = None,
) -> InputError:
    """Return an :class:`InputError` of the form ``FILE: row K: field 'F': problem (found X; expected Y)``.

    Rows count from 1, as editors and ``sed -n Kp`` do.
    """
    where = ""
    if file is not None:
        where += f"{file}: "
    if row is not None:
        where += f"row {row}: "
    if field is not None:
        where += f"field '{field}': "
    details = []
    if found is not None:
        text = found if isinstance(found, str) and found.strip() else repr(found)
        details.append(f"found {text if len(text) <= 120 else text[:117] + '...'}")
    if expected is not None:
        details.append(f"expected {expected}")
    tail = f" ({'; '.join(details)})" if details else ""
    return InputError((where + problem + tail).replace("\n", "\\n"))


@contextmanager
def user_path(path: str | Path, problem: str = "cannot be read", *, field: str | None = None) -> Iterator[None]:
    """An OSError inside is a mistake in ``path``, which the user named. To be put around its opening and nothing else: a file
    that the program itself misses elsewhere is not the user's mistake."""
    try:
        yield
    except OSError as error:
        raise bad_input(problem, file=error.filename or path, field=field, found=error.strerror or str(error)) from error
