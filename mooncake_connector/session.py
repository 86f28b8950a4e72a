"""The life of one request's KV on either side, as two tables. Pure.

Rule: everything that decides what may follow what stands in this file. A table maps
(state, event) to (next state, actions); the sides (`prefill.py`, `decode.py`) turn messages,
completions and clocks into events and carry the actions out. An event that a table does not list
for a state is late or repeated and changes nothing: `step` returns the state with no action.

What the tables promise, and `tests/property/test_session.py` checks on every path:

* from every state some event leads to the end; TIMEOUT, GIVE_UP and ABORT always do;
* prefill: pages are freed (REPORT_SENT) exactly once for a request that was held, never for one
  that was not; the grant is ended before that, exactly once;
* decode: the request is reported (REPORT_*) exactly once, and never while an own read runs.
"""

from __future__ import annotations

import enum
from typing import TypeVar


class HoldState(enum.Enum):
    """Prefill's side of one attempt."""

    COMPUTING = enum.auto()  # the prompt runs; pages become final chunk by chunk
    HELD = enum.auto()  # the request finished, its blocks wait for the readers
    LEFT = enum.auto()  # readers were done before the request finished; nothing is served
    ENDED = enum.auto()


class HoldEvent(enum.Enum):
    """What happens to a hold."""

    PAGES = enum.auto()  # a chunk is final
    HOLD = enum.auto()  # the framework handed us the finished request's blocks
    RELEASED = enum.auto()  # every reader released, or the one that claimed it died
    TIMEOUT = enum.auto()  # the total is over
    REUSE = enum.auto()  # the framework takes the blocks back: preempted, aborted, finished


class HoldAction(enum.Enum):
    """What prefill does about it, in order."""

    SEND_READY = enum.auto()
    END_GRANT = enum.auto()  # from here on verdicts are `expired`; servers of bytes stop
    SEND_GONE = enum.auto()
    REPORT_SENT = enum.auto()  # the framework may free the blocks


class FetchState(enum.Enum):
    """Decode's side of one request."""

    WAITING = enum.auto()  # subscribed; no own read runs
    READING = enum.auto()  # one batch of reads runs
    RESTARTING = enum.auto()  # the attempt is gone; its reads drain, then subscribe anew
    REFUSED = enum.auto()  # prefill served no more; its notice, on the other socket, says why
    FAILING = enum.auto()  # will be reported failed when the reads have drained
    ABORTING = enum.auto()  # will be reported received when the reads have drained
    CONFIRMING = enum.auto()  # all bytes are here; waiting for prefill's verdict
    ENDED = enum.auto()


class FetchEvent(enum.Enum):
    """What happens to a fetch."""

    PAGES = enum.auto()  # unread pages are ready
    READ_MORE = enum.auto()  # the batch completed; unread pages are already known
    READ_WAIT = enum.auto()  # the batch completed; more pages will come
    READ_ALL = enum.auto()  # the batch completed and was the last
    READ_REFUSED = enum.auto()  # prefill's engine said no: the grant ended, a notice will come
    READ_FAILED = enum.auto()  # the batch ended otherwise
    NOTHING_LEFT = enum.auto()  # last Ready, and nothing of it is unread
    GONE = enum.auto()
    GONE_RETRY = enum.auto()
    HELD = enum.auto()
    EXPIRED = enum.auto()
    PEER_LOST = enum.auto()  # connection closed, peer silent, refused, or never reached
    GIVE_UP = enum.auto()  # the total is over, or what is offered is not what is needed
    ABORT = enum.auto()  # the framework no longer wants it


class FetchAction(enum.Enum):
    """What decode does about it, in order."""

    READ = enum.auto()  # submit one batch for all unread pages
    CANCEL_READ = enum.auto()  # its completion comes as READ_*
    SUBSCRIBE_ANEW = enum.auto()  # forget every page of the old attempt first
    RELEASE = enum.auto()  # and wait for the verdict
    RELEASE_UNREAD = enum.auto()  # ok=false: prefill may free; no verdict wanted
    REPORT_RECEIVED = enum.auto()
    REPORT_FAILED = enum.auto()


_H, _HE, _HA = HoldState, HoldEvent, HoldAction
HOLD_TABLE: dict[tuple[HoldState, HoldEvent], tuple[HoldState, tuple[HoldAction, ...]]] = {
    (_H.COMPUTING, _HE.PAGES): (_H.COMPUTING, (_HA.SEND_READY,)),
    (_H.COMPUTING, _HE.HOLD): (_H.HELD, (_HA.SEND_READY,)),
    (_H.COMPUTING, _HE.RELEASED): (_H.LEFT, (_HA.END_GRANT,)),
    (_H.COMPUTING, _HE.TIMEOUT): (_H.LEFT, (_HA.END_GRANT, _HA.SEND_GONE)),
    (_H.COMPUTING, _HE.REUSE): (_H.ENDED, (_HA.END_GRANT, _HA.SEND_GONE)),
    (_H.HELD, _HE.RELEASED): (_H.ENDED, (_HA.END_GRANT, _HA.REPORT_SENT)),
    (_H.HELD, _HE.TIMEOUT): (_H.ENDED, (_HA.END_GRANT, _HA.SEND_GONE, _HA.REPORT_SENT)),
    (_H.HELD, _HE.REUSE): (_H.ENDED, (_HA.END_GRANT, _HA.SEND_GONE, _HA.REPORT_SENT)),
    # vLLM asserts that only held requests are reported, so an early release waits for the hold.
    (_H.LEFT, _HE.HOLD): (_H.ENDED, (_HA.REPORT_SENT,)),
    (_H.LEFT, _HE.REUSE): (_H.ENDED, ()),
}

_F, _FE, _FA = FetchState, FetchEvent, FetchAction
FETCH_TABLE: dict[tuple[FetchState, FetchEvent], tuple[FetchState, tuple[FetchAction, ...]]] = {
    (_F.WAITING, _FE.PAGES): (_F.READING, (_FA.READ,)),
    (_F.WAITING, _FE.NOTHING_LEFT): (_F.CONFIRMING, (_FA.RELEASE,)),
    (_F.WAITING, _FE.GONE): (_F.ENDED, (_FA.REPORT_FAILED,)),
    (_F.WAITING, _FE.GONE_RETRY): (_F.WAITING, (_FA.SUBSCRIBE_ANEW,)),
    (_F.WAITING, _FE.PEER_LOST): (_F.ENDED, (_FA.REPORT_FAILED,)),
    (_F.WAITING, _FE.GIVE_UP): (_F.ENDED, (_FA.RELEASE_UNREAD, _FA.REPORT_FAILED)),
    (_F.WAITING, _FE.ABORT): (_F.ENDED, (_FA.RELEASE_UNREAD, _FA.REPORT_RECEIVED)),
    (_F.READING, _FE.READ_MORE): (_F.READING, (_FA.READ,)),
    (_F.READING, _FE.READ_WAIT): (_F.WAITING, ()),
    (_F.READING, _FE.READ_ALL): (_F.CONFIRMING, (_FA.RELEASE,)),
    (_F.READING, _FE.READ_REFUSED): (_F.REFUSED, ()),
    (_F.READING, _FE.READ_FAILED): (_F.ENDED, (_FA.RELEASE_UNREAD, _FA.REPORT_FAILED)),
    (_F.READING, _FE.GONE): (_F.FAILING, (_FA.CANCEL_READ,)),
    (_F.READING, _FE.GONE_RETRY): (_F.RESTARTING, (_FA.CANCEL_READ,)),
    (_F.READING, _FE.PEER_LOST): (_F.FAILING, (_FA.CANCEL_READ,)),
    (_F.READING, _FE.GIVE_UP): (_F.FAILING, (_FA.CANCEL_READ,)),
    (_F.READING, _FE.ABORT): (_F.ABORTING, (_FA.CANCEL_READ,)),
    (_F.RESTARTING, _FE.GONE): (_F.FAILING, ()),
    (_F.RESTARTING, _FE.PEER_LOST): (_F.FAILING, ()),
    (_F.RESTARTING, _FE.GIVE_UP): (_F.FAILING, ()),
    (_F.RESTARTING, _FE.ABORT): (_F.ABORTING, ()),
    (_F.REFUSED, _FE.GONE): (_F.ENDED, (_FA.REPORT_FAILED,)),
    (_F.REFUSED, _FE.GONE_RETRY): (_F.WAITING, (_FA.SUBSCRIBE_ANEW,)),
    (_F.REFUSED, _FE.PEER_LOST): (_F.ENDED, (_FA.REPORT_FAILED,)),
    (_F.REFUSED, _FE.GIVE_UP): (_F.ENDED, (_FA.RELEASE_UNREAD, _FA.REPORT_FAILED)),
    (_F.REFUSED, _FE.ABORT): (_F.ENDED, (_FA.RELEASE_UNREAD, _FA.REPORT_RECEIVED)),
    (_F.FAILING, _FE.ABORT): (_F.ABORTING, ()),
    (_F.CONFIRMING, _FE.HELD): (_F.ENDED, (_FA.REPORT_RECEIVED,)),
    (_F.CONFIRMING, _FE.EXPIRED): (_F.ENDED, (_FA.REPORT_FAILED,)),
    (_F.CONFIRMING, _FE.GONE): (_F.ENDED, (_FA.REPORT_FAILED,)),
    (_F.CONFIRMING, _FE.GONE_RETRY): (_F.WAITING, (_FA.SUBSCRIBE_ANEW,)),
    (_F.CONFIRMING, _FE.PEER_LOST): (_F.ENDED, (_FA.REPORT_FAILED,)),
    # Said again, as giving up: had prefill preempted it meanwhile, it would wait for our return.
    (_F.CONFIRMING, _FE.GIVE_UP): (_F.ENDED, (_FA.RELEASE_UNREAD, _FA.REPORT_FAILED)),
    (_F.CONFIRMING, _FE.ABORT): (_F.ENDED, (_FA.RELEASE_UNREAD, _FA.REPORT_RECEIVED)),
}
for _read in (
    _FE.READ_MORE,
    _FE.READ_WAIT,
    _FE.READ_ALL,
    _FE.READ_REFUSED,
    _FE.READ_FAILED,
):
    # However the cancelled batch ended, no own read runs any more.
    FETCH_TABLE[_F.RESTARTING, _read] = (_F.WAITING, (_FA.SUBSCRIBE_ANEW,))
    FETCH_TABLE[_F.FAILING, _read] = (_F.ENDED, (_FA.RELEASE_UNREAD, _FA.REPORT_FAILED))
    FETCH_TABLE[_F.ABORTING, _read] = (_F.ENDED, (_FA.RELEASE_UNREAD, _FA.REPORT_RECEIVED))

S = TypeVar("S")
E = TypeVar("E")
A = TypeVar("A")


def step(
    table: dict[tuple[S, E], tuple[S, tuple[A, ...]]], state: S, event: E
) -> tuple[S, tuple[A, ...]]:
    """The next state and the actions; the same state and none when the event changes nothing."""
    return table.get((state, event), (state, ()))
