"""The structures in verbs/abi.py against the header that every verbs program is compiled with."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from mooncake_engine.transport.rdma.verbs import abi
from mooncake_engine.transport.rdma.verbs.base import Access, Opcode

HEADER = Path("/usr/include/infiniband/verbs.h")
pytestmark = [
    pytest.mark.skipif(not HEADER.exists(), reason="compares with libibverbs-dev's header"),
    pytest.mark.skipif(not shutil.which("cc"), reason="the header is asked through a C compiler"),
]

#: our structure -> the C one
STRUCTURES = {
    abi.DeviceAttr: "ibv_device_attr",
    abi.GidTableEntry: "ibv_gid_entry",
    abi.Cap: "ibv_qp_cap",
    abi.QpInitAttr: "ibv_qp_init_attr",
    abi.AhAttr: "ibv_ah_attr",
    abi.QpAttr: "ibv_qp_attr",
    abi.PortAttr: "ibv_port_attr",
}
ARRAYS = {
    "ibv_send_wr": abi.SEND_WR,
    "ibv_recv_wr": abi.RECV_WR,
    "ibv_sge": abi.SGE,
    "ibv_wc": abi.WC,
}
#: ours -> the header's, where they differ; None: several fields, or padding, which nobody reads
NAMES = {
    ("ibv_qp_attr", "ah"): "ah_attr",
    ("ibv_qp_attr", "alt_ah"): "alt_ah_attr",
    ("ibv_ah_attr", "dgid"): "grh.dgid",
    ("ibv_ah_attr", "flow_label"): "grh.flow_label",
    ("ibv_ah_attr", "sgid_index"): "grh.sgid_index",
    ("ibv_ah_attr", "hop_limit"): "grh.hop_limit",
    ("ibv_ah_attr", "traffic_class"): "grh.traffic_class",
    ("ibv_send_wr", "remote_addr"): "wr.rdma.remote_addr",
    ("ibv_send_wr", "rkey"): "wr.rdma.rkey",
}
UNREAD = {"more", "pad", "vendor"}
OFFSETS = {
    "CONTEXT_POLL_CQ": "offsetof(struct ibv_context, ops.poll_cq)",
    "CONTEXT_REQ_NOTIFY_CQ": "offsetof(struct ibv_context, ops.req_notify_cq)",
    "CONTEXT_POST_SEND": "offsetof(struct ibv_context, ops.post_send)",
    "CONTEXT_POST_RECV": "offsetof(struct ibv_context, ops.post_recv)",
    "CHANNEL_FD": "offsetof(struct ibv_comp_channel, fd)",
    "CQ_CQE": "offsetof(struct ibv_cq, cqe)",
    "MR_LKEY": "offsetof(struct ibv_mr, lkey)",
    "MR_RKEY": "offsetof(struct ibv_mr, rkey)",
    "QP_NUM": "offsetof(struct ibv_qp, qp_num)",
    "MASK_STATE": "IBV_QP_STATE",
    "MASK_ACCESS": "IBV_QP_ACCESS_FLAGS",
    "MASK_PKEY_INDEX": "IBV_QP_PKEY_INDEX",
    "MASK_PORT": "IBV_QP_PORT",
    "MASK_AV": "IBV_QP_AV",
    "MASK_PATH_MTU": "IBV_QP_PATH_MTU",
    "MASK_TIMEOUT": "IBV_QP_TIMEOUT",
    "MASK_RETRY_CNT": "IBV_QP_RETRY_CNT",
    "MASK_RNR_RETRY": "IBV_QP_RNR_RETRY",
    "MASK_RQ_PSN": "IBV_QP_RQ_PSN",
    "MASK_MAX_RD_ATOMIC": "IBV_QP_MAX_QP_RD_ATOMIC",
    "MASK_MIN_RNR_TIMER": "IBV_QP_MIN_RNR_TIMER",
    "MASK_SQ_PSN": "IBV_QP_SQ_PSN",
    "MASK_MAX_DEST_RD_ATOMIC": "IBV_QP_MAX_DEST_RD_ATOMIC",
    "MASK_CAP": "IBV_QP_CAP",
    "MASK_DEST_QPN": "IBV_QP_DEST_QPN",
    "MASK_ALL": "(IBV_QP_DEST_QPN << 1) - 1",
    "STATE_INIT": "IBV_QPS_INIT",
    "STATE_RTR": "IBV_QPS_RTR",
    "STATE_RTS": "IBV_QPS_RTS",
    "STATE_ERR": "IBV_QPS_ERR",
    "TYPE_RC": "IBV_QPT_RC",
    "SEND_SIGNALED": "IBV_SEND_SIGNALED",
    "SEND_INLINE": "IBV_SEND_INLINE",
    "WC_WITH_IMM": "IBV_WC_WITH_IMM",
    "WC_RECV_RDMA_WITH_IMM": "IBV_WC_RECV_RDMA_WITH_IMM",
}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Each expression of `asked()` -> its value, by a C program."""
    folder = tmp_path_factory.mktemp("abi")
    source, program = folder / "abi.c", folder / "abi"
    lines = [f'printf("%ld\\n", (long)({expression}));' for expression in asked()]
    source.write_text(
        "#include <infiniband/verbs.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f"int main(void) {{ {' '.join(lines)} return 0; }}\n"
    )
    subprocess.run(["cc", "-w", "-o", str(program), str(source)], check=True)
    told = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return dict(zip(asked(), map(int, told.split()), strict=True))


def asked() -> list[str]:
    """Every C expression that a test compares."""
    expressions = [expression for rows in placed().values() for _, expression, _ in rows]
    names = [*(f"sizeof(struct {name})" for name in (*STRUCTURES.values(), *ARRAYS))]
    codes = [f"IBV_WR_RDMA_{code.name}" for code in Opcode]
    access = [f"IBV_ACCESS_{flag.name}" for flag in Access]
    mtus = [f"IBV_MTU_{256 << step}" for step in range(5)]
    return list(dict.fromkeys([*expressions, *names, *OFFSETS.values(), *codes, *access, *mtus]))


def placed() -> dict[str, list[tuple[str, str, int]]]:
    """C structure -> (our field, a C expression, its value here), for offset and size."""
    rows: dict[str, list[tuple[str, str, int]]] = {}
    for kind, name in STRUCTURES.items():
        fields = {field[0]: getattr(kind, field[0]) for field in kind._fields_}
        rows[name] = compared(name, {key: (at.offset, at.size) for key, at in fields.items()})
    for name, kind in ARRAYS.items():
        assert kind.fields is not None
        sizes = {key: (field[1], field[0].itemsize) for key, field in kind.fields.items()}
        rows[name] = compared(name, sizes)
    return rows


def compared(name: str, fields: dict[str, tuple[int, int]]) -> list[tuple[str, str, int]]:
    rows = []
    for field, (offset, size) in fields.items():
        if field in UNREAD:
            continue
        theirs = NAMES.get((name, field), field)
        rows.append((field, f"offsetof(struct {name}, {theirs})", offset))
        rows.append((field, f"sizeof(((struct {name} *)0)->{theirs})", size))
    return rows


@pytest.mark.parametrize("name", list(placed()))
def test_fields_lie_where_the_header_has_them(name: str, header: dict[str, int]) -> None:
    ours = {expression: value for _, expression, value in placed()[name]}
    assert len(ours) >= 6  # bytes are compared, not nothing
    assert ours == {expression: header[expression] for expression in ours}


def test_structures_have_the_size_of_the_header(header: dict[str, int]) -> None:
    sizes = {name: ctypes.sizeof(kind) for kind, name in STRUCTURES.items()}
    sizes |= {name: np.dtype(kind).itemsize for name, kind in ARRAYS.items()}
    # ibv_port_attr grows; there is room for that, and the library writes no more than it knows.
    assert sizes.pop("ibv_port_attr") >= header["sizeof(struct ibv_port_attr)"]
    assert sizes == {name: header[f"sizeof(struct {name})"] for name in sizes}


def test_offsets_and_numbers_are_those_of_the_header(header: dict[str, int]) -> None:
    named = {name: getattr(abi, name) for name in vars(abi) if name.isupper()}
    numbers = {name: value for name, value in named.items() if isinstance(value, int)}
    assert numbers == {name: header[expression] for name, expression in OFFSETS.items()}


def test_opcodes_and_access_flags_are_those_of_the_header(header: dict[str, int]) -> None:
    assert {code.name: int(code) for code in Opcode} == {
        code.name: header[f"IBV_WR_RDMA_{code.name}"] for code in Opcode
    }
    assert {flag.name: int(flag) for flag in Access} == {
        flag.name: header[f"IBV_ACCESS_{flag.name}"] for flag in Access
    }


def test_mtus_are_those_of_the_header(header: dict[str, int]) -> None:
    for nbytes in (256, 512, 1024, 2048, 4096):
        assert abi.mtu_code(nbytes) == header[f"IBV_MTU_{nbytes}"]
        assert abi.mtu_bytes(abi.mtu_code(nbytes)) == nbytes
