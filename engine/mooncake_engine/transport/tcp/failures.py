"""The one table of this transport: from what a system call says to how a batch ends."""

from __future__ import annotations

import errno

from mooncake_engine.errors import LaneError
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.stream import DeadlinePassed
from mooncake_engine.types import Status

# Every other errno is FAILED: something is wrong here, not there.
_GONE = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.EPIPE,
        errno.ETIMEDOUT,
    }
)
_GONE_HINT = (
    "it died, restarted, ended the grant or unregistered the memory; look its segment up again "
    "and retry"
)


def explain(failure: Exception) -> tuple[Status, str]:
    """Status, and what happened with a remedy, of what a stream, the wire or a dialer raised."""
    match failure:
        case LaneError():  # explained already where it was raised
            return failure.status, str(failure)
        case DeadlinePassed():
            return Status.TIMED_OUT, (
                "the deadline passed before all bytes moved; the peer is stopped or overloaded, "
                "or transfer_timeout_s is too short"
            )
        case EOFError():
            return Status.PEER_GONE, f"the peer closed the connection; {_GONE_HINT}"
        case wire.Malformed():
            return Status.FAILED, f"the peer broke the protocol: {failure}; compare both versions"
        case OSError() if failure.errno in _GONE:
            return Status.PEER_GONE, f"{failure}; {_GONE_HINT}"
        case OSError() if failure.errno == errno.EFAULT:
            return Status.FAILED, (
                "the local memory is not mapped; keep it allocated until the batch has completed"
            )
        case _:
            return Status.FAILED, f"{failure}; see this machine's kernel log and limits"
