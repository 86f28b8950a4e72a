"""A peer that is not ours: /usr/bin/python3, the distribution's pyverbs, and none of our code.

    pyverbs_peer.py DEVICE GID_INDEX
    stdout: {"number", "psn", "gid", "address", "rkey", "length"}
    stdin:  {"number", "psn", "gid"}                                      and it connects
            {"do": "read then write back", "address", "rkey", "length"}   answered by {"read"}
            {"do": "show"}                                                answered by {"memory"}
    The end of stdin ends it. One JSON object a line.

`read then write back` READs so many bytes there, inverts each, and WRITEs them behind those that
it read. Its own memory holds the bytes 0, 1, 2, ... 250, 0, ... at first.
"""

import hashlib
import json
import sys
import time

from pyverbs import enums
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

LENGTH = 1 << 19
PSN = 0x00C0FFEE & 0xFFFFFF
WAIT_S = 60.0


def main(name: str, gid_index: int) -> None:
    context = Context(name=name)
    domain = PD(context)
    access = enums.IBV_ACCESS_LOCAL_WRITE
    access |= enums.IBV_ACCESS_REMOTE_WRITE | enums.IBV_ACCESS_REMOTE_READ
    memory = MR(domain, LENGTH, access)
    memory.write(bytes(index % 251 for index in range(LENGTH)), LENGTH)
    queue = CQ(context, 16)
    caps = QPCap(max_send_wr=16, max_recv_wr=1)
    pair = QP(domain, QPInitAttr(enums.IBV_QPT_RC, scq=queue, rcq=queue, cap=caps, sq_sig_all=1))
    say(
        number=pair.qp_num,
        psn=PSN,
        gid=context.query_gid(1, gid_index).gid,
        address=memory.buf,
        rkey=memory.rkey,
        length=LENGTH,
    )
    connect(pair, json.loads(sys.stdin.readline()), gid_index, access)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "show":
            say(memory=digest(memory.read(LENGTH, 0)))
            continue
        half = order["length"]
        move(pair, queue, memory, enums.IBV_WR_RDMA_READ, order["address"], order["rkey"], half)
        read = memory.read(half, 0)
        memory.write(bytes(255 - byte for byte in read), half)
        there = order["address"] + half
        move(pair, queue, memory, enums.IBV_WR_RDMA_WRITE, there, order["rkey"], half)
        say(read=digest(read))


def connect(pair: QP, peer: dict, gid_index: int, access: int) -> None:
    wanted = QPAttr(port_num=1, path_mtu=enums.IBV_MTU_1024)
    wanted.qp_access_flags = access
    wanted.dest_qp_num = peer["number"]
    wanted.rq_psn = peer["psn"]
    wanted.sq_psn = PSN
    wanted.max_dest_rd_atomic = wanted.max_rd_atomic = 4
    wanted.min_rnr_timer = 12
    wanted.timeout, wanted.retry_cnt, wanted.rnr_retry = 14, 6, 6
    route = GlobalRoute(dgid=GID(peer["gid"]), sgid_index=gid_index, hop_limit=64)
    wanted.ah_attr = AHAttr(gr=route, is_global=1, port_num=1)
    pair.to_rts(wanted)


def move(pair, queue, memory, opcode, address, rkey, length) -> None:  # noqa: ANN001 - pyverbs has no types
    entry = SGE(memory.buf, length, memory.lkey)
    request = SendWR(opcode=opcode, num_sge=1, sg=[entry])
    request.set_wr_rdma(rkey, address)
    pair.post_send(request)
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        count, completions = queue.poll()
        if count:
            assert completions[0].status == 0, f"status {completions[0].status}"
            return
        time.sleep(0.001)
    raise TimeoutError("no completion")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
