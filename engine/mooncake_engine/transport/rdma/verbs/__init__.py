"""The verbs binding in use: `load` gives the one that `engine.rdma.binding` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mooncake_engine.transport.rdma.verbs.base import Verbs


def load(binding: Literal["native", "pyverbs"]) -> Verbs:
    """Load a binding. Raises `VerbsMissing`, which says what to install."""
    if binding == "pyverbs":
        from mooncake_engine.transport.rdma.verbs.pyverbs import PyVerbs

        return PyVerbs()
    from mooncake_engine.transport.rdma.verbs.native import NativeVerbs

    return NativeVerbs()
