"""Decode's scheduler half: which requests come from prefill and who of a family reads. Pure."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mooncake_connector.vllm.requests_out import window_pages
from mooncake_connector.vllm.step import Fetch, Remote, Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock

log = logging.getLogger(__name__)


class _Want:
    """A request whose prompt KV is at prefill."""

    def __init__(self, remote: Remote, key: str) -> None:
        self.remote = remote
        self.key = key
        self.asked = False  # fetched or declined: vLLM must not be promised its tokens again
        self.loading = False  # parked; the workers will report it
        self.foreign = False  # the transfer holds another prompt's KV


class DecodeRequests:
    """Requests with `do_remote_prefill`.

    Requests with one transfer_id and one prompt are a family (`n` > 1): the first reads, the
    others wait until its blocks are in the prefix cache, and the hold is released once.
    """

    def __init__(
        self, page_size: int, windows: Sequence[int], groups: Sequence[int], *, testing: bool
    ) -> None:
        """`windows[g]` tokens are kept by group g, 0: all; `groups` index vLLM's block tables."""
        self._page_size = page_size
        self._windows = windows
        self._groups = groups
        self._testing = testing
        self._wants: dict[str, _Want] = {}  # by request id
        self._readers: dict[str, str] = {}  # transfer id -> request that reads it

    def knows(self, request_id: str) -> bool:
        """Does this request come from prefill?"""
        return request_id in self._wants

    def add(self, request_id: str, params: dict[str, Any], key: str, step: Step) -> None:
        """A request whose prompt was (or is being) prefilled elsewhere."""
        remote = self._remote(request_id, params)
        if remote is None:
            return
        want = self._wants[request_id] = _Want(remote, key)
        if params.get("remote_prompt_key", key) != key:
            # One completion call with several prompts carries one prompt's KV.
            log.warning(
                "request %s is computed here: transfer %s holds the KV of another prompt",
                request_id,
                remote.transfer_id,
            )
            want.asked = want.foreign = True
            return
        if remote.transfer_id not in self._readers:
            self._readers[remote.transfer_id] = request_id
            step.claims.append(remote)

    def matched_tokens(
        self, request_id: str, prompt_tokens: int, computed: int
    ) -> tuple[int | None, bool]:
        """Tokens that prefill has beyond `computed`; None: ask again, a sibling is reading.

        The last prompt token is computed here in any case, so its KV is not asked for.
        """
        want = self._wants.get(request_id)
        if want is None or want.asked:
            return 0, False
        reader = self._readers.get(want.remote.transfer_id)
        if reader != request_id:
            sibling = self._wants.get(reader or "")
            if sibling is not None and sibling.key == want.key:
                return None, False
            want.asked = True  # the sibling is through: its blocks are in the prefix cache
            return 0, False
        count = prompt_tokens - 1 - computed
        return (count, True) if count > 0 else (0, False)

    def allocated(
        self,
        request_id: str,
        prompt_tokens: int,
        blocks: Sequence[Sequence[KVCacheBlock]],
        external: int,
        step: Step,
    ) -> None:
        """Blocks are there; called a second time when they are loaded."""
        want = self._wants[request_id]
        if not external:
            if self._reads(request_id, want):
                if not want.asked:  # all of it was in the prefix cache
                    step.declined.append((request_id, want.remote))
                del self._readers[want.remote.transfer_id]
            want.asked = True
            return
        want.asked = want.loading = True
        first_page = (prompt_tokens - 1 - external) // self._page_size
        end = -(-(prompt_tokens - 1) // self._page_size)
        first, ids = [], []
        for group, window in zip(blocks, self._windows, strict=True):
            start = first_page
            if window:  # counted from the end of the prompt, as prefill does
                pages = -(-prompt_tokens // self._page_size)
                start = max(start, pages - window_pages(window, self._page_size))
            first.append(start)
            ids.append([block.block_id for block in group[start:end]])
        step.fetches.append(
            Fetch(
                request_id,
                want.remote,
                tuple(first),
                tuple(ids),
                prompt_tokens,
                want.key,
            )
        )

    def received(self, request_ids: Iterable[str]) -> None:
        """The workers reported these; the reader's blocks are cached at its next allocation."""
        for request_id in request_ids:
            want = self._wants.get(request_id)
            if want is not None:
                want.loading = False

    def finished(self, request_id: str, step: Step) -> None:
        """The request ended, was aborted, or was rejected before it was admitted."""
        want = self._wants.pop(request_id, None)
        if want is None:
            return
        if want.loading:
            step.cancelled.append(request_id)
        if self._reads(request_id, want):
            del self._readers[want.remote.transfer_id]
            if not want.asked:
                self._pass_on(request_id, want, step)
        elif want.foreign and want.remote.transfer_id not in self._readers:
            # Nobody of its family came for the pages; vLLM's notice of a rejected request, which
            # has a prompt of one zero, ends here too. Harmless when they were released already.
            step.declined.append((request_id, want.remote))

    def _reads(self, request_id: str, want: _Want) -> bool:
        return self._readers.get(want.remote.transfer_id) == request_id

    def _pass_on(self, request_id: str, want: _Want, step: Step) -> None:
        """Let a sibling read instead; without one, tell prefill that nobody will come."""
        for other_id, other in self._wants.items():
            same = other.remote.transfer_id == want.remote.transfer_id and other.key == want.key
            if same and not other.asked:
                self._readers[want.remote.transfer_id] = other_id
                return
        step.declined.append((request_id, want.remote))

    def _remote(self, request_id: str, params: dict[str, Any]) -> Remote | None:
        """Where the KV is; None and one warning when the parameters do not say."""
        transfer_id = params.get("transfer_id")
        addresses = params.get("remote_endpoints") or ()
        bootstrap = params.get("remote_bootstrap_addr") or ""
        wrong = ""
        if not isinstance(transfer_id, str) or not transfer_id:
            wrong = f"transfer_id is {transfer_id!r}, not a string"
        elif not isinstance(addresses, list | tuple) or not all(
            isinstance(address, str) for address in addresses
        ):
            wrong = f"remote_endpoints is {addresses!r}, not a list of host:port"
        elif not isinstance(bootstrap, str) or not (addresses or bootstrap):
            wrong = "neither remote_endpoints nor remote_bootstrap_addr says where prefill is"
        if wrong or not isinstance(transfer_id, str):
            log.warning(
                "request %s is computed here, its kv_transfer_params cannot be used: %s",
                request_id,
                wrong,
            )
            return None
        incarnations = params.get("remote_incarnations") or ("",) * len(addresses)
        remote = Remote(
            transfer_id,
            tuple(addresses),
            tuple(str(incarnation) for incarnation in incarnations),
            bootstrap,
            str(params.get("remote_engine_id") or ""),
        )
        if not self._testing:
            return remote
        return remote._replace(
            protocol=str(params.get("test_protocol") or ""),
            delay_s=float(params.get("test_delay_s") or 0),
        )
