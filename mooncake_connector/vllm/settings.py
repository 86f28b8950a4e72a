"""Settings as vLLM hands them in."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import msgspec
from vllm.utils.network_utils import get_ip

from mooncake_connector.config import load_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from mooncake_connector.config import ConnectorConfig

log = logging.getLogger(__name__)


def load(vllm_config: VllmConfig) -> ConnectorConfig:
    """Settings for one vLLM process; `engine.host` is vLLM's own choice when not set.

    With `testing`, a request may force a transport and slow it down:
    `kv_transfer_params["test_protocol"]` and `["test_delay_s"]` (seconds per slice of 64 KiB,
    until the next request says other).

    Raises:
        ConfigError: Naming what cannot be used.
    """
    loaded = load_config(extra=vllm_config.kv_transfer_config.kv_connector_extra_config)
    _log_like_vllm(loaded.config.log_level)
    for notice in loaded.notices:
        log.info("%s", notice)
    config = loaded.config
    if not config.engine.host:
        engine = msgspec.structs.replace(config.engine, host=get_ip())
        config = msgspec.structs.replace(config, engine=engine)
    return config


def _log_like_vllm(level: str) -> None:
    """Use vLLM's handlers: it formats only its own loggers, ours would say warnings bare.

    Copies, since theirs let nothing pass below VLLM_LOGGING_LEVEL, whatever our level is.
    """
    for name in ("mooncake_connector", "mooncake_engine"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.handlers = [copy.copy(each) for each in logging.getLogger("vllm").handlers]
            for handler in logger.handlers:
                handler.setLevel(logging.NOTSET)
            logger.propagate = False
            logger.setLevel(level.upper())
