"""Our settings in an SGLang process, and what of SGLang's own settings we cannot work with."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec
from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_device, get_disagg, get_parallel, get_schedule
from sglang.srt.utils.network import NetworkAddress, get_local_ip_auto

from mooncake_connector.config import load_config
from mooncake_connector.control import join_address
from mooncake_connector.errors import ConnectorError

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from mooncake_connector.config import ConnectorConfig

log = logging.getLogger(__name__)


class UnsupportedSetup(ConnectorError):
    """SGLang was told to do something that this backend cannot do together with it."""


def load() -> ConnectorConfig:
    """Settings for one SGLang process; `engine.host` is SGLang's own choice when not set.

    Raises:
        ConfigError: Naming what cannot be used.
    """
    loaded = load_config()
    config = loaded.config
    for name in ("mooncake_connector", "mooncake_engine"):
        logging.getLogger(name).setLevel(config.log_level.upper())
    for notice in loaded.notices:
        log.info("%s", notice)
    if not config.engine.host:
        engine = msgspec.structs.replace(config.engine, host=get_local_ip_auto())
        config = msgspec.structs.replace(config, engine=engine)
    return config


def engine_id() -> str:
    """Names this server in the cluster: the same in its ranks and in its bootstrap server.

    Its bootstrap server's address, which no two prefill servers share; in a decode server, which
    has none, the port is only part of a name.
    """
    head = get_parallel().dist_init_addr
    host = NetworkAddress.parse(head).resolved().host if head else get_local_ip_auto()
    return join_address(host, get_disagg().disaggregation_bootstrap_port)


def refuse_unsupported(server_args: ServerArgs) -> None:
    """Raise `UnsupportedSetup` for what would hang, leak or serve wrong tokens later."""
    disagg, parallel = get_disagg(), get_parallel()
    decode = disagg.disaggregation_mode == "decode"
    on_cpu = get_device().device == "cpu"
    overlap = not get_schedule().disable_overlap_schedule
    unusable = {
        "--tokenizer-worker-num is above 1, and SGLang's tokenizer workers load no plugins: they "
        "do not know this backend's name; use 1": server_args.tokenizer_worker_num > 1,
        "--disaggregation-decode-allocation-policy is prefill_complete; use early": (
            disagg.disaggregation_decode_allocation_policy != "early"
        ),
        "--enable-pd-role-switch is on; give each server one role": disagg.enable_pd_role_switch,
        "--dcp-size is above 1; use 1": parallel.attn_dcp_size > 1,
        "--enable-kv-cache-sharding is on; remove it": parallel.enable_kv_cache_sharding,
        "--enable-dsa-cache-layer-split is on; remove it": parallel.enable_dsa_cache_layer_split,
        "SGLANG_DISAGGREGATION_ALL_CP_RANKS_TRANSFER is on; unset it": (
            envs.SGLANG_DISAGGREGATION_ALL_CP_RANKS_TRANSFER.get()
        ),
        "SGLANG_RUST_SERVER is on together with DP attention, and its ranks then do not register "
        "with this backend's bootstrap server; unset it": (
            envs.SGLANG_RUST_SERVER.get() and parallel.attn_dp_size > 1
        ),
        "SGLANG_DISAGG_STAGING_BUFFER is on; unset it": envs.SGLANG_DISAGG_STAGING_BUFFER.get(),
        # Without it SGLang gives pages of a failed request away while they are still written to.
        "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE is off; unset it": (
            decode and not envs.SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE.get()
        ),
        # SGLang records a CUDA event there; without a GPU that ends the scheduler.
        "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX is on, which needs a GPU; set it to 0": (
            not decode
            and on_cpu
            and overlap
            and envs.SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX.get()
        ),
    }
    found = [what for what, holds in unusable.items() if holds]
    if found:
        raise UnsupportedSetup(
            "--disaggregation-transfer-backend mooncake_connector cannot be used: "
            + ". And ".join(found)
        )
