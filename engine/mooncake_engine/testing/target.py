"""The far side of a transfer: an engine with one region of memory, here or in a child process.

`python -m mooncake_engine.testing.target CONFIG LENGTH` (JSON, bytes) is that child: it answers
one line of JSON for each line of JSON and ends with its standard input.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from typing_extensions import override

from mooncake_engine.config import EngineConfig
from mooncake_engine.engine import TransferEngine
from mooncake_engine.types import SegmentRecord

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

#: A child answers within this, also on a busy machine; importing numpy is the longest part.
ANSWER_S = 30.0


def pattern(seed: int, length: int) -> NDArray[np.uint8]:
    """`length` pseudo-random bytes, the same in every process."""
    return np.frombuffer(np.random.default_rng(seed).bytes(length), np.uint8)


def digest(memory: NDArray[np.uint8]) -> str:
    """A hash to compare memory across processes."""
    return hashlib.blake2b(memory.data, digest_size=16).hexdigest()


class Target(abc.ABC):
    """What a check may ask of the far side."""

    record: SegmentRecord

    @abc.abstractmethod
    def fill(self, seed: int) -> None:
        """Overwrite the region with `pattern(seed, length)`."""

    @abc.abstractmethod
    def digest(self) -> str:
        """`digest` of the whole region."""

    @abc.abstractmethod
    def grant(self, token: bytes) -> None:
        """`TransferEngine.grant` there."""

    @abc.abstractmethod
    def revoke(self, token: bytes) -> None:
        """`TransferEngine.revoke` there."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close its engine in order. Idempotent."""

    @property
    def address(self) -> int:
        """Where the region starts."""
        return self.record.regions[0].address

    @property
    def length(self) -> int:
        """Bytes of the region."""
        return self.record.regions[0].length

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class LocalTarget(Target):
    """A second engine in this process."""

    def __init__(self, config: EngineConfig, length: int) -> None:
        self._engine = TransferEngine(config)
        self.memory = self._engine.allocate(length)
        self.record = self._engine.record()

    @override
    def fill(self, seed: int) -> None:
        self.memory[:] = pattern(seed, self.memory.size)

    @override
    def digest(self) -> str:
        return digest(self.memory)

    @override
    def grant(self, token: bytes) -> None:
        self._engine.grant(token)

    @override
    def revoke(self, token: bytes) -> None:
        self._engine.revoke(token)

    @override
    def close(self) -> None:
        self._engine.close()


class _Command(msgspec.Struct, frozen=True):
    do: str
    seed: int = 0
    token: bytes = b""


class _Answer(msgspec.Struct, frozen=True):
    text: str = ""
    record: bytes = b""  # a SegmentRecord as msgpack


class ChildTarget(Target):
    """An engine in a process of its own, which can be stopped and killed."""

    def __init__(self, config: EngineConfig, length: int) -> None:
        arguments = [msgspec.json.encode(config).decode(), str(length)]
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "mooncake_engine.testing.target", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self.record = msgspec.msgpack.decode(self._answer().record, type=SegmentRecord)
        except BaseException:
            self.close()
            raise

    @override
    def fill(self, seed: int) -> None:
        self._ask(_Command("fill", seed=seed))

    @override
    def digest(self) -> str:
        return self._ask(_Command("digest")).text

    @override
    def grant(self, token: bytes) -> None:
        self._ask(_Command("grant", token=token))

    @override
    def revoke(self, token: bytes) -> None:
        self._ask(_Command("revoke", token=token))

    def stop(self) -> None:
        """SIGSTOP: it is alive, keeps its sockets open, and does nothing."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    @override
    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.resume()
        with contextlib.suppress(OSError):  # it is gone, and something was still buffered
            self._process.stdin.close()  # its cue to end
        try:
            self._process.wait(ANSWER_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            self._process.stdout.close()

    def _ask(self, command: _Command) -> _Answer:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(command) + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> _Answer:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_S)[0]:
            raise TimeoutError(f"target process {self._process.pid} gave no answer")
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(f"target process {self._process.pid} ended: {self._process.wait()}")
        return msgspec.json.decode(line, type=_Answer)


def main(config: str, length: str) -> None:
    """Serve one region until standard input ends."""
    answers = sys.stdout.buffer

    def answer(text: str = "", record: bytes = b"") -> None:
        answers.write(msgspec.json.encode(_Answer(text, record)) + b"\n")
        answers.flush()

    settings = msgspec.json.decode(config, type=EngineConfig)
    with LocalTarget(settings, int(length)) as target:
        answer(record=msgspec.msgpack.encode(target.record))
        for line in sys.stdin.buffer:
            command = msgspec.json.decode(line, type=_Command)
            match command.do:
                case "fill":
                    target.fill(command.seed)
                case "grant":
                    target.grant(command.token)
                case "revoke":
                    target.revoke(command.token)
                case "digest":
                    pass
                case unknown:
                    raise ValueError(f"unknown command {unknown!r}")
            answer(target.digest() if command.do == "digest" else "")


if __name__ == "__main__":
    main(*sys.argv[1:])
