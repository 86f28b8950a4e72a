"""A chain of ibv_send_wr as one numpy array. Pure: what is posted can be looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mooncake_engine.transport.rdma.verbs import abi
from mooncake_engine.transport.rdma.verbs.base import Opcode, Work

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Chain:
    """Room for one chain of ibv_send_wr, linked once; filled by columns, posted, and used again.

    A post copies it, so that it may be filled anew when the call returns.
    """

    def __init__(self, requests: int, entries: int) -> None:
        """Args: entries: scatter/gather entries a request."""
        self._requests = np.zeros(requests, abi.SEND_WR)
        self._entries = np.zeros(requests * entries, abi.SGE)
        self.address = self._requests.ctypes.data
        self._entry_address = np.uint64(self._entries.ctypes.data)
        # Views of the columns, made once: making one costs as much as filling it.
        self._column = {name: self._requests[name] for name in abi.SEND_WR.names or ()}
        self._entry = {name: self._entries[name] for name in abi.SGE.names or ()}
        size = abi.SEND_WR.itemsize
        self._next = self._column["next"]
        self._next[:] = self.address + size * (np.arange(requests, dtype=np.uint64) + np.uint64(1))
        self._ids = np.arange(requests, dtype=np.uint64)

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
    ) -> int:
        """Write the chain of `QueuePair.post`; returns its length."""
        count: int = rows.stop - rows.start
        firsts, counts = work.sge_first[rows], work.sge_count[rows]
        begin, end = int(firsts[0]), int(firsts[-1] + counts[-1])
        entry, column = self._entry, self._column
        entry["addr"][: end - begin] = work.local[begin:end]
        entry["length"][: end - begin] = work.local_length[begin:end]
        entry["lkey"][: end - begin] = lkeys[begin:end]
        offsets = (firsts - begin).astype(np.uint64) << np.uint64(4)
        column["sg_list"][:count] = self._entry_address + offsets
        column["num_sge"][:count] = counts
        column["remote_addr"][:count] = work.remote[rows]
        column["rkey"][:count] = rkeys[rows]
        column["opcode"][:count] = int(opcode)
        column["wr_id"][:count] = self._ids[:count] + np.uint64(wr_id)
        flags = column["send_flags"]
        flags[:count] = 0
        if inline and opcode is not Opcode.READ:
            sizes = np.add.reduceat(work.local_length[begin:end], firsts - begin)
            flags[:count][sizes <= inline] = abi.SEND_INLINE
        flags[signal_every - 1 : count : signal_every] |= abi.SEND_SIGNALED
        flags[count - 1] |= abi.SEND_SIGNALED
        self._next[count - 1] = 0
        return count

    def fill_imm(
        self, imm: int, source: NDArray[np.uint8], remote: int, rkey: int, wr_id: int
    ) -> None:
        """Write the single request of `QueuePair.post_imm`."""
        self._entries[0] = (source.ctypes.data, source.size, 0)
        column = self._column
        column["wr_id"][0] = wr_id
        column["sg_list"][0] = self._entry_address
        column["num_sge"][0] = 1 if source.size else 0
        column["opcode"][0] = int(Opcode.WRITE_WITH_IMM)
        column["send_flags"][0] = abi.SEND_SIGNALED | abi.SEND_INLINE
        column["imm_data"][0] = imm
        column["remote_addr"][0] = remote
        column["rkey"][0] = rkey
        self._next[0] = 0

    def rejoin(self, count: int) -> None:
        """Link the last request of a posted chain to the one after it again."""
        self._next[count - 1] = self.address + abi.SEND_WR.itemsize * count
