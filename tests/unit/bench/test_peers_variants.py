"""What the benchmark knows of the peers without having them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

import pytest

from mooncake_connector.bench.base import Route

if TYPE_CHECKING:
    from mooncake_connector.bench.base import Backend

PEERS = ("mooncake", "nixl", "ucx", "zmq", "gloo")


def backend(name: str) -> Backend:
    return cast("Backend", importlib.import_module(f"mooncake_connector.bench.backends.{name}"))


@pytest.mark.parametrize("name", PEERS)
def test_what_is_missing_is_said_with_the_wheel_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install" in backend(name).missing()


def test_the_variants_names_are_unique() -> None:
    names = [v.name for name in PEERS for route in Route for v in backend(name).variants(route)]
    assert len(names) == len(set(names)) > 20
