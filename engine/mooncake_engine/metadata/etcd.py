"""A small etcd client: several endpoints, users, TLS, a deadline on every call.

It drives pyetcd's generated stubs. pyetcd's own client is left aside for what its 0.0.7 source
does: an endpoint that failed once is shut out for 300 s, an auth token is never renewed (etcd
forgets one after 300 s, and all of them when it restarts), and the thread of a watch cannot be
joined. `docs/decisions/pyetcd-for-etcd3.md` says why pyetcd and not etcd3.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc
from pyetcd import etcdrpc

from mooncake_engine.errors import ConfigError, MetadataError
from mooncake_engine.metadata.etcd_stream import EtcdStream
from mooncake_engine.metadata.etcd_types import Entry, EtcdAway, LeaseLost, RevisionGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.config import MetadataConfig

    T = TypeVar("T")

_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # a proxy for the internet must not see cluster traffic
    ("grpc.use_local_subchannel_pool", 1),  # else stores share one back-off
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),  # also the time one connect attempt gets
    ("grpc.max_reconnect_backoff_ms", 1000),  # gRPC's 120 s would hide a restarted server
    ("grpc.keepalive_time_ms", 10_000),  # etcd hangs up on clients that ping every < 5 s
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.max_receive_message_length", 64 << 20),  # a listing of a big cluster
]
_AWAY = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,  # the channel was closed under the call
}
_STALE_TOKEN = ("invalid auth token", "revision of auth store is old")


class _Member:
    """One endpoint: a channel, its stubs and the token it gave us."""

    def __init__(
        self, address: str, config: MetadataConfig, credentials: grpc.ChannelCredentials | None
    ) -> None:
        self.address = address
        self._config = config
        self._channel = (
            grpc.secure_channel(address, credentials, options=_OPTIONS)
            if credentials
            else grpc.insecure_channel(address, options=_OPTIONS)
        )
        self.kv = etcdrpc.KVStub(self._channel)
        self.lease = etcdrpc.LeaseStub(self._channel)
        self.watch = etcdrpc.WatchStub(self._channel)
        self._auth = etcdrpc.AuthStub(self._channel)
        self._token: str | None = None if config.username else ""

    def metadata(self, **options: object) -> tuple[tuple[str, str], ...]:
        """What goes with each call; logs in first if that is still to be done."""
        if self._token is None:
            login = etcdrpc.AuthenticateRequest(
                name=self._config.username, password=self._config.password
            )
            self._token = self._auth.Authenticate(login, **options).token
        return (("token", self._token),) if self._token else ()

    def call(self, work: Callable[..., T], timeout: float, *, wait_for_ready: bool) -> T:
        """`work(member, timeout=..., ...)`, once more with a new token if etcd forgot ours."""
        deadline = time.monotonic() + timeout
        for last in (False, True):
            options = {
                "timeout": max(0.001, deadline - time.monotonic()),
                "wait_for_ready": wait_for_ready,
            }
            try:
                return work(self, metadata=self.metadata(**options), **options)
            except grpc.RpcError as exc:
                if last or not any(text in exc.details() for text in _STALE_TOKEN):
                    raise
                self._token = None
        raise AssertionError("the second round returns or raises")

    def close(self) -> None:
        self._channel.close()


class EtcdClient:
    """Calls to one etcd cluster, tried at each endpoint in turn. Safe to use from any thread."""

    def __init__(self, config: MetadataConfig) -> None:
        """Connects nothing yet. Raises `ConfigError` for endpoints or PEM files of no use."""
        if not config.endpoints:
            raise ConfigError(
                "engine.metadata.backend is etcd but engine.metadata.endpoints is empty; "
                'name at least one "host:2379"'
            )
        credentials = _credentials(config)
        self._config = config
        self._members = [_Member(_address(e), config, credentials) for e in config.endpoints]
        self._current = 0  # the member that answered last; a plain int, races only cost a retry
        self._closed = False

    def get(self, key: str) -> bytes | None:
        """The value, or None."""
        request = etcdrpc.RangeRequest(key=key.encode())
        found = self._call(lambda m, **o: m.kv.Range(request, **o), f"reading {key}")
        return found.kvs[0].value if found.kvs else None

    def range(self, prefix: str, revision: int = 0) -> tuple[int, dict[str, Entry]]:
        """The store's revision and all keys that start with `prefix`, at `revision` or now.

        Raises:
            RevisionGone: The server does not have that revision.
        """
        start = prefix.encode()
        request = etcdrpc.RangeRequest(key=start, range_end=_end_of(start), revision=revision)
        found = self._call(lambda m, **o: m.kv.Range(request, **o), f"listing {prefix}")
        entries = {kv.key.decode(): Entry(kv.value, kv.mod_revision) for kv in found.kvs}
        return found.header.revision, entries

    def put(self, key: str, value: bytes, lease: int) -> None:
        """Write; raises `LeaseLost` when there is no such lease."""
        request = etcdrpc.PutRequest(key=key.encode(), value=value, lease=lease)
        self._call(lambda m, **o: m.kv.Put(request, **o), f"writing {key}")

    def delete(self, key: str, lease: int) -> None:
        """Delete the key if it hangs on `lease`: a successor may have written it since."""
        ours = etcdrpc.Compare(
            key=key.encode(),
            target=etcdrpc.Compare.LEASE,
            result=etcdrpc.Compare.EQUAL,
            lease=lease,
        )
        delete = etcdrpc.RequestOp(
            request_delete_range=etcdrpc.DeleteRangeRequest(key=key.encode())
        )
        request = etcdrpc.TxnRequest(compare=[ours], success=[delete])
        self._call(lambda m, **o: m.kv.Txn(request, **o), f"deleting {key}")

    def grant(self, ttl_s: int) -> int:
        """A new lease."""
        request = etcdrpc.LeaseGrantRequest(TTL=ttl_s)
        lease: int = self._call(
            lambda m, **o: m.lease.LeaseGrant(request, **o), "asking for a lease"
        ).ID
        return lease

    def keep_alive(self, lease: int) -> bool:
        """Renew; False when the server does not know the lease."""
        request = etcdrpc.LeaseKeepAliveRequest(ID=lease)
        reply = self._call(
            lambda m, **o: next(m.lease.LeaseKeepAlive(iter((request,)), **o)), "renewing a lease"
        )
        return bool(reply.TTL > 0)

    def revoke(self, lease: int, timeout: float) -> None:
        """Delete the lease and all its keys."""
        request = etcdrpc.LeaseRevokeRequest(ID=lease)
        self._call(lambda m, **o: m.lease.LeaseRevoke(request, **o), "giving a lease back", timeout)

    def watch(self, prefix: str, revision: int, timeout: float | None) -> EtcdStream:
        """Changes from `revision` on, at the member that answered last; does not block."""
        start = prefix.encode()
        create = etcdrpc.WatchCreateRequest(
            key=start, range_end=_end_of(start), start_revision=revision
        )
        member = self._members[self._current]
        request = etcdrpc.WatchRequest(create_request=create)
        try:
            # hasleader: a member cut off from its cluster ends the stream, else it goes silent.
            metadata = (*member.metadata(timeout=1), ("hasleader", "true"))
            return EtcdStream(
                lambda requests: member.watch.Watch(requests, timeout=timeout, metadata=metadata),
                request,
                revision,
                member.address,
            )
        except grpc.RpcError as exc:
            raise EtcdAway(f"etcd at {member.address}: {exc.details()}") from exc
        except ValueError as exc:  # how gRPC says that close() came first
            raise MetadataError(f"the metadata store was closed while watching {prefix}") from exc

    def close(self) -> None:
        """End all calls and streams; idempotent."""
        self._closed = True
        for member in self._members:
            member.close()

    def _call(self, work: Callable[..., T], doing: str, timeout: float | None = None) -> T:
        timeout = self._config.timeout_s if timeout is None else timeout
        deadline = time.monotonic() + timeout
        reasons: dict[str, str] = {}
        count = len(self._members)
        first = self._current
        # Round one fails fast where nobody listens; round two waits for a server that restarts.
        for step in range(2 * count):
            index = (first + step) % count
            member = self._members[index]
            # The share keeps an endpoint that swallows packets from using up the others' time.
            share = (deadline - time.monotonic()) / (count - step % count)
            if share <= 0 or self._closed:
                break
            try:
                result = member.call(work, share, wait_for_ready=step >= count)
            except grpc.RpcError as exc:
                if exc.code() not in _AWAY:
                    raise self._refusal(member.address, doing, exc) from exc
                reasons.setdefault(member.address, exc.details())
            except ValueError as exc:  # how gRPC says that close() came first
                raise MetadataError(f"the metadata store was closed while {doing}") from exc
            else:
                self._current = index
                return result
        if self._closed:
            raise MetadataError(f"the metadata store was closed while {doing}")
        raise EtcdAway(
            f"no etcd answered within {timeout:g} s while {doing} ("
            + "; ".join(f"{address}: {reason}" for address, reason in reasons.items())
            + "); check that it runs and that engine.metadata.endpoints and ca_cert are right"
        )

    def _refusal(self, address: str, doing: str, exc: grpc.RpcError) -> MetadataError:
        details, code = exc.details(), exc.code()
        if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
            return LeaseLost(f"etcd at {address}: {details}")
        if code is grpc.StatusCode.OUT_OF_RANGE:
            return RevisionGone(f"etcd at {address}: {details}")
        remedy = ""
        if "user name is empty" in details:
            remedy = "; set engine.metadata.username and engine.metadata.password"
        elif "authentication failed" in details:
            remedy = f"; check the password of user {self._config.username!r}"
        elif "authentication is not enabled" in details:
            remedy = "; remove engine.metadata.username, or enable authentication there"
        elif code is grpc.StatusCode.PERMISSION_DENIED:
            remedy = (
                f"; grant user {self._config.username!r} a role that reads and writes "
                f"mooncake/{self._config.cluster}/"
            )
        return MetadataError(f"etcd at {address} refused {doing}: {details}{remedy}")


def _address(endpoint: str) -> str:
    """`http://h`, `h` and `h:2379` are one address; gRPC wants `h:2379`."""
    address = endpoint.split("://", 1)[-1].rstrip("/")
    if not address or "/" in address:
        raise ConfigError(f'engine.metadata.endpoints: {endpoint!r} is not of the form "host:2379"')
    if address.startswith("[") and address.endswith("]"):
        return f"{address}:2379"
    if ":" not in address:
        return f"{address}:2379"
    return address


def _end_of(prefix: bytes) -> bytes:
    """The first key behind all that start with `prefix` (ASCII, so the last byte is < 255)."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))


def _credentials(config: MetadataConfig) -> grpc.ChannelCredentials | None:
    if bool(config.client_cert) != bool(config.client_key):
        raise ConfigError("engine.metadata.client_cert and client_key go together; set both")
    if not config.ca_cert:
        if config.client_cert or any(e.startswith("https://") for e in config.endpoints):
            raise ConfigError(
                "engine.metadata.ca_cert is empty but TLS is asked for; "
                "name the PEM file of the authority that signed etcd's certificate"
            )
        return None
    return grpc.ssl_channel_credentials(
        _pem("ca_cert", config.ca_cert),
        _pem("client_key", config.client_key) if config.client_key else None,
        _pem("client_cert", config.client_cert) if config.client_cert else None,
    )


def _pem(field: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise ConfigError(
            f"engine.metadata.{field}: cannot read {path}: {exc.strerror}; name a readable PEM file"
        ) from exc
