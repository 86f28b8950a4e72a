"""Runs that touch on both sides joined into one, as a careful caller of any engine does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from mooncake_connector.bench.base import Transfer


def merged(transfer: Transfer) -> Transfer:
    """The same bytes in as few descriptors as can be, in the order of the remote side.

    Ours does this within each transfer; a peer that does not is given the chance outside of
    what is timed.
    """
    order = np.argsort(transfer.remote, kind="stable")
    local, remote = transfer.local[order], transfer.remote[order]
    lengths = transfer.lengths[order]
    first = np.ones(lengths.size, bool)
    first[1:] = (local[1:] != local[:-1] + lengths[:-1]) | (
        remote[1:] != remote[:-1] + lengths[:-1]
    )
    starts = np.flatnonzero(first)
    return msgspec.structs.replace(
        transfer,
        local=local[starts],
        remote=remote[starts],
        lengths=np.add.reduceat(lengths, starts),
    )
