"""What verbs programs and libibverbs agree on: structures of <infiniband/verbs.h>, LP64 Linux.

The data path of verbs is inline in that header, so every compiled program has these offsets in
it: they cannot change. tests/unit/rdma/test_native_abi.py compares them with the header.
"""

from __future__ import annotations

import ctypes

import numpy as np

Pointer = ctypes.c_void_p

# Offsets of function pointers in ibv_context.ops, of ibv_mr's keys and the like.
CONTEXT_POLL_CQ = 96
CONTEXT_REQ_NOTIFY_CQ = 104
CONTEXT_POST_SEND = 208
CONTEXT_POST_RECV = 216
CHANNEL_FD = 8
CQ_CQE = 28
MR_LKEY = 36
MR_RKEY = 40
QP_NUM = 52

# ibv_qp_attr_mask
MASK_STATE = 1 << 0
MASK_ACCESS = 1 << 3
MASK_PKEY_INDEX = 1 << 4
MASK_PORT = 1 << 5
MASK_AV = 1 << 7
MASK_PATH_MTU = 1 << 8
MASK_TIMEOUT = 1 << 9
MASK_RETRY_CNT = 1 << 10
MASK_RNR_RETRY = 1 << 11
MASK_RQ_PSN = 1 << 12
MASK_MAX_RD_ATOMIC = 1 << 13
MASK_MIN_RNR_TIMER = 1 << 15
MASK_SQ_PSN = 1 << 16
MASK_MAX_DEST_RD_ATOMIC = 1 << 17
MASK_CAP = 1 << 19
MASK_DEST_QPN = 1 << 20
MASK_ALL = (1 << 21) - 1

STATE_INIT = 1
STATE_RTR = 2
STATE_RTS = 3
STATE_ERR = 6
TYPE_RC = 2

SEND_SIGNALED = 2
SEND_INLINE = 8
WC_WITH_IMM = 2
WC_RECV_RDMA_WITH_IMM = 0x81

LINK_LAYERS = {1: "infiniband", 2: "ethernet"}
GID_KINDS = ("ib", "roce_v1", "roce_v2")

_U32 = ctypes.c_uint32
_U16 = ctypes.c_uint16
_U8 = ctypes.c_uint8


def mtu_code(nbytes: int) -> int:
    """ibv_mtu of 256, 512, ... 4096 bytes."""
    return nbytes.bit_length() - 8


def mtu_bytes(code: int) -> int:
    """The opposite."""
    return 1 << (code + 7)


class DeviceAttr(ctypes.Structure):
    """ibv_device_attr."""

    _fields_ = (
        ("fw_ver", ctypes.c_char * 64),
        ("node_guid", ctypes.c_uint64),
        ("sys_image_guid", ctypes.c_uint64),
        ("max_mr_size", ctypes.c_uint64),
        ("page_size_cap", ctypes.c_uint64),
        ("vendor", _U32 * 3),
        ("max_qp", ctypes.c_int),
        ("max_qp_wr", ctypes.c_int),
        ("device_cap_flags", _U32),
        ("max_sge", ctypes.c_int),
        ("max_sge_rd", ctypes.c_int),
        ("max_cq", ctypes.c_int),
        ("max_cqe", ctypes.c_int),
        ("max_mr", ctypes.c_int),
        ("max_pd", ctypes.c_int),
        ("max_qp_rd_atom", ctypes.c_int),
        ("max_ee_rd_atom", ctypes.c_int),
        ("max_res_rd_atom", ctypes.c_int),
        ("max_qp_init_rd_atom", ctypes.c_int),
        ("more", _U8 * (227 - 160)),
        ("phys_port_cnt", _U8),
        ("pad", _U8 * 4),
    )


class PortAttr(ctypes.Structure):
    """ibv_port_attr, as much of it as every release fills, and room for what newer ones add."""

    _fields_ = (
        ("state", _U32),
        ("max_mtu", _U32),
        ("active_mtu", _U32),
        ("gid_tbl_len", ctypes.c_int),
        ("port_cap_flags", _U32),
        ("max_msg_sz", _U32),
        ("bad_pkey_cntr", _U32),
        ("qkey_viol_cntr", _U32),
        ("pkey_tbl_len", _U16),
        ("lid", _U16),
        ("sm_lid", _U16),
        ("lmc", _U8),
        ("max_vl_num", _U8),
        ("sm_sl", _U8),
        ("subnet_timeout", _U8),
        ("init_type_reply", _U8),
        ("active_width", _U8),
        ("active_speed", _U8),
        ("phys_state", _U8),
        ("link_layer", _U8),
        ("flags", _U8),
        ("more", _U8 * 16),
    )


class GidTableEntry(ctypes.Structure):
    """ibv_gid_entry."""

    _fields_ = (
        ("gid", _U8 * 16),
        ("gid_index", _U32),
        ("port_num", _U32),
        ("gid_type", _U32),
        ("ndev_ifindex", _U32),
    )


CAPS = ("max_send_wr", "max_recv_wr", "max_send_sge", "max_recv_sge", "max_inline_data")


class Cap(ctypes.Structure):
    """ibv_qp_cap."""

    _fields_ = tuple((name, _U32) for name in CAPS)


class QpInitAttr(ctypes.Structure):
    """ibv_qp_init_attr."""

    _fields_ = (
        ("qp_context", Pointer),
        ("send_cq", Pointer),
        ("recv_cq", Pointer),
        ("srq", Pointer),
        ("cap", Cap),
        ("qp_type", ctypes.c_int),
        ("sq_sig_all", ctypes.c_int),
    )


class AhAttr(ctypes.Structure):
    """ibv_ah_attr with its ibv_global_route."""

    _fields_ = (
        ("dgid", _U8 * 16),
        ("flow_label", _U32),
        ("sgid_index", _U8),
        ("hop_limit", _U8),
        ("traffic_class", _U8),
        ("pad", _U8),
        ("dlid", _U16),
        ("sl", _U8),
        ("src_path_bits", _U8),
        ("static_rate", _U8),
        ("is_global", _U8),
        ("port_num", _U8),
        ("more", _U8),
    )


class QpAttr(ctypes.Structure):
    """ibv_qp_attr."""

    _fields_ = (
        *(
            (name, _U32)
            for name in (
                "qp_state",
                "cur_qp_state",
                "path_mtu",
                "path_mig_state",
                "qkey",
                "rq_psn",
                "sq_psn",
                "dest_qp_num",
                "qp_access_flags",
            )
        ),
        ("cap", Cap),
        ("ah", AhAttr),
        ("alt_ah", AhAttr),
        ("pkey_index", _U16),
        ("alt_pkey_index", _U16),
        *(
            (name, _U8)
            for name in (
                "en_sqd_async_notify",
                "sq_draining",
                "max_rd_atomic",
                "max_dest_rd_atomic",
                "min_rnr_timer",
                "port_num",
                "timeout",
                "retry_cnt",
                "rnr_retry",
                "alt_port_num",
                "alt_timeout",
            )
        ),
        ("rate_limit", _U32),
        ("pad", _U8 * 4),  # of a structure that holds 64-bit GIDs; a provider may clear it whole
    )


SEND_WR = np.dtype(
    {
        "names": [
            *("wr_id", "next", "sg_list", "num_sge", "opcode", "send_flags", "imm_data"),
            *("remote_addr", "rkey"),
        ],
        "formats": ["u8", "u8", "u8", "i4", "i4", "u4", ">u4", "u8", "u4"],
        "offsets": [0, 8, 16, 24, 28, 32, 36, 40, 48],
        "itemsize": 128,
    }
)
RECV_WR = np.dtype(
    [("wr_id", "u8"), ("next", "u8"), ("sg_list", "u8"), ("num_sge", "i4"), ("pad", "i4")]
)
SGE = np.dtype([("addr", "u8"), ("length", "u4"), ("lkey", "u4")])
WC = np.dtype(
    [
        ("wr_id", "u8"),
        *((name, "i4") for name in ("status", "opcode")),
        *((name, "u4") for name in ("vendor_err", "byte_len")),
        ("imm_data", ">u4"),
        *((name, "u4") for name in ("qp_num", "src_qp", "wc_flags")),
        ("more", "u8"),
    ]
)
