from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from mooncake_engine.errors import ConfigError

from mooncake_connector.config import load_config

if TYPE_CHECKING:
    from pathlib import Path

OLD = {
    "prefill_url": "192.168.0.137:13003",
    "decode_url": "192.168.0.139:13003",
    "metadata_server": "192.168.0.139:2379",
    "metadata_backend": "etcd",
    "protocol": "tcp",
    "device_name": "",
}


def test_the_old_file_is_accepted_and_says_what_it_no_longer_needs(tmp_path: Path) -> None:
    file = tmp_path / "mooncake.json"
    file.write_text(json.dumps(OLD))
    loaded = load_config(environ={"MOONCAKE_CONFIG_PATH": str(file)})
    metadata = loaded.config.engine.metadata
    assert (metadata.backend, metadata.endpoints) == ("etcd", ("192.168.0.139:2379",))
    assert loaded.config.engine.protocol == "tcp"
    assert loaded.origins["engine.metadata.endpoints"] == str(file)
    assert loaded.notices == [
        "not applied: prefill_url, decode_url "
        "(peers are found by the metadata store or by the request)"
    ]


@pytest.mark.parametrize(
    ("text", "backend", "endpoints"),
    [
        ("h:2379", "etcd", ("h:2379",)),
        ("etcd://h:2379", "etcd", ("h:2379",)),
        ("etcd://a:2379, b:2379/", "etcd", ("a:2379", "b:2379")),
        ("a:2379,b:2379", "etcd", ("a:2379", "b:2379")),
        ("P2PHANDSHAKE", "p2p", ()),
        ("p2phandshake", "p2p", ()),
    ],
)
def test_every_spelling_of_the_metadata_server_is_understood(
    text: str, backend: str, endpoints: tuple[str, ...]
) -> None:
    metadata = load_config(environ={}, extra={"metadata_server": text}).config.engine.metadata
    assert (metadata.backend, metadata.endpoints) == (backend, endpoints)


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ({"metadata_server": "redis://h:6379"}, "redis metadata is not supported; use"),
        ({"metadata_server": "http://h:8080/metadata"}, "http metadata is not supported; use"),
        ({"metadata_server": "etcd://"}, 'use "etcd://host:2379"'),
        ({"metadata_server": "etcd://a,,b"}, 'use "etcd://host:2379"'),
        ({"metadata_backend": "redis"}, "metadata_backend is 'redis', which is not supported"),
        (
            {"metadata_backend": "etcd", "metadata_server": "P2PHANDSHAKE"},
            "metadata_backend is 'etcd' but metadata_server is 'P2PHANDSHAKE'",
        ),
        ({"protocol": "efa"}, "protocol is 'efa'; expected one of 'tcp', 'rdma', 'shm', 'auto'"),
        ({"protocol": 5}, "protocol is 5; expected a string"),
    ],
)
def test_an_old_setting_that_cannot_be_honoured_is_refused(
    old: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ={}, extra=old)
    assert message in str(caught.value)


def test_old_and_new_settings_mix_unless_they_differ() -> None:
    mixed = {
        "metadata_server": "h:2379",
        "engine": {"metadata": {"endpoints": ["h:2379"], "cluster": "blue"}},
        "control_port": 7000,
    }
    config = load_config(environ={}, extra=mixed).config
    assert config.engine.metadata.cluster == "blue"
    assert config.control_port == 7000
    with pytest.raises(ConfigError, match=r"engine\.metadata\.endpoints is given twice"):
        load_config(environ={}, extra={**mixed, "metadata_server": "other:2379"})


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("10.0.0.1:12345", "10.0.0.1"),
        ("node-7.local:12345", "node-7.local"),
        ("[fe80::1]:12345", "fe80::1"),
        ("fe80::1", "fe80::1"),
    ],
)
def test_the_old_host_name_drops_its_port(text: str, host: str) -> None:
    assert load_config(environ={}, extra={"local_hostname": text}).config.engine.host == host


def test_settings_of_the_store_and_of_other_connectors_are_named_once() -> None:
    extra = {"global_segment_size": 1, "tenant_id": "", "num_workers": 10}
    loaded = load_config(environ={}, extra=extra)
    assert loaded.notices == [
        "not applied: global_segment_size (it belongs to the Mooncake store)",
        "not applied: num_workers (it belongs to vLLM's own MooncakeConnector)",
    ]


def test_a_later_p2p_takes_back_an_earlier_etcd() -> None:
    metadata = load_config(
        environ={"MOONCAKE_TE_META_DATA_SERVER": "h:2379"},
        extra={"metadata_server": "P2PHANDSHAKE"},
    ).config.engine.metadata
    assert (metadata.backend, metadata.endpoints) == ("p2p", ())
