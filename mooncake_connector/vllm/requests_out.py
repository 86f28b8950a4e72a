"""Prefill's scheduler half: which requests are offered, which of their blocks are final. Pure."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from mooncake_connector.vllm.step import Ended, Endpoint, Final, Held, Opened, Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm.v1.core.sched.output import SchedulerOutput

log = logging.getLogger(__name__)


class _Offer:
    """A request that a decode server will read from."""

    def __init__(self, transfer_id: str, key: str, tokens: int, groups: int) -> None:
        self.transfer_id = transfer_id
        self.key = key
        self.tokens = tokens  # length of the prompt
        self.blocks: list[list[int]] = [[] for _ in range(groups)]
        self.told = 0  # pages told to the workers, of whole-history groups
        self.last = False  # the whole prompt was told


class PrefillRequests:
    """Requests with `do_remote_decode`."""

    def __init__(
        self, engine_id: str, page_size: int, windows: Sequence[int], groups: Sequence[int]
    ) -> None:
        """`windows[g]` tokens are kept by group g, 0: all; `groups` index vLLM's block tables."""
        self.endpoints: list[Endpoint] = []
        self._engine_id = engine_id
        self._page_size = page_size
        self._windows = windows
        self._groups = groups
        self._offers: dict[str, _Offer] = {}  # request id -> offer
        # request id -> (transfer id, prompt key) of the sibling that is offered
        self._riders: dict[str, tuple[str, str]] = {}
        # request id -> (transfer id, prompt key), finished and not yet sent
        self._held: dict[str, tuple[str, str]] = {}

    @property
    def busy(self) -> bool:
        """Is there any request whose blocks must be followed?"""
        return bool(self._offers)

    def add(
        self, request_id: str, params: dict[str, Any], tokens: int, key: str, step: Step
    ) -> None:
        """A request that will be read by decode."""
        index, family = family_of(request_id)
        if index and "transfer_id" not in params:
            return  # vLLM answers with the first prompt's params: nobody would come for this one
        transfer_id = str(params.get("transfer_id") or family)
        live = {offer.transfer_id: offer.key for offer in self._offers.values()}
        live.update(self._held.values())
        if transfer_id in live:
            if live[transfer_id] == key:  # `n` > 1: one of them is held for all
                self._riders[request_id] = (transfer_id, key)
            else:
                log.warning(
                    "request %s is not offered: transfer_id %s belongs to another live prompt",
                    request_id,
                    transfer_id,
                )
            return
        self._offers[request_id] = _Offer(transfer_id, key, tokens, len(self._groups))
        step.opened.append(Opened(transfer_id, request_id, key))

    def scheduled(self, output: SchedulerOutput, step: Step) -> None:
        """Follow blocks and find out which become final in this step."""
        for request_id in output.preempted_req_ids or ():
            offer = self._offers.get(request_id)
            if offer is not None:
                step.ended.append(Ended(offer.transfer_id, "prefill preempted it", retry=True))
                step.opened.append(Opened(offer.transfer_id, request_id, offer.key))
                self._offers[request_id] = _Offer(
                    offer.transfer_id, offer.key, offer.tokens, len(self._groups)
                )
        for new in output.scheduled_new_reqs:
            offer = self._offers.get(new.req_id)
            if offer is not None:
                offer.blocks = [list(new.block_ids[group]) for group in self._groups]
                self._advance(offer, new.req_id, new.num_computed_tokens, output, step)
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            offer = self._offers.get(request_id)
            if offer is None:
                continue
            blocks = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                offer.blocks = [[] for _ in self._groups]
            if blocks is not None:
                for known, group in zip(offer.blocks, self._groups, strict=True):
                    known.extend(blocks[group])
            computed = cached.num_computed_tokens[index]
            self._advance(offer, request_id, computed, output, step)

    def _advance(
        self, offer: _Offer, request_id: str, computed: int, output: SchedulerOutput, step: Step
    ) -> None:
        if offer.last:
            return
        computed += output.num_scheduled_tokens[request_id]
        offer.last = computed >= offer.tokens
        pages = -(-offer.tokens // self._page_size) if offer.last else computed // self._page_size
        if pages == offer.told and not offer.last:
            return
        first, ids = [], []
        for blocks, window in zip(offer.blocks, self._windows, strict=True):
            start = offer.told
            if window:  # its blocks are given up mid-prefill: what is left goes with the last
                start = (
                    max(0, pages - window_pages(window, self._page_size)) if offer.last else pages
                )
            first.append(start)
            ids.append(blocks[start:pages])
        offer.told = pages
        step.final.append(Final(offer.transfer_id, tuple(first), tuple(ids), offer.last))

    def finished(
        self, request_id: str, status: str, *, complete: bool, step: Step
    ) -> tuple[bool, dict[str, Any] | None]:
        """Hold the blocks of a request that computed its whole prompt, end any other."""
        rides_with = self._riders.pop(request_id, None)
        if rides_with is not None:
            return False, self._params(*rides_with)
        offer = self._offers.pop(request_id, None)
        if offer is None:
            return False, None
        if not (complete and offer.last):
            reason = f"the prefill request ended as {status}"
            step.ended.append(Ended(offer.transfer_id, reason, retry=False))
            return False, None
        step.held.append(Held(offer.transfer_id, request_id))
        self._held[request_id] = (offer.transfer_id, offer.key)
        return True, self._params(offer.transfer_id, offer.key)

    def _params(self, transfer_id: str, key: str) -> dict[str, Any]:
        """What decode needs; the router hands it on unread."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer_id,
            "remote_engine_id": self._engine_id,
            "remote_endpoints": [endpoint.address for endpoint in self.endpoints],
            "remote_incarnations": [endpoint.incarnation for endpoint in self.endpoints],
            "remote_prompt_key": key,
            "tp_size": len(self.endpoints),
        }

    def sent(self, request_ids: Iterable[str]) -> None:
        """All ranks reported: vLLM frees the blocks."""
        for request_id in request_ids:
            self._held.pop(request_id, None)

    def reset(self, step: Step) -> None:
        """End everything; held requests are then reported as sent."""
        reason = "the server's cache was reset"
        for offer in self._offers.values():
            step.ended.append(Ended(offer.transfer_id, reason, retry=False))
        self._offers.clear()
        for transfer_id, _ in self._held.values():
            step.ended.append(Ended(transfer_id, reason, retry=False))


def window_pages(window: int, page_size: int) -> int:
    """Pages that a sliding window of `window` tokens may touch, wherever it begins in a page."""
    return -(-window // page_size) + 1


_CHILD = re.compile(r"\d+_(.+)")
_PROMPT = re.compile(r"cmpl-.*-(\d+)-[0-9a-f]{8}")


def family_of(request_id: str) -> tuple[int, str]:
    """(which prompt of its completion call, what the `n` children of that prompt share).

    By the names that vLLM gives: `cmpl-<id>-<prompt>-<8 hex>`, and `<child>_` before it for n > 1.
    A name of another form is a family of its own, which costs nothing but pages held until the
    request's total is over.
    """
    child = _CHILD.fullmatch(request_id)
    family = child[1] if child else request_id
    prompt = _PROMPT.fullmatch(family)
    return (int(prompt[1]) if prompt else 0), family
