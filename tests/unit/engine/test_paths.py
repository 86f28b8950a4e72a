from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest
from engines import SOON, address, config
from mooncake_engine import (
    ConfigError,
    MetadataConfig,
    PathUnavailable,
    RegionRecord,
    TcpConfig,
    TransferEngine,
    register_transport,
)
from mooncake_engine.metadata import open_store
from mooncake_engine.transport import registry
from mooncake_engine.transport.loopback import LoopbackTransport


def rdma_devices() -> list[Path]:
    return list(Path("/sys/class/infiniband").glob("*"))


def test_auto_prefers_shm_on_one_machine() -> None:
    with (
        TransferEngine(config("auto", strict_transport=False)) as near,
        TransferEngine(config("auto", strict_transport=False)) as far,
    ):
        path = near.open_segment(far.name).path
        assert (path.scheme, path.reason) == ("shm", "same machine; rdma, tcp not tried")


def test_auto_takes_tcp_to_another_machine() -> None:
    with TransferEngine(config("auto")) as near, TransferEngine(config("auto")) as far:
        near.transports.pop("rdma", None)  # where there are NICs it would serve
        path = near.open_segment(msgspec.structs.replace(far.record(), machine_id="other")).path
        assert path.scheme == "tcp"
        assert path.reason.startswith(
            f"other machine; shm: {far.name} is on another machine; rdma: "
        )


def test_a_segment_can_be_asked_to_take_one_path() -> None:
    with TransferEngine(config("auto")) as near, TransferEngine(config("auto")) as far:
        by_tcp = near.open_segment(far.name, protocol="tcp")
        by_shm = near.open_segment(far.name, protocol="shm")
        assert (by_tcp.path.scheme, by_shm.path.scheme) == ("tcp", "shm")
        assert near.open_segment(far.name, protocol="tcp") is by_tcp


def test_a_preference_may_be_overruled_with_a_warning_and_strictness_refuses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        TransferEngine(config("shm", strict_transport=False)) as lenient,
        TransferEngine(config("shm")) as strict,
        TransferEngine(config("tcp")) as far,
    ):
        with caplog.at_level(logging.WARNING):
            assert lenient.open_segment(far.name).path.scheme == "tcp"
        assert (
            f"{far.name} is reached over tcp, since shm: {far.name} does not offer" in caplog.text
        )
        with pytest.raises(PathUnavailable, match=f"no path to {far.name}: shm: .*not offer it"):
            strict.open_segment(far.name)


def test_every_reason_is_listed_when_there_is_no_path() -> None:
    with TransferEngine(config("auto")) as near, TransferEngine(config("auto")) as far:
        record = far.record()
    with TransferEngine(config("auto")) as near:
        with pytest.raises(PathUnavailable) as told:
            near.open_segment(msgspec.structs.replace(record, machine_id="other"))
        assert "shm: " in str(told.value)
        assert "tcp: " in str(told.value)


def test_device_memory_on_the_far_side_excludes_paths_that_cannot_reach_it() -> None:
    with TransferEngine(config("auto")) as near, TransferEngine(config("auto")) as far:
        regions = (RegionRecord(1 << 40, 4096, "cuda:1"),)
        with pytest.raises(PathUnavailable, match="tcp: it cannot reach memory on cuda:1"):
            near.open_segment(msgspec.structs.replace(far.record(), regions=regions))


def test_a_transport_that_does_not_exist_is_refused_by_its_name() -> None:
    with (
        TransferEngine(config("tcp")) as engine,
        pytest.raises(ConfigError, match="'smoke': this version has no"),
    ):
        engine.open_segment(engine.record(), protocol="smoke")


def test_an_engine_that_cannot_have_the_protocol_it_was_told_does_not_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PathUnavailable, match=f"protocol tcp cannot be had.*{port}"):
            TransferEngine(config("tcp", tcp=TcpConfig(min_port=port, max_port=port)))


def test_a_transport_that_did_not_start_says_why_when_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fields = {"strict_transport": False, "tcp": TcpConfig(min_port=port, max_port=port)}
        with TransferEngine(config("auto", **fields)) as engine:
            assert set(engine.transports) == {"shm"}
            with pytest.raises(PathUnavailable, match=f"tcp: cannot listen.*{port}"):
                engine.open_segment(engine.record(), protocol="tcp")


def test_a_name_is_the_address_without_a_server_and_random_with_one() -> None:
    with TransferEngine(config()) as engine:
        assert engine.name.startswith("127.0.0.1:")
        with TransferEngine(config(), store=engine.store, name=engine.name) as named:
            assert named.name == engine.name
    with pytest.raises(ConfigError, match="leave the name empty"):
        TransferEngine(config(), name="my-node")
    with TransferEngine(
        config(metadata=msgspec.convert({"backend": "memory"}, type(config().metadata)))
    ) as engine:
        assert engine.name.startswith(f"{socket.gethostname()}-")
        assert engine.open_segment(engine.name).record == engine.record()


def test_a_transport_of_ones_own_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnTransport(LoopbackTransport):
        scheme: ClassVar[str] = "own"

    class Impostor(LoopbackTransport):
        pass

    monkeypatch.setattr(registry, "_known", dict(registry._known))
    monkeypatch.setattr(registry, "_auto", list(registry._auto))
    register_transport(OwnTransport)
    register_transport(OwnTransport)
    with TransferEngine(config("auto")) as near, TransferEngine(config("auto")) as far:
        segment = near.open_segment(far.name, protocol="own")
        into, source = near.allocate(10), far.allocate(10)
        source[:] = 4
        batch = near.submit("read", segment, [(address(into), address(source), 10)])
        assert batch.wait(SOON).path.scheme == "own"
        assert (into == 4).all()
    monkeypatch.setattr(Impostor, "scheme", "tcp")
    with pytest.raises(ConfigError, match="'tcp' exists already"):
        register_transport(Impostor)


def test_closing_the_engine_withdraws_its_record() -> None:
    metadata = MetadataConfig(backend="memory")
    with contextlib.closing(open_store(metadata, "")) as store:
        for lent in (store, None):  # the caller's store, or one of its own to the same cluster
            engine = TransferEngine(config(metadata=metadata), name="here", store=lent)
            assert list(store.list("segments/")) == ["segments/here"]
            engine.close()
            assert store.list("segments/") == {}


def test_importing_the_engine_loads_neither_torch_nor_grpc() -> None:
    code = "import sys, mooncake_engine; print({'torch', 'grpc', 'vllm'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.skipif(bool(rdma_devices()), reason="this machine has RDMA devices, and rdma starts")
@pytest.mark.parametrize("strict", [False, True])
def test_rdma_that_was_asked_for_and_cannot_be_had_says_what_to_install(*, strict: bool) -> None:
    with pytest.raises(PathUnavailable, match=r"protocol rdma cannot be had.*(install|rdma_rxe)"):
        TransferEngine(config("rdma", strict_transport=strict))


def test_auto_goes_on_without_rdma_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    if rdma_devices():
        pytest.skip("this machine has RDMA devices, and rdma starts")
    caplog.set_level(logging.INFO, "mooncake_engine.engine")
    with TransferEngine(config("auto")) as near, TransferEngine(config("auto")) as far:
        near.open_segment(far.name, protocol="tcp")
        said = [text for text in caplog.messages if "without rdma" in text]
        assert len(said) == 2  # once for each engine
        assert "install" in said[0] or "rdma_rxe" in said[0]
