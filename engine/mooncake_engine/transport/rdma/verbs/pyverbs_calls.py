"""The distribution's pyverbs imported, and its failures turned into ours.

Raises `VerbsMissing` when it is imported where there is no pyverbs.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from mooncake_engine.transport.rdma.verbs.base import VerbsError, VerbsMissing

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def _logging_as_it_was() -> Iterator[None]:
    """Undo pyverbs' `logging.basicConfig`: how to log is for the program to say."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
        root.setLevel(level)


try:
    with _logging_as_it_was():
        from pyverbs import addr, cq, device, mr, pd, qp, wr
        from pyverbs.pyverbs_error import PyverbsError
except ImportError as error:
    raise VerbsMissing(
        f"pyverbs cannot be imported ({error}); install it: apt-get install python3-pyverbs, and "
        "run in an environment of the system's Python (/usr/bin/python3 -m venv "
        "--system-site-packages), for which alone it is built. The native binding needs neither"
    ) from error

__all__ = ["addr", "attempting", "cq", "device", "mr", "pd", "qp", "wr"]


@contextlib.contextmanager
def attempting(what: str) -> Iterator[None]:
    """Raise what pyverbs raises as `VerbsError`."""
    try:
        yield
    except PyverbsError as error:
        # PyverbsUserError, what pyverbs itself refuses, has no code; -1 is its "unknown".
        code = getattr(error, "error_code", 0)
        raise VerbsError(0 if code == -1 else abs(code), f"{what} ({error})") from error
