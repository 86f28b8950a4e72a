from __future__ import annotations

import threading

from harness.transfers import LOOK_S, Transfers
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server


def test_transfers_are_what_metrics_gained_between_two_looks() -> None:
    registry = CollectorRegistry()
    engine = ["engine"]
    seconds = Histogram("mooncake_connector:transfer_seconds", "s", engine, registry=registry)
    exposed = Histogram("mooncake_connector:exposed_seconds", "e", engine, registry=registry)
    nbytes = Histogram("mooncake_connector:transfer_bytes", "b", engine, registry=registry)
    requests = Counter("mooncake_connector:requests", "r", engine, registry=registry)
    paths = Counter("mooncake_connector:path_batches", "p", ["engine", "path"], registry=registry)
    Counter("vllm:other", "not ours", registry=registry).inc(7)

    def move(engine: str, size: int, path: str) -> None:
        seconds.labels(engine).observe(0.25)
        exposed.labels(engine).observe(0.125)
        nbytes.labels(engine).observe(size)
        requests.labels(engine).inc()
        paths.labels(engine, path).inc()

    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        move("0", 1000, "tcp")
        before = Transfers.of(url)
        move("0", 4096, "shm")
        move("1", 64, "shm")
        moved = Transfers.of(url).since(before)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert before == Transfers(1, 1000, seconds=0.25, exposed=0.125, paths={"tcp": 1})
    assert moved == Transfers(2, 4160, seconds=0.5, exposed=0.25, paths={"shm": 2})
    assert moved.path == "shm"


def test_a_request_that_moved_nothing_names_no_path() -> None:
    nothing = Transfers(3, 10, seconds=1.0, exposed=0.0, paths={"tcp": 2})
    assert nothing.since(nothing).path == "-"


def test_what_is_counted_later_than_its_reply_is_waited_for() -> None:
    registry = CollectorRegistry()
    requests = Counter("mooncake_connector:requests", "r", registry=registry)
    nbytes = Histogram("mooncake_connector:transfer_bytes", "b", registry=registry)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    url = f"http://127.0.0.1:{server.server_port}"

    def count() -> None:
        requests.inc()
        nbytes.observe(64)

    later = threading.Timer(3 * LOOK_S, count)
    try:
        before = Transfers.of(url)
        later.start()
        moved = Transfers.gained(url, before, within_s=30)
        assert (moved.requests, moved.nbytes) == (1, 64)
        assert Transfers.gained(url, before, requests=2, within_s=2 * LOOK_S) == moved
    finally:
        later.cancel()
        later.join()
        server.shutdown()
        server.server_close()
        thread.join()
