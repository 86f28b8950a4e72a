"""One side of a variant in a process of its own: `python -m mooncake_connector.bench.side`.

Reads commands from its standard input and writes answers to its standard output, both taken away
before a backend is imported: what engines print goes to standard error, the side's log. It ends
when the driver closes the channel, and is killed when the driver dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, Self

import numpy as np

from mooncake_connector.bench import messages
from mooncake_connector.bench.base import BackendFailed, Initiator, Target
from mooncake_connector.bench.busy import BusyPython
from mooncake_connector.bench.channel import Channel, ChannelEnded
from mooncake_connector.bench.pattern import Pattern, check
from mooncake_connector.bench.placement import stay_near, touched_pages
from mooncake_connector.bench.workers import Stop, Workers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from mooncake_connector.bench.messages import Answer, Command, Packed

PR_SET_PDEATHSIG = 1
#: An answer is small; a driver that does not take it for so long is not there any more.
ANSWER_LIMIT_S = 60.0


class Side:
    """What a side holds between commands."""

    def __init__(self, options: Mapping[str, str]) -> None:
        """`options` go before those of the driver's."""
        self._options = options
        self._memory: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._end: Target | Initiator | None = None
        self._workers: Workers | None = None
        self._busy: BusyPython | None = None
        self._busy_spent = 0.0

    def obey(self, command: Command) -> Answer:
        """Do it. Raises whatever the backend raises."""
        match command:
            case messages.Open():
                return self._open(command)
            case messages.Fill():
                Pattern(command.seed).fill(self._memory[: command.nbytes])
            case messages.Verify():
                self._verify(command)
            case messages.Connect():
                self._initiator().connect(command.address)
            case messages.Prepare():
                self._prepare(command)
            case messages.Measure():
                return self._measure(Stop(command.seconds, command.runs))
            case messages.Contact():
                return self._first_contact(command.address, command.transfer)
            case messages.Busy():
                self._be_busy(on=command.on)
            case messages.Clock():
                return messages.Seconds(value=self._cpu_s())
        return messages.Done()

    def _open(self, command: messages.Open) -> messages.Opened:
        os.environ.update(command.environment)
        options = {**command.options, **self._options}
        stay_near(options.get("device_name", ""))
        self._memory = touched_pages(command.nbytes)
        module = importlib.import_module(f"mooncake_connector.bench.backends.{command.backend}")
        kind = module.Target if command.role == "target" else module.Initiator
        self._end = kind(self._memory, options)
        address = self._end.address() if isinstance(self._end, Target) else {}
        return messages.Opened(pid=os.getpid(), address=address)

    def _initiator(self) -> Initiator:
        assert isinstance(self._end, Initiator), "only an initiator is asked to move anything"
        return self._end

    def _verify(self, command: messages.Verify) -> None:
        runs = [messages.unpack(packed) for packed in command.moved]
        here, there, lengths = (
            np.concatenate(columns)
            for columns in zip(*((r.local, r.remote, r.lengths) for r in runs), strict=True)
        )
        patterns = Pattern(command.own_seed), Pattern(command.other_seed)
        wrong = check(self._memory[: command.nbytes], here, there, lengths, *patterns)
        if wrong:
            raise BackendFailed(f"the bytes are not right: {wrong}")

    def _prepare(self, command: messages.Prepare) -> None:
        self._forget()
        work = [[messages.unpack(packed) for packed in transfers] for transfers in command.work]
        self._workers = Workers(self._initiator(), work)
        if command.warm_up_s:
            self._workers.run(Stop(command.warm_up_s))

    def _forget(self) -> None:
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.close()

    def _measure(self, stop: Stop) -> messages.Measured:
        assert self._workers is not None, "what is measured is prepared before"
        spent = self._cpu_s()
        timed = self._workers.run(stop)
        return messages.Measured(
            cpu_s=self._cpu_s() - spent,
            samples=np.concatenate([each.samples for each in timed]).tobytes(),
            in_place=np.concatenate([each.in_place for each in timed]).tobytes(),
            wall_s=max(each.ended for each in timed) - min(each.started for each in timed),
            nbytes=sum(each.nbytes for each in timed),
        )

    def _first_contact(self, address: Mapping[str, str], packed: Packed) -> messages.Seconds:
        initiator, transfer = self._initiator(), messages.unpack(packed)
        started = time.perf_counter()
        initiator.connect(address)
        initiator.prepare(transfer)()
        return messages.Seconds(value=time.perf_counter() - started)

    def _be_busy(self, *, on: bool) -> None:
        if on and self._busy is None:
            self._busy = BusyPython()
        elif not on and self._busy is not None:
            self._busy_spent += self._busy.close()
            self._busy = None

    def _cpu_s(self) -> float:
        """User and system, all threads and ended children, without the busy thread."""
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = self._busy_spent + (self._busy.cpu_s() if self._busy else 0.0)
        return time.process_time() + children.ru_utime + children.ru_stime - busy

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._be_busy(on=False)
        self._forget()
        if self._end is not None:
            self._end.close()


def serve(channel: Channel, options: Mapping[str, str]) -> None:
    """Answer every command until the driver closes the channel."""
    with Side(options) as side, contextlib.suppress(ChannelEnded):
        while True:
            command = messages.decode_command(channel.receive(None))
            try:
                answer = side.obey(command)
            except BackendFailed as error:
                answer = messages.Failed(text=str(error))
            except Exception as error:  # noqa: BLE001 - the driver is told, this process has no other reader
                traceback.print_exc()
                answer = messages.Failed(text=f"{type(error).__name__}: {error}")
            channel.send(messages.encode(answer), ANSWER_LIMIT_S)


def main() -> None:
    """Take the channel from the standard descriptors and serve.

    Arguments: the parent's process id, then `name=value` options of this machine.
    """
    driver = int(sys.argv[1])
    options = dict(argument.split("=", 1) for argument in sys.argv[2:])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:  # it died before the call above
        return
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the driver asks a side that hangs where it does
    channel = Channel(os.dup(0), os.dup(1))
    os.dup2(2, 1)
    with open(os.devnull) as nothing:  # noqa: PTH123 - a device, no path of ours
        os.dup2(nothing.fileno(), 0)
    serve(channel, options)


if __name__ == "__main__":
    main()
