from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, NamedTuple

import pytest
from mooncake_engine.errors import ConfigError, MetadataError

if TYPE_CHECKING:
    from pathlib import Path

    from etcd_stage import EtcdServer, Seen, Stores


@pytest.fixture
def guarded(etcd: EtcdServer) -> EtcdServer:
    """Etcd with users: root, and `kv` who may touch one cluster only."""
    for command in (
        "user add root:rootpw",
        "user grant-role root root",
        "role add writer",
        "role grant-permission writer --prefix=true readwrite mooncake/test/",
        "user add kv:secret",
        "user grant-role kv writer",
        "auth enable",
    ):
        etcd.ctl(*command.split())
    return etcd


def test_a_user_with_the_right_password_reads_writes_and_watches(
    guarded: EtcdServer, stores: Stores, seen: Seen
) -> None:
    store = stores(guarded.address, username="kv", password="secret")
    store.watch("nodes/", seen)
    store.put("nodes/a", b"1")
    assert store.list("nodes/") == {"nodes/a": b"1"}
    seen.until({"nodes/a": b"1"})


def test_a_wrong_password_is_refused_by_name(guarded: EtcdServer, stores: Stores) -> None:
    store = stores(guarded.address, username="kv", password="wrong")
    with pytest.raises(MetadataError, match=r"check the password of user 'kv'"):
        store.put("a", b"1")


def test_a_server_with_users_tells_who_has_none_what_to_set(
    guarded: EtcdServer, stores: Stores
) -> None:
    with pytest.raises(MetadataError, match=r"set engine.metadata.username"):
        stores(guarded.address).get("a")


def test_a_user_without_the_right_role_is_told_which_prefix_it_needs(
    guarded: EtcdServer, stores: Stores
) -> None:
    store = stores(guarded.address, username="kv", password="secret", cluster="other")
    with pytest.raises(MetadataError, match=r"grant user 'kv' a role .* mooncake/other/"):
        store.put("a", b"1")


def test_a_token_that_the_server_forgot_is_renewed(
    guarded: EtcdServer, stores: Stores, seen: Seen
) -> None:
    store = stores(guarded.address, username="kv", password="secret")
    store.put("nodes/a", b"1")
    store.watch("nodes/", seen)
    seen.until({"nodes/a": b"1"})
    guarded.kill()
    guarded.start()  # tokens live in memory
    store.put("nodes/b", b"2")
    assert store.get("nodes/b") == b"2"
    seen.until({"nodes/a": b"1", "nodes/b": b"2"})
    assert seen.gone == []


def test_a_user_where_the_server_has_none_is_told_so(etcd: EtcdServer, stores: Stores) -> None:
    store = stores(etcd.address, username="kv", password="secret")
    with pytest.raises(MetadataError, match=r"remove engine.metadata.username"):
        store.put("a", b"1")


class Certificates(NamedTuple):
    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    def openssl(*arguments: object) -> None:
        command = ["openssl", *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, timeout=30)

    folder = tmp_path / "pki"
    folder.mkdir()
    key, ca = folder / "ca.key", folder / "ca.pem"
    new = ("req", "-newkey", "rsa:2048", "-nodes")
    openssl(*new, "-x509", "-days", 2, "-subj", "/CN=test-ca", "-keyout", key, "-out", ca)
    extensions = folder / "san"
    extensions.write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        request = folder / f"{name}.csr"
        openssl(*new, "-subj", f"/CN={name}", "-keyout", folder / f"{name}.key", "-out", request)
        signed = ("-CA", ca, "-CAkey", key, "-CAcreateserial", "-days", 2, "-extfile", extensions)
        openssl("x509", "-req", "-in", request, *signed, "-out", folder / f"{name}.pem")
    files = (f"{n}.{e}" for n in ("server", "client") for e in ("pem", "key"))
    return Certificates(ca, *(folder / file for file in files))


@pytest.fixture
def tls_etcd(cold_etcd: EtcdServer, certificates: Certificates) -> EtcdServer:
    """Etcd that speaks TLS and asks clients for a certificate of the same authority."""
    cold_etcd.ca = certificates.ca
    cold_etcd.flags = [
        f"--cert-file={certificates.server}",
        f"--key-file={certificates.server_key}",
        "--client-cert-auth",
        f"--trusted-ca-file={certificates.ca}",
    ]
    cold_etcd.start()
    return cold_etcd


def test_tls_with_client_certificates_reads_writes_and_watches(
    tls_etcd: EtcdServer, certificates: Certificates, stores: Stores, seen: Seen
) -> None:
    store = stores(
        f"https://{tls_etcd.address}",
        ca_cert=str(certificates.ca),
        client_cert=str(certificates.client),
        client_key=str(certificates.client_key),
        timeout_s=10.0,
    )
    store.watch("", seen)
    store.put("a", b"1")
    assert store.get("a") == b"1"
    seen.until({"a": b"1"})


def test_an_authority_that_did_not_sign_the_server_is_not_trusted(
    tls_etcd: EtcdServer, certificates: Certificates, stores: Stores
) -> None:
    # Any certificate that is not the authority's: the client's own signed nobody.
    store = stores(tls_etcd.address, ca_cert=str(certificates.client))
    with pytest.raises(MetadataError, match=r"no etcd answered within 2 s.*ca_cert"):
        store.get("a")


def test_plain_text_to_a_tls_server_fails_within_the_timeout(
    tls_etcd: EtcdServer, stores: Stores
) -> None:
    with pytest.raises(MetadataError, match=r"no etcd answered within 1 s.*ca_cert"):
        stores(tls_etcd.address, timeout_s=1.0).get("a")


def test_a_missing_pem_file_is_named(stores: Stores, tmp_path: Path) -> None:
    missing = tmp_path / "nobody.pem"
    with pytest.raises(ConfigError, match=rf"ca_cert: cannot read {missing}"):
        stores("h:2379", ca_cert=str(missing))


def test_https_without_an_authority_is_refused(stores: Stores) -> None:
    with pytest.raises(ConfigError, match="ca_cert is empty but TLS is asked for"):
        stores("https://h:2379")
