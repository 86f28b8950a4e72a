"""Prefill's side of a node: transfers that are offered, held, released and ended.

The framework's thread opens, feeds, holds and ends transfers; the node's loop brings what decode
nodes say. One lock covers both, because ending a grant and judging a release must not interleave.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from mooncake_connector import wire
from mooncake_connector.errors import WireError
from mooncake_connector.holds import Hold, Reader
from mooncake_connector.parking import Parking
from mooncake_connector.session import HOLD_TABLE, HoldAction, HoldEvent, HoldState, step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mooncake_engine import TransferEngine

    from mooncake_connector.config import ConnectorConfig
    from mooncake_connector.control import Channel
    from mooncake_connector.parking import Early
    from mooncake_connector.plan import PageRun
    from mooncake_connector.stats import Stats

log = logging.getLogger(__name__)


class PrefillSide:
    """All transfers that this rank offers. Methods say which thread may call them."""

    def __init__(
        self,
        config: ConnectorConfig,
        engine: TransferEngine,
        stats: Stats,
        send: Callable[[Channel, wire.Message], None],
        now: Callable[[], float],
        groups: int,
    ) -> None:
        """`send` queues a message from any thread, in call order; `groups` of the cache."""
        self._config = config
        self._groups = groups
        self._engine = engine
        self._stats = stats
        self._send = send
        self._now = now
        self._lock = threading.Lock()  # guards everything below
        self._live: dict[str, Hold] = {}
        # Ended attempts answer repeats until their deadline; newest attempt per transfer.
        self._tombstones: dict[tuple[str, int], Hold] = {}
        self._attempts: dict[str, int] = {}
        self._parking = Parking()
        self._sent: set[str] = set()

    # ---- the framework's thread

    def open(
        self,
        transfer_id: str,
        request_id: str,
        prompt_key: str,
        *,
        reusable: bool = False,
        on_change: Callable[[Hold], None] | None = None,
    ) -> Hold | None:
        """A request whose KV will be offered was admitted, or starts over after a preemption.

        Args:
            transfer_id: What decode asks for.
            request_id: What `take_sent` names when it is over; "" when nobody asks that.
            prompt_key: See `prompt_key.py`.
            reusable: Other requests may use the id when this one is over.
            on_change: Called whenever a reader came or left and when the state changed, by
                whichever thread did it and under this side's lock: it must only take note.

        Returns:
            Its state, to be looked at; None when the id is in use.
        """
        with self._lock:
            if transfer_id in self._live:
                log.warning("transfer %s is already open and not offered twice", transfer_id)
                return None
            attempt = self._attempts.get(transfer_id, 0) + 1
            self._attempts[transfer_id] = attempt
            hold = Hold(
                transfer_id,
                attempt,
                request_id,
                prompt_key,
                self._now() + self._config.request_timeout_s,
                reusable=reusable,
                on_change=on_change,
            )
            self._live[transfer_id] = hold
            self._engine.grant(hold.grant)
            before = self._tombstones.get((transfer_id, attempt - 1))
            if before is not None and before.retry and not hold.follow(before):
                self._conclude_if_all_left(hold, "all its readers left the attempt before")
            waited = self._parking.take(transfer_id)
            for parked in waited:
                if parked.channel is not None:
                    self._dispatch(parked.channel, parked.message)
            if any(parked.channel is None for parked in waited):
                self._conclude_if_all_left(hold, "the decode node that claimed it is gone")
            return hold

    # Where ids are used again, `of` names the use that is meant: another one is left alone.

    def live(self, transfer_id: str) -> Hold | None:
        """The hold of a transfer that was opened and has not ended; for `of` of a later call."""
        with self._lock:
            return self._live.get(transfer_id)

    def pages_ready(
        self,
        transfer_id: str,
        pages: Sequence[PageRun],
        *,
        last: bool,
        of: Hold | None = None,
    ) -> None:
        """These pages (one run per group, in order) are final; call behind the device's event."""
        with self._lock:
            hold = self._live.get(transfer_id)
            if hold is None or hold.last or hold is not (of or hold):
                return
            hold.add_pages(pages, last=last)
            hold.last_at = self._now()
            self._apply(hold, HoldEvent.PAGES)

    def hold(self, transfer_id: str, request_id: str, *, of: Hold | None = None) -> None:
        """The request finished and its blocks wait for us; `take_sent` will name it once."""
        with self._lock:
            hold = self._live.get(transfer_id)
            if hold is None or hold.request_id != request_id or hold is not (of or hold):
                # Ended before (or never offered): nobody will come, free at once.
                if request_id:
                    self._sent.add(request_id)
                return
            hold.unclaimed_until = self._now() + self._config.unclaimed_hold_s
            self._apply(hold, HoldEvent.HOLD)

    def end(self, transfer_id: str, reason: str, *, retry: bool, of: Hold | None = None) -> None:
        """The framework reuses the blocks. On return no verdict can be `held` any more.

        `retry`: the same request will be opened again (it was preempted). Blocks for the time
        that a server of bytes needs to notice, about a millisecond.
        """
        with self._lock:
            hold = self._live.get(transfer_id)
            if hold is not None and hold is (of or hold):
                hold.reason = reason
                hold.retry = retry
                self._apply(hold, HoldEvent.REUSE)

    def end_all(self, reason: str) -> None:
        """The whole cache goes away."""
        with self._lock:
            for hold in list(self._live.values()):
                hold.reason = reason
                self._apply(hold, HoldEvent.REUSE)

    def take_sent(self) -> set[str]:
        """Requests whose blocks may be freed, each named once."""
        if not self._sent:  # an idle engine asks several hundred times a second
            return set()
        with self._lock:
            sent, self._sent = self._sent, set()
            return sent

    def held_pages(self) -> int:
        """Pages that wait for readers now."""
        with self._lock:
            return sum(
                sum(len(run.ids) for run in hold.pages)
                for hold in self._live.values()
                if hold.state is HoldState.HELD
            )

    # ---- the node's loop

    def on_message(self, channel: Channel, message: wire.AnyMessage) -> None:
        """A decode node said something."""
        match message:
            case wire.Claim() | wire.Subscribe() | wire.Release():
                if isinstance(message, wire.Subscribe):
                    self._check(message)
                with self._lock:
                    self._dispatch(channel, message)
            case wire.Ping():
                pass
            case _:
                raise WireError(f"an unexpected {type(message).__name__}")

    def _check(self, message: wire.Subscribe) -> None:
        """Before it is parked: `open` must not fail for what a peer said long ago."""
        if len(message.first) != self._groups or any(first < 0 for first in message.first):
            raise WireError(
                f"positions {message.first} to begin at, for a cache of {self._groups} groups"
            )

    def on_closed(self, channel: Channel) -> None:
        """A decode node is gone: nothing is kept for it."""
        with self._lock:
            for hold in list(self._live.values()):
                involved = channel in hold.claims
                hold.claims.discard(channel)
                for reader in hold.readers.values():
                    if reader.channel is channel and reader.held is None:
                        reader.held = False
                        reader.gave_up = True
                        involved = True
                if involved and hold.state is not HoldState.LEFT:  # else it was given up before
                    self._stats.failure("reader_gone")
                    self._conclude_if_all_left(hold, f"decode node {channel.peer} is gone")
                    self._changed(hold)
            self._parking.lost(channel)

    def sweep(self) -> None:
        """End what is over; called several times a second."""
        now = self._now()
        with self._lock:
            late = [hold for hold in self._live.values() if hold.over(now)]
            for hold in [hold for hold in late if hold.state is not HoldState.LEFT]:
                if hold.deadline <= now:
                    kind, limit = "hold_timeout", self._config.request_timeout_s
                    hold.reason = f"nobody released it within {limit:g} s (request_timeout_s)"
                else:
                    kind, limit = "unclaimed", self._config.unclaimed_hold_s
                    hold.reason = f"no decode server asked for it within {limit:g} s"
                self._stats.failure(kind)
                log.warning("transfer %s: %s", hold.transfer_id, hold.reason)
                self._apply(hold, HoldEvent.TIMEOUT)
            for key in [k for k, h in self._tombstones.items() if h.deadline <= now]:
                del self._tombstones[key]
                if self._attempts.get(key[0]) == key[1] and key[0] not in self._live:
                    del self._attempts[key[0]]
            for late_comer in self._parking.expired(now):
                channel, message, _ = late_comer
                if channel is not None and isinstance(message, wire.Subscribe):
                    self._gone(channel, message, 0, self._unknown(message.transfer_id))

    # ---- under the lock

    def _dispatch(self, channel: Channel, message: Early) -> None:
        hold = self._live.get(message.transfer_id)
        if isinstance(message, wire.Release):
            self._release(channel, hold, message)
        elif hold is not None:
            if isinstance(message, wire.Claim):
                hold.claims.add(channel)
            else:
                self._subscribe(channel, hold, message)
        else:
            attempt = self._attempts.get(message.transfer_id, 0)
            ended = self._tombstones.get((message.transfer_id, attempt))
            if ended is None or ended.retry or _begins_anew(ended, message):
                self._park(channel, message)
            elif isinstance(message, wire.Subscribe):
                self._gone(channel, message, attempt, ended.reason)

    def _park(self, channel: Channel, message: Early) -> None:
        expires = self._now() + self._config.unknown_transfer_grace_s
        self._parking.add(channel, message, expires)

    def _subscribe(self, channel: Channel, hold: Hold, message: wire.Subscribe) -> None:
        hold.claims.discard(channel)  # it has come; what it gets decides whether it stays
        if message.prompt_key != hold.prompt_key:
            self._stats.failure("prompt_differs")
            self._gone(
                channel,
                message,
                hold.attempt,
                f"its prompt key is {hold.prompt_key}, decode's is {message.prompt_key}: the two "
                "servers saw different prompts (another template, LoRA, image or cache salt?)",
            )
            return
        if hold.state is HoldState.LEFT:
            self._gone(channel, message, hold.attempt, hold.reason)
            return
        hold.expected = max(hold.expected, message.readers)
        reader = hold.readers.get(message.reader)
        if reader is not None and reader.held is not None:
            reason = f"{message.reader} released it and cannot read it any more"
            self._gone(channel, message, hold.attempt, reason)
            return
        # A repeat starts from the first page again.
        reader = hold.readers[message.reader] = Reader(channel, message.reader, message.first)
        self._tell(hold, reader)
        self._changed(hold)

    def _release(self, channel: Channel, hold: Hold | None, message: wire.Release) -> None:
        if hold is None or message.attempt not in (0, hold.attempt):  # 0: it was told of none
            attempt = message.attempt or self._attempts.get(message.transfer_id, 0)
            ended = self._tombstones.get((message.transfer_id, attempt))
            later = ended is None or ended.retry or _begins_anew(ended, message)
            if message.attempt == 0 and later:
                # The framework will open it, for the first time or anew.
                self._park(channel, message)
                return
            if ended is None or message.ok or not ended.retry:
                reader = ended.readers.get(message.reader) if ended is not None else None
                self._verdict(channel, message, held=bool(reader and reader.held))
                return
            hold = hold or ended  # it gave up a preempted attempt: nor will it come for the next
        reader = hold.readers.get(message.reader)
        if reader is None:
            reader = hold.readers[message.reader] = Reader(channel, message.reader)
        if reader.held is None:
            reader.gave_up = not message.ok
            # `end` takes the same lock before any page is reused: alive now means alive so far.
            reader.held = hold.state in (HoldState.COMPUTING, HoldState.HELD)
        hold.claims.discard(channel)
        self._verdict(channel, message, held=reader.held)
        self._conclude_if_all_left(
            hold, "decode gave it up" if hold.given_up else "all its readers released it"
        )
        self._changed(hold)

    def _conclude_if_all_left(self, hold: Hold, reason: str) -> None:
        if hold.all_left():
            hold.reason = reason
            hold.left = True
            if hold.last and hold.delivered:
                self._stats.delivered(self._now() - hold.last_at)
            self._apply(hold, HoldEvent.RELEASED)

    def _verdict(self, channel: Channel, message: wire.Release, *, held: bool) -> None:
        self._send(
            channel,
            wire.Released(
                transfer_id=message.transfer_id,
                attempt=message.attempt,
                reader=message.reader,
                held=held,
            ),
        )

    def _gone(self, channel: Channel, to: wire.Subscribe, attempt: int, reason: str) -> None:
        """Answer a Subscribe that cannot be served."""
        self._send(
            channel,
            wire.Gone(
                transfer_id=to.transfer_id,
                attempt=attempt,
                reader=to.reader,
                reason=reason,
                retry=False,
            ),
        )

    def _changed(self, hold: Hold) -> None:
        if hold.on_change is not None:
            hold.on_change(hold)

    def _unknown(self, transfer_id: str) -> str:
        return (
            f"prefill was not told of transfer {transfer_id} within "
            f"{self._config.unknown_transfer_grace_s:g} s (unknown_transfer_grace_s)"
        )

    def _apply(self, hold: Hold, event: HoldEvent) -> None:
        hold.state, actions = step(HOLD_TABLE, hold.state, event)
        for action in actions:
            match action:
                case HoldAction.SEND_READY:
                    for reader in hold.readers.values():
                        self._tell(hold, reader)
                case HoldAction.END_GRANT:
                    self._engine.revoke(hold.grant)
                case HoldAction.SEND_GONE:
                    for reader in hold.readers.values():
                        if reader.held is None:
                            self._send(reader.channel, hold.gone_for(reader))
                case HoldAction.REPORT_SENT:
                    if hold.request_id:
                        self._sent.add(hold.request_id)
        if hold.state is HoldState.ENDED and self._live.get(hold.transfer_id) is hold:
            del self._live[hold.transfer_id]
            hold.deadline = self._now() + self._config.request_timeout_s
            self._tombstones[hold.transfer_id, hold.attempt] = hold
        self._changed(hold)
        if hold.state is HoldState.ENDED:
            hold.on_change = None  # a tombstone says no more, and keeps nobody's objects

    def _tell(self, hold: Hold, reader: Reader) -> None:
        """Send what this reader does not know yet."""
        ready = hold.news_for(reader)
        if ready is not None:
            self._send(reader.channel, ready)


def _begins_anew(ended: Hold, message: Early) -> bool:
    """Is this about a later request that uses the id again, and not one that comes too late?"""
    if not ended.reusable or isinstance(message, wire.Claim):
        return ended.reusable
    # Nobody ever came for the last one: then this is who should have.
    return bool(ended.readers) and message.reader not in ended.readers
