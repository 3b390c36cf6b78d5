"""Child processes that start clean: forked from a server that has imported the modules and run nothing."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext


def clean_context(*modules: str) -> BaseContext:
    """A multiprocessing context whose children share neither threads nor state with their caller.

    A child forked from a process that has trained inherits process groups without their threads: collecting one crashes.
    ``modules`` (dotted names) are imported once, by the server; the first call in a process decides which.
    Targets and arguments must be picklable.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context
