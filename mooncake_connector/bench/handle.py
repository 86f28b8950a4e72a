"""The driver's end of one side: commands go out, answers come back, all within limits."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, TypeVar

from typing_extensions import override

from mooncake_connector.bench import messages
from mooncake_connector.bench.base import BackendFailed
from mooncake_connector.bench.channel import Channel, ChannelEnded

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping
    from pathlib import Path

    from mooncake_connector.bench.messages import Answer, Command

A = TypeVar("A", bound="Answer")

#: For what takes as long as the machine is slow: a start that imports torch, a fill of gigabytes.
LIMIT_S = 60.0
CLOSE_S = 5.0
#: A side that hangs writes its threads' stacks into its log within this.
STACKS_S = 0.5
_LOG_LINES = 8


class Handle:
    """One side, wherever it runs. After a failure of the channel the side is ended."""

    def __init__(self, name: str, channel: Channel) -> None:
        self.name = name
        self._channel = channel

    def post(self, command: Command) -> None:
        """Send a command; its answer is taken by `answer`, so that two sides work at once."""
        try:
            self._channel.send(messages.encode(command), LIMIT_S)
        except ChannelEnded as error:
            raise self._lost(f"ended before it could be asked to {_verb(command)}") from error
        except TimeoutError as error:
            raise self._lost(f"took no {_verb(command)} command for {LIMIT_S:.0f} s") from error

    def answer(self, kind: type[A], limit_s: float = LIMIT_S) -> A:
        """The answer to the last command.

        Raises:
            BackendFailed: The side could not, in its words; or it ended, or took too long.
        """
        try:
            answer = messages.decode_answer(self._channel.receive(limit_s))
        except ChannelEnded as error:
            raise self._lost("ended without an answer") from error
        except TimeoutError as error:
            self._show_stacks()
            raise self._lost(f"gave no answer for {limit_s:.0f} s and was ended") from error
        if isinstance(answer, messages.Failed):
            raise BackendFailed(f"{self.name}: {answer.text}{self._where()}")
        assert isinstance(answer, kind), f"{self.name} answered {answer!r}, not a {kind.__name__}"
        return answer

    def ask(self, command: Command, kind: type[A], limit_s: float = LIMIT_S) -> A:
        """Both."""
        self.post(command)
        return self.answer(kind, limit_s)

    def suspend(self) -> None:
        """Stop it where that is in our power; a stopped side takes no CPU time."""

    def resume(self) -> None:
        """Let it run again."""

    def hang_up(self) -> None:
        """Tell it to end, without a wait."""
        self._channel.close()

    def close(self) -> None:
        """End it; idempotent."""
        self.hang_up()

    def _lost(self, what: str) -> BackendFailed:
        self.close()
        return BackendFailed(f"{self.name} {what}{self._where()}")

    def _show_stacks(self) -> None:
        """Ask where it hangs."""

    def _where(self) -> str:
        return ""


class ChildSide(Handle):
    """A side in a child process, leader of a process group; its output goes to `log`."""

    def __init__(self, name: str, environment: Mapping[str, str], log: Path) -> None:
        """Start it. The thread that does so must outlive it: the side dies with that thread."""
        self.log = log
        self._ended = False
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", "mooncake_connector.bench.side", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, **environment},
                # A terminal's Ctrl-C is the driver's. No session of its own: Linux shares cores
                # out among sessions (sched_autogroup), whatever runs in each.
                process_group=0,
            )
        assert self._process.stdin is not None  # asked for above
        assert self._process.stdout is not None  # ditto
        channel = Channel(
            os.dup(self._process.stdout.fileno()),
            os.dup(self._process.stdin.fileno()),
            lambda: self._process.poll() is None,
        )
        self._process.stdin.close()
        self._process.stdout.close()
        super().__init__(name, channel)

    @property
    def pid(self) -> int:
        """Of the side's process, and of its group."""
        return self._process.pid

    @override
    def suspend(self) -> None:
        self._signal_all(signal.SIGSTOP)

    @override
    def resume(self) -> None:
        self._signal_all(signal.SIGCONT)

    @override
    def hang_up(self) -> None:
        super().hang_up()
        self.resume()  # a stopped process does not see that its channel is closed

    @override
    def close(self) -> None:
        """Tell it to end, then end it and all that it started."""
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)
        self._signal_all(signal.SIGKILL)
        self._process.wait()
        self._ended = True

    def _signal_all(self, number: signal.Signals) -> None:
        if self._ended:  # the number may be another's by now
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    @override
    def _lost(self, what: str) -> BackendFailed:
        self._signal_all(signal.SIGKILL)
        code = self._process.wait()
        how = f" (killed by {signal.Signals(-code).name})" if code < 0 else f" (exit status {code})"
        return super()._lost(what + (how if "ended" in what else ""))

    @override
    def _show_stacks(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
        time.sleep(STACKS_S)  # faulthandler writes at once; there is nothing to wait for

    @override
    def _where(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "".join([f"; its log is {self.log}", *(f"\n  {line}" for line in lines)])


class RemoteSide(Handle):
    """A side that a target server started for this connection (`remote.py`)."""

    def __init__(self, name: str, connection: socket.socket) -> None:
        """Takes the connection over."""
        self.own_host = str(connection.getsockname()[0])
        descriptor = connection.detach()
        super().__init__(name, Channel(descriptor, os.dup(descriptor)))

    @override
    def _where(self) -> str:
        return "; its log is the output of the target's command"


def _verb(command: Command) -> str:
    return type(command).__name__.lower()


def file_name(text: str) -> str:
    """A variant's name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()
