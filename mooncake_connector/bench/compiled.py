"""Builds the C loops of `bench/native` with the machine's compiler, once, and loads them.

They measure what the machine can do, so they are no part of an installation: who has no compiler
has a benchmark without the column "% of limit". The flags are `-O2 -pthread`; the loops are system
calls and libc's memcpy, which picks its instructions by the processor itself.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mooncake_connector.bench.base import BackendFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

FLAGS = ("-O2", "-std=gnu11", "-Wall", "-shared", "-fPIC", "-pthread")
SOURCES = Path(__file__).parent / "native"
BUILD_S = 60.0


def compiler() -> str | None:
    """Path of the C compiler: $CC, cc, gcc or clang, the first that is there."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return str(Path(found).resolve())
    return None


def missing() -> str:
    """Why the loops cannot be built here, as one sentence; empty when they can."""
    if compiler():
        return ""
    return (
        "the machine's limit is measured by loops in C and there is no C compiler here; install "
        "one (apt install gcc libc6-dev, dnf install gcc) or name it in CC"
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The loops; built into the user's cache when this source was not yet.

    Raises:
        BackendFailed: There is no compiler, or what it said.
    """
    sources = sorted(SOURCES.glob("*.[ch]"))
    return _typed(ctypes.CDLL(str(built("limits", sources)), use_errno=True))


def built(
    name: str, sources: Sequence[Path], more: Sequence[str] = (), libraries: Sequence[str] = ()
) -> Path:
    """A shared library of these sources and headers; built when the cache has none of them.

    Args:
        name: How its file's name begins.
        sources: What decides whether it is up to date; the `.c` files are compiled.
        more: Flags beside `FLAGS`.
        libraries: What it is linked with.

    Raises:
        BackendFailed: There is no compiler, or what it said.
    """
    cc = compiler()
    if cc is None:
        raise BackendFailed(missing())
    key = hashlib.sha256(" ".join((cc, *FLAGS, *more, *libraries)).encode())
    for source in sources:
        key.update(source.read_bytes())
    file = _cache() / f"{name}-{key.hexdigest()[:16]}.so"
    if not file.exists():
        own = [str(source) for source in sources if source.suffix == ".c"]
        _build([cc, *FLAGS, *more, *own, *libraries], file)
    return file


def _cache() -> Path:
    """The user's cache folder or, where that cannot be written, a folder of this process."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(home).expanduser() / "mooncake-connector"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only, or no home at all
        pass
    else:
        if os.access(folder, os.W_OK):
            return folder
    # Not one name for all: what is loaded from /tmp must be what this process put there.
    return Path(tempfile.mkdtemp(prefix="mooncake-connector-"))


def _build(how: list[str], file: Path) -> None:
    unfinished = file.with_suffix(f".{os.getpid()}")
    command = [*how, "-o", str(unfinished)]
    try:
        done = subprocess.run(  # noqa: S603  # the user's own compiler, our own sources
            command, capture_output=True, text=True, timeout=BUILD_S, check=False
        )
        if done.returncode:
            raise BackendFailed(
                f"cannot build {file.name}: {' '.join(command)} said "
                f"{done.stderr.strip() or done.returncode}; is the C library's development "
                "package there (apt install libc6-dev)?"
            )
        unfinished.rename(file)  # at once: another process builds the same at the same time
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise BackendFailed(f"cannot run the C compiler {how[0]}: {failure}") from failure
    finally:
        unfinished.unlink(missing_ok=True)


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, arguments in (
        ("limits_team", pointer, (pointer, pointer, size)),
        ("limits_many", ctypes.c_int, (pointer, size, pointer)),
        ("limits_disband", None, (pointer,)),
        ("limits_serve", ctypes.c_int, (pointer,)),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library
