"""What verbs/base.py promises of devices, memory and queue pairs, kept by the binding under test.

The binding is MC_VERBS_BINDING's; `scripts/test rdma` runs this with each.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from harness.verbs_sides import CAPS, LIMITS, REMOTE, Side, binding
from mooncake_engine.transport.rdma.verbs.base import Access, Opcode, Verbs, VerbsError

SYSFS = Path("/sys/class/infiniband")
RTS = 3


@pytest.fixture(scope="module")
def verbs() -> Verbs:
    found = binding()
    assert found.device_names(), "no RDMA device here; run `scripts/test rdma`"
    return found


@pytest.fixture(scope="module")
def name(verbs: Verbs) -> str:
    return min(verbs.device_names())


def address_of(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def test_the_devices_are_those_of_the_kernel(verbs: Verbs) -> None:
    assert sorted(verbs.device_names()) == sorted(entry.name for entry in SYSFS.iterdir())


def test_a_device_that_is_not_there_is_named_beside_those_that_are(verbs: Verbs, name: str) -> None:
    with pytest.raises(LookupError) as missing:
        verbs.open("mlx5_99")
    assert "mlx5_99" in str(missing.value)
    assert name in str(missing.value)


def test_a_device_tells_its_limits(verbs: Verbs, name: str) -> None:
    device = verbs.open(name)
    limits = device.attributes()
    device.close()
    assert device.name == name
    assert all(value > 0 for value in limits), limits
    assert limits.phys_port_cnt == len(list((SYSFS / name / "ports").iterdir()))
    assert limits.max_mr_size > 1 << 30
    assert limits.max_sge < 1000  # a field read from the wrong place is a wild number
    assert limits.max_sge_rd < 1000


def test_a_port_tells_what_it_is(verbs: Verbs, name: str) -> None:
    device = verbs.open(name)
    port = device.port(1)
    device.close()
    told = SYSFS / name / "ports/1"
    assert port.state == int((told / "state").read_text().split(":")[0])
    assert port.link_layer == (told / "link_layer").read_text().strip().lower()
    assert port.lid == int((told / "lid").read_text(), 16)
    assert port.gid_table_length == len(list((told / "gids").iterdir()))
    assert port.pkey_table_length == len(list((told / "pkeys").iterdir()))
    assert port.active_mtu in {256, 512, 1024, 2048, 4096}


def test_a_port_that_is_not_there_is_an_error(verbs: Verbs, name: str) -> None:
    device = verbs.open(name)
    with pytest.raises(VerbsError) as refused:
        device.port(200)
    device.close()
    assert refused.value.errno == errno.EINVAL
    assert "200" in str(refused.value)


def test_gids_are_those_of_the_kernel_with_type_and_interface(verbs: Verbs, name: str) -> None:
    device = verbs.open(name)
    gids = device.gids(1)
    device.close()
    assert gids
    told = SYSFS / name / "ports/1"
    kinds = {"IB/RoCE v1": ("ib", "roce_v1"), "RoCE v2": ("roce_v2",)}
    for row in gids:
        words = (told / f"gids/{row.gid_index}").read_text().strip().replace(":", "")
        assert row.raw == bytes.fromhex(words)
        assert row.kind in kinds[(told / f"gid_attrs/types/{row.gid_index}").read_text().strip()]
        assert row.netdev == (told / f"gid_attrs/ndevs/{row.gid_index}").read_text().strip()
    assert len({row.gid_index for row in gids}) == len(gids)


def test_a_queue_pair_has_what_it_was_given(verbs: Verbs, name: str) -> None:
    with Side(verbs, name, psn=0x123456) as ours, Side(verbs, name, psn=0xFEDCBA) as theirs:
        assert ours.queue.depth >= 256
        assert all(got >= asked for got, asked in zip(ours.pair.caps, CAPS, strict=True))
        limits = LIMITS._replace(timeout=13, retry_count=5, rnr_retry=3, max_rd_atomic=4)
        ours.connect(
            theirs,
            limits=limits,
            mtu=2048,
            max_dest_rd_atomic=8,
            min_rnr_timer=9,
            traffic_class=104,
            service_level=0,
            flow_label=0x12345,
        )
        found = ours.pair.query()
    wanted = {
        "qp_state": RTS,
        "path_mtu": 2048,
        "rq_psn": 0xFEDCBA,
        "sq_psn": 0x123456,
        "dest_qp_num": theirs.pair.number,
        "timeout": 13,
        "retry_cnt": 5,
        "rnr_retry": 3,
        "max_rd_atomic": 4,
        "max_dest_rd_atomic": 8,
        "min_rnr_timer": 9,
        "port_num": 1,
        "pkey_index": 0,
        "traffic_class": 104,
        "sl": 0,
        "hop_limit": found["hop_limit"],  # with RoCE the kernel takes the route's own
        "flow_label": 0x12345,
        "sgid_index": ours.gid.gid_index,
        "max_send_wr": found["max_send_wr"],
        "max_send_sge": ours.pair.caps.max_send_sge,
        "max_inline_data": ours.pair.caps.max_inline,
    }
    assert found == wanted
    assert found["hop_limit"] > 0
    assert found["max_send_wr"] >= ours.pair.caps.max_send_wr


def test_a_step_out_of_order_says_what_was_attempted(verbs: Verbs, name: str) -> None:
    with Side(verbs, name) as ours:
        with pytest.raises(VerbsError, match=f"queue pair {ours.pair.number} to RTS") as refused:
            ours.pair.to_rts(LIMITS)
        assert refused.value.errno == errno.EINVAL


def test_memory_of_every_kind_is_registered(verbs: Verbs, name: str) -> None:
    device = verbs.open(name)
    fd = os.memfd_create("verbs")
    os.ftruncate(fd, 1 << 16)
    for memory in (mmap.mmap(-1, 1 << 16), mmap.mmap(fd, 1 << 16)):
        address = address_of(memory)
        whole = device.register(address, 1 << 16, REMOTE)
        part = device.register(address + 100, 5000, REMOTE | Access.RELAXED_ORDERING)
        assert whole.rkey != part.rkey
        assert whole.lkey != part.lkey
        for region in (part, whole, whole):  # closing twice is fine
            region.close()
    os.close(fd)
    device.close()


def test_memory_that_may_not_be_written_is_not_registered(verbs: Verbs, name: str) -> None:
    device = verbs.open(name)
    fd = os.memfd_create("verbs")
    os.ftruncate(fd, 1 << 16)
    writable = mmap.mmap(fd, 1 << 16)
    library = ctypes.CDLL(None, use_errno=True)
    library.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    address = address_of(writable)
    assert library.mprotect(address, 1 << 16, mmap.PROT_READ) == 0
    with pytest.raises(VerbsError) as refused:
        device.register(address, 1 << 16, REMOTE)
    os.close(fd)
    device.close()
    assert refused.value.errno == errno.EFAULT
    for part in (str(1 << 16), f"{address:#x}", name):
        assert part in str(refused.value)


def test_memory_that_is_not_there_is_not_registered(verbs: Verbs, name: str) -> None:
    device = verbs.open(name)
    for address in (0, 4096):
        with pytest.raises(VerbsError) as refused:
            device.register(address, 4096, REMOTE)
        assert refused.value.errno == errno.EFAULT
    device.close()


def test_a_dmabuf_that_cannot_be_registered_is_an_error(verbs: Verbs, name: str) -> None:
    device = verbs.open(name)
    fd = os.memfd_create("no dmabuf")
    with pytest.raises(VerbsError) as refused:
        device.register_dmabuf(fd, 0, 4096, 1 << 40, REMOTE)
    os.close(fd)
    device.close()
    assert refused.value.errno
    assert name in str(refused.value)


def test_a_region_that_was_closed_serves_no_more(verbs: Verbs, name: str) -> None:
    with Side(verbs, name) as ours, Side(verbs, name) as theirs:
        ours.connect(theirs)
        theirs.connect(ours)
        theirs.region.close()
        ours.post(Opcode.READ, theirs, [(0, [(0, 64)])])
        assert ours.completions(1)["status"] == 10


def test_a_device_opened_and_closed_leaves_nothing_behind(verbs: Verbs, name: str) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    for _ in range(5):
        side = Side(verbs, name)
        assert descriptors() > before
        side.close()
        for part in (side.pair, side.queue, side.channel, side.region, side.device):
            part.close()  # again
        assert descriptors() == before


def test_statuses_are_named(verbs: Verbs) -> None:
    texts = [verbs.status_text(status) for status in range(13)]
    assert len(set(texts)) == 13
    assert "access" in texts[10].lower()
    assert "retry" in texts[12].lower()
    assert verbs.status_text(9999)  # a provider of tomorrow
