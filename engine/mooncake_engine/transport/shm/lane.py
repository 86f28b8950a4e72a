"""A lane of the shm transport, and the two ways to a peer's memory that it may go."""

from __future__ import annotations

import abc
import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.errors import LaneError
from mooncake_engine.native import Outcome
from mooncake_engine.transport.base import Lane
from mooncake_engine.transport.shm import process_vm
from mooncake_engine.transport.shm.process_vm import Runs
from mooncake_engine.types import Op, Slice, Status

if TYPE_CHECKING:
    from mooncake_engine.iovec import Iovecs
    from mooncake_engine.native.team import Team
    from mooncake_engine.transport.shm.arena_reader import ArenaReader
    from mooncake_engine.transport.shm.nonce import NonceReader
    from mooncake_engine.types import Uint64s


_OPEN = contextlib.nullcontext()  # one for all: to make one takes 0.3 us


class Way(abc.ABC):
    """How one lane gets at its peer's memory. One thread at a time."""

    #: Process in whose address space `locate` gives addresses, and a name for it.
    pid: int
    where: str

    @abc.abstractmethod
    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keeps the way open for one slice."""

    @abc.abstractmethod
    def locate(self, addresses: Uint64s, lengths: Uint64s) -> Uint64s:
        """The peer's addresses as addresses of `pid`. `LaneError` REFUSED: unreachable."""

    def generation(self) -> int:
        """Another number once `locate` may say otherwise than it did."""
        return 0

    @abc.abstractmethod
    def copy(self, op: Op, local: Iovecs, remote: Iovecs, nbytes: int) -> int:
        """Move at least one byte and at most `nbytes`; returns how many. Raises `OSError`."""

    @abc.abstractmethod
    def confirm(self) -> None:
        """Raise `LaneError` PEER_GONE unless the peer lives and is still the same engine."""


class ByPid(Way):
    """All of the peer's memory, through the kernel."""

    def __init__(self, peer: str, nonce: NonceReader) -> None:
        """Args: nonce: this way's own."""
        self.pid = nonce.pid
        self.where = f"process {nonce.pid} of {peer}"
        self._nonce = nonce

    @override
    def held(self) -> contextlib.AbstractContextManager[None]:
        return _OPEN

    @override
    def locate(self, addresses: Uint64s, lengths: Uint64s) -> Uint64s:
        return addresses

    @override
    def copy(self, op: Op, local: Iovecs, remote: Iovecs, nbytes: int) -> int:
        return process_vm.copy(op, self.pid, local, remote, nbytes)

    @override
    def confirm(self) -> None:
        self._nonce.confirm()


class ByMapping(Way):
    """The peer's arenas, as mapped into this process by the link's `ArenaReader`."""

    def __init__(self, peer: str, reader: ArenaReader) -> None:
        self.pid = os.getpid()
        self.where = f"the arena of {peer}"
        self._reader = reader
        self._poller = reader.poller()
        self._by_kernel = process_vm.usable()

    @override
    def held(self) -> contextlib.AbstractContextManager[None]:
        return self._reader.use()

    @override
    def locate(self, addresses: Uint64s, lengths: Uint64s) -> Uint64s:
        return self._reader.locate(addresses, lengths)

    @override
    def generation(self) -> int:
        return self._reader.generation()

    @override
    def copy(self, op: Op, local: Iovecs, remote: Iovecs, nbytes: int) -> int:
        if self._by_kernel:
            return process_vm.copy(op, self.pid, local, remote, nbytes)
        return process_vm.copy_mapped(op, local, remote)

    @override
    def confirm(self) -> None:
        self._reader.confirm(self._poller)


class ShmLane(Lane):
    """Copies slice by slice; between system calls of at most 32 MiB it looks for an interrupt."""

    def __init__(self, peer: str, way: Way, team: Team | None) -> None:
        """Args: team: copies, as long as nothing goes wrong."""
        self._peer = peer
        self._way = way
        self._team = team
        self._interrupted = False

    @override
    def move(self, piece: Slice, deadline: float) -> None:
        with self._way.held():
            self._check(piece, deadline)
            generation = self._way.generation()
            remote = self._way.locate(piece.remote, piece.lengths)
            moved = self._team and self._is_moved_by(self._team, piece, remote, deadline)
            while not moved or self._way.generation() != generation:
                generation = self._way.generation()
                self._move_by_calls(piece, deadline)
                moved = True

    def _move_by_calls(self, piece: Slice, deadline: float) -> None:
        self.moved_at = 0.0
        if piece.op is Op.WRITE:
            self._way.confirm()  # a pid that was given away must not be written to
        remote = self._way.locate(piece.remote, piece.lengths)
        runs = Runs(piece.local, remote, piece.lengths, piece.nbytes)
        done = 0
        while done < runs.nbytes:
            self._check(piece, deadline)
            try:
                done += self._way.copy(piece.op, *runs.window(done), runs.nbytes - done)
            except OSError as error:
                raise self._fault(piece.op, runs, done, error) from error
            # Like a seqlock: the peer is still there, so it was there for what was copied.
            self._way.confirm()  # 2 us a call of up to 32 MiB

    def _is_moved_by(self, team: Team, piece: Slice, remote: Uint64s, deadline: float) -> bool:
        """False: nothing is known of the slice; go about it call by call."""
        if remote is not piece.remote:
            piece = Slice(piece.op, piece.local, remote, piece.lengths, piece.nbytes, b"")
        done = team.run(piece, deadline, hurry=self.hurry) == Outcome.DONE
        self.moved_at = team.ended if done else 0.0
        return done

    def _check(self, piece: Slice, deadline: float) -> None:
        if self._interrupted:
            raise LaneError(Status.CANCELLED, f"{piece.op} with {self._peer} was interrupted")
        if time.monotonic() > deadline:
            raise LaneError(
                Status.TIMED_OUT,
                f"{piece.op} of {piece.nbytes} bytes with {self._peer} ran out of time; raise "
                "transfer_timeout_s if the machine is this busy",
            )

    def _fault(self, op: Op, runs: Runs, done: int, error: OSError) -> LaneError:
        """The end of a slice whose byte number `done` could not be moved."""
        local, remote = runs.at(done)
        if error.errno == errno.EFAULT:
            self._way.confirm()  # else it is the peer's end that took the memory away
            if op is Op.READ:
                ours = process_vm.readable(self._way.pid, remote)
            else:
                ours = not process_vm.readable(os.getpid(), local)
            if ours:
                return LaneError(
                    Status.FAILED,
                    f"{op} with {self._peer} failed: local memory at {local:#x} is not mapped "
                    "or not writable; keep registered memory until it is unregistered",
                )
        return process_vm.explain(error, f"{op} at {remote:#x} in {self._way.where}")

    @override
    def interrupt(self) -> None:
        self._interrupted = True
        if self._team:
            self._team.stop()

    @override
    def close(self) -> None:
        if self._team:
            self._team.close()


class MappedFirst(Lane):
    """Moves a slice over our mapping of the peer's memory where that holds it, else by pid."""

    def __init__(self, mapped: ShmLane, by_pid: ShmLane) -> None:
        self._mapped = mapped
        self._by_pid = by_pid

    @override
    def move(self, piece: Slice, deadline: float) -> None:
        try:
            self._move_by(self._mapped, piece, deadline)
        except LaneError as failure:
            if failure.status not in (Status.REFUSED, Status.PEER_GONE):
                raise
            self._move_by(self._by_pid, piece, deadline)  # it knows whether the peer is gone

    def _move_by(self, lane: ShmLane, piece: Slice, deadline: float) -> None:
        lane.hurry = self.hurry
        lane.move(piece, deadline)
        self.moved_at = lane.moved_at

    @override
    def interrupt(self) -> None:
        self._mapped.interrupt()
        self._by_pid.interrupt()

    @override
    def close(self) -> None:
        self._mapped.close()
        self._by_pid.close()
