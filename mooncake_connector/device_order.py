"""Rule 7 of the protocol: what was computed may be read when its device has computed it.

A framework launches kernels and goes on; only an event recorded behind them says that they ran.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Executor, Future


class DeviceEvent(Protocol):
    """A recorded event, such as torch.cuda.Event."""

    def synchronize(self) -> None:
        """Block until all that was launched before it has run; raises the device's errors."""


def call_behind(
    threads: Executor,
    events: Iterable[DeviceEvent],
    call: Callable[[], None],
    otherwise: Callable[[str], None],
) -> Future[None]:
    """Call once all events have fired, on a thread; with one thread in the order of these calls.

    `otherwise` is called instead, with the reason, when an event reports an error.
    """

    def wait() -> None:
        try:
            for event in events:
                event.synchronize()
        except Exception as exc:  # noqa: BLE001 - the device's errors have no common base
            otherwise(f"the forward pass failed on the device: {exc}")
        else:
            call()

    return threads.submit(wait)
