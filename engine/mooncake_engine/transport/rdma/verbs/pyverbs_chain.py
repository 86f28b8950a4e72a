"""A chain of work requests of the pyverbs binding.

A request here is two objects, a SendWR and the SGE that it points at. Making them costs 4 us,
and they are never freed unless they are closed; so there is one pair for each place in the queue,
made once, linked once, and written anew for each post, at a tenth of that. Requests of several
scatter/gather entries must be made anew: pyverbs lets nobody change such a list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mooncake_engine.transport.rdma.verbs import abi
from mooncake_engine.transport.rdma.verbs import pyverbs_calls as calls
from mooncake_engine.transport.rdma.verbs.base import Opcode, Work

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Chain:
    """Work requests made once, linked once, and written anew for each post.

    A link cannot be cut in pyverbs, so that a chain of n requests is the last n of them.
    """

    def __init__(self, requests: int) -> None:
        self._entries = [calls.wr.SGE(0, 0, 0) for _ in range(requests)]
        self._requests: list[calls.wr.SendWR] = []
        following = None
        for entry in reversed(self._entries):
            request = calls.wr.SendWR(num_sge=1, sg=[entry], next_wr=following)
            request.close()  # frees the copy of the entry that it points at ...
            request.sg_list = entry  # ... for the entry itself, which can be written
            self._requests.append(request)
            following = request
        self._requests.reverse()
        self._made: list[calls.wr.SendWR | calls.wr.SGE] = []  # for one post alone

    def fill(
        self,
        opcode: Opcode,
        work: Work,
        rows: slice,
        lkeys: NDArray[np.uint32],
        rkeys: NDArray[np.uint32],
        *,
        wr_id: int,
        signal_every: int,
        inline: int,
    ) -> calls.wr.SendWR:
        """Write the chain of `QueuePair.post`; returns its first request."""
        start, stop = rows.start, rows.stop
        first, last = int(work.sge_first[start]), int(work.sge_first[stop - 1])
        taken = slice(first, last + int(work.sge_count[stop - 1]))
        # Python's integers, once: taking a number out of an array costs more than setting it.
        entries = list(
            zip(
                work.local[taken].tolist(),
                work.local_length[taken].tolist(),
                lkeys[taken].tolist(),
                strict=True,
            )
        )
        counts = work.sge_count[rows].tolist()
        targets = zip(rkeys[rows].tolist(), work.remote[rows].tolist(), strict=True)
        flags = np.zeros(stop - start, np.uint32)
        if inline and opcode is not Opcode.READ:
            sizes = np.add.reduceat(work.local_length[taken], work.sge_first[rows] - first)
            flags[sizes <= inline] = abi.SEND_INLINE
        flags[signal_every - 1 :: signal_every] |= abi.SEND_SIGNALED
        flags[-1] |= abi.SEND_SIGNALED
        place = len(self._requests) - len(counts)
        if max(counts) > 1:
            return self._made_anew(int(opcode), entries, counts, list(targets), flags, wr_id)
        for (address, length, key), target, flag in zip(
            entries, targets, flags.tolist(), strict=True
        ):
            entry, request = self._entries[place], self._requests[place]
            entry.addr = address
            entry.length = length
            entry.lkey = key
            request.wr_id = wr_id
            request.opcode = opcode
            request.send_flags = flag
            request.set_wr_rdma(*target)
            place += 1
            wr_id += 1
        return self._requests[-len(counts)]

    def _made_anew(
        self,
        opcode: int,
        entries: list[tuple[int, int, int]],
        counts: list[int],
        targets: list[tuple[int, int]],
        flags: NDArray[np.uint32],
        wr_id: int,
    ) -> calls.wr.SendWR:
        """Requests of several entries; `release` frees them."""
        following, stop = None, len(entries)
        for row in reversed(range(len(counts))):
            own = [calls.wr.SGE(*entry) for entry in entries[stop - counts[row] : stop]]
            stop -= counts[row]
            following = calls.wr.SendWR(
                wr_id=wr_id + row,
                opcode=opcode,
                num_sge=len(own),
                sg=own,
                send_flags=int(flags[row]),
                next_wr=following,
            )
            following.set_wr_rdma(*targets[row])
            self._made += [following, *own]
        return following

    def release(self) -> None:
        """Free what was made for one post, which has copied it."""
        for made in self._made:
            made.close()
        self._made.clear()

    def close(self) -> None:
        """Free what the requests point at."""
        for entry in self._entries:
            entry.close()
        self._entries.clear()
        self._requests.clear()
