from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mooncake_connector.bench import compiled
from mooncake_connector.bench.backends import memcpy, sockets
from mooncake_connector.bench.base import BackendFailed, Route, Transfer
from mooncake_connector.bench.limits import joined, split

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _forget_the_library() -> Iterator[None]:
    compiled.library.cache_clear()
    yield
    compiled.library.cache_clear()


def column(*values: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, np.uint64)


def test_parts_have_even_bytes_and_are_cut_at_pages() -> None:
    whole = Transfer("read", column(0, 1 << 20), column(0, 1 << 21), column(100_000, 20_000))
    parts = split(whole, 4)
    assert [part.nbytes for part in parts] == [28672, 57344 - 28672, 86016 - 57344, 33984]
    assert parts[-1].local.tolist() == [86016, 1 << 20]
    assert parts[-1].remote.tolist() == [86016, 1 << 21]
    assert parts[-1].lengths.tolist() == [13984, 20_000]


def test_what_is_smaller_than_a_page_stays_whole() -> None:
    parts = split(Transfer("write", column(5), column(7), column(3000)), 4)
    assert len(parts) == 1
    assert parts[0].lengths.tolist() == [3000]


def test_no_byte_is_lost_or_doubled_by_parts() -> None:
    lengths = np.random.default_rng(1).integers(1, 20_000, 333).astype(np.uint64)
    starts = np.cumsum(lengths) - lengths
    for count in (1, 2, 3, 4, 7):
        parts = split(Transfer("read", starts, starts + np.uint64(9), lengths), count)
        assert len(parts) == count
        local = np.concatenate([part.local for part in parts])
        cut = np.concatenate([part.lengths for part in parts])
        assert local[0] == 0
        assert np.array_equal(local[1:], (local + cut)[:-1])
        assert int(cut.sum()) == int(lengths.sum())
        for part in parts:
            assert np.array_equal(part.remote, part.local + np.uint64(9))


def test_runs_that_touch_become_one() -> None:
    bases, lengths = joined(column(10, 15, 40, 30, 34), column(5, 5, 1, 4, 4))
    assert bases.tolist() == [10, 40, 30]
    assert lengths.tolist() == [10, 1, 8]


def test_without_a_compiler_the_missing_one_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for backend in (memcpy, sockets):
        assert "apt install gcc" in backend.missing()
    with pytest.raises(BackendFailed, match="no C compiler here"):
        compiled.library()


def _compiler(folder: Path, script: str) -> None:
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_what_a_compiler_complains_of_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _compiler(tmp_path, "echo 'no stdio.h' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BackendFailed, match=r"no stdio\.h; is the C library's development"):
        compiled.library()
    assert not list((tmp_path / "cache").rglob("limits-*"))


@pytest.mark.skipif(bool(compiled.missing()), reason="no compiler is here")
def test_the_loops_are_built_once_into_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compiled.library()
    (built,) = tmp_path.rglob("*.so")
    before = built.stat().st_mtime_ns
    compiled.library.cache_clear()
    assert compiled.library()._name == first._name == str(built)
    assert built.stat().st_mtime_ns == before


def test_limits_are_variants_of_their_own_route_only() -> None:
    assert not sockets.variants(Route.SAME_HOST)
    assert not memcpy.variants(Route.TCP)
    assert all(v.is_limit == (v.options["called"] == "0") for v in sockets.variants(Route.TCP))
    limits = {v.options["method"] for v in memcpy.variants(Route.SAME_HOST) if v.is_limit}
    assert limits == {"memcpy"}
