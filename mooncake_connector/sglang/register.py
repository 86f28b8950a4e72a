"""Entry point `sglang.srt.plugins`, and all our contact with SGLang's private parts.

SGLang has an official list of backend names and official hooks on its functions. It has none for
the enum that a name must be a member of, and none that tells a sender or receiver its prompt.
Everything that is touched is looked at first; a version that looks different is refused.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from typing import TYPE_CHECKING, Any

from mooncake_connector.errors import ConnectorError
from mooncake_connector.prompt_key import prompt_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import Req

log = logging.getLogger(__name__)

NAME = "mooncake_connector"
#: What this was written against; `_expect` says whether another version is like it.
KNOWN_VERSION = "0.5.23"
_QUEUES = "sglang.srt.disaggregation"
#: Where a request of a test says how it wants to be moved (`testing` in our settings).
TEST_PARAMETER = "mooncake_connector"

_CLASSES = {
    "manager": "mooncake_connector.sglang.manager:MooncakeKVManager",
    "sender": "mooncake_connector.sglang.sender:MooncakeKVSender",
    "receiver": "mooncake_connector.sglang.receiver:MooncakeKVReceiver",
    "bootstrap_server": "mooncake_connector.sglang.bootstrap:MooncakeKVBootstrapServer",
}


class UnknownSGLang(ConnectorError):
    """This SGLang does not look like those that this backend was written against."""


def register() -> None:
    """Make the backend known by name in this process; may be called more than once."""
    try:
        _add_backend()
    except (ConnectorError, ImportError) as exc:
        # SGLang goes on without the plugin, and refuses the name as an unknown choice.
        log.error("--disaggregation-transfer-backend %s is not available: %s", NAME, exc)  # noqa: TRY400 - the message says it all


def _add_backend() -> None:
    from sglang.srt.arg_groups import choices
    from sglang.srt.disaggregation import utils
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.version import __version__

    _expect(utils, "get_kv_class", "transfer_backend", "class_type")
    _expect(choices, "add_disagg_transfer_backend_choices")
    _expect(utils.KVClassType, "MANAGER")
    _add_member(utils.TransferBackend)
    if NAME in choices.DISAGG_TRANSFER_BACKEND_CHOICES:
        return
    if __version__ != KNOWN_VERSION:
        log.info("SGLang is %s; this was written against %s", __version__, KNOWN_VERSION)
    choices.add_disagg_transfer_backend_choices([NAME])
    HookRegistry.register(f"{_QUEUES}.utils.get_kv_class", _get_kv_class, HookType.AROUND)


def _add_member(backends: Any) -> None:  # noqa: ANN401 - an Enum class
    """What `TransferBackend("mooncake_connector")` looks up: an Enum has no way to add one."""
    if NAME in backends._value2member_map_:
        return
    member = object.__new__(backends)
    member._name_, member._value_ = NAME.upper(), NAME
    member.__objclass__ = backends
    member._sort_order_ = len(backends._member_names_)
    backends._member_names_.append(member._name_)
    backends._member_map_[member._name_] = member
    backends._value2member_map_[NAME] = member
    if backends(NAME) is not member:
        raise UnknownSGLang("its enum of transfer backends takes no new member")


def _get_kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:  # noqa: ANN401 - classes of SGLang's
    """Our class of that kind for our backend, imported where it is needed."""
    if transfer_backend.value != NAME or class_type.value == "kvargs":
        return original(transfer_backend, class_type)
    where = _CLASSES.get(class_type.value)
    if where is None:
        raise UnknownSGLang(f"SGLang asks this backend for its {class_type.value}; it has none")
    return pkgutil.resolve_name(where)


def hand_over_prompts() -> None:
    """From now on every sender and receiver learns its prompt when it is made.

    In the scheduler's process only: elsewhere the queues are not imported, and shall not be.

    Raises:
        UnknownSGLang: The queues are not as they were.
    """
    from sglang.srt.disaggregation.decode import DecodePreallocQueue
    from sglang.srt.disaggregation.prefill import PrefillBootstrapQueue
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    made = {
        f"{_QUEUES}.prefill.PrefillBootstrapQueue.create_sender": _sender_made,
        f"{_QUEUES}.decode.DecodePreallocQueue._create_receiver_and_enqueue": _receiver_made,
    }
    _expect(PrefillBootstrapQueue, "create_sender", "req", "num_kv_heads")
    _expect(DecodePreallocQueue, "_create_receiver_and_enqueue", "req", "is_rebootstrap")
    _expect(DecodePreallocQueue, "_prealloc_required_tokens", "req")
    for target, hook in made.items():
        if target not in HookRegistry._hooks:  # noqa: SLF001 - there is no other way to ask
            source = HookSource(NAME, "mooncake-connector")  # for SGLang's log
            HookRegistry.register(target, hook, HookType.AFTER, source=source)
    HookRegistry.apply_hooks()
    missing = made.keys() - HookRegistry._patched  # noqa: SLF001 - it only logs what failed
    if missing:
        raise UnknownSGLang(f"its hooks on {', '.join(sorted(missing))} did not apply")


def _sender_made(made: bool, queue: Any, req: Req, *_: object) -> None:  # noqa: ANN401 - SGLang's
    from mooncake_connector.sglang.sender import MooncakeKVSender

    sender = req.disagg_kv_sender
    if made and isinstance(sender, MooncakeKVSender):
        sender.open(_key(req, queue.scheduler, rebootstrap=False))


def _receiver_made(
    made: Any,  # noqa: ANN401 - a DecodeRequest
    queue: Any,  # noqa: ANN401 - a DecodePreallocQueue
    req: Req,
    is_rebootstrap: bool = False,
) -> None:
    from mooncake_connector.sglang.receiver import MooncakeKVReceiver

    receiver = made.kv_receiver
    if not isinstance(receiver, MooncakeKVReceiver):
        return
    test: dict[str, Any] = {}
    faults = receiver.kv_mgr.faults
    if faults is not None:
        test = (req.sampling_params.custom_params or {}).get(TEST_PARAMETER, {})
        faults.delay_per_slice_s = float(test.get("delay_s", 0))
    receiver.expect(
        _key(req, queue.scheduler, rebootstrap=is_rebootstrap), protocol=test.get("protocol", "")
    )
    needed, capacity = queue._prealloc_required_tokens(req)[0], queue.max_total_num_tokens  # noqa: SLF001 - SGLang would wait for ever
    if needed > capacity:  # also with a prefix in decode's own cache: that is in the same pool
        receiver.refuse(
            f"decode has {capacity} tokens of KV cache, this prompt needs {needed} with "
            f"{queue.num_reserved_decode_tokens} reserved (--num-reserved-decode-tokens)"
        )


def _key(req: Req, scheduler: Any, *, rebootstrap: bool) -> str:  # noqa: ANN401 - a Scheduler
    """Hash of all that the prompt's KV depends on, the same on prefill and decode.

    Images are in it: SGLang puts hashes of them in place of their tokens. An adapter's id is
    random in each server, its name is not.
    """
    tokens = req.origin_input_ids  # an array, which is hashed as it is: 10 times faster than a list
    if rebootstrap:  # prefill is sent what was generated, too
        tokens = tokens + req.output_ids
    extra, adapter = req.extra_key or "", ""
    if req.lora_id is not None:
        extra = extra.removesuffix(req.lora_id)
        known = scheduler.tp_worker.model_runner.lora_manager.lora_refs.get(req.lora_id)
        adapter = known.lora_name if known is not None else "?"
    return prompt_key(tokens, (adapter, extra))


def _expect(owner: object, name: str, *parameters: str) -> None:
    """Refuse an SGLang whose `owner` has no such attribute, or another signature."""
    from sglang.version import __version__

    found = getattr(owner, name, None)
    known = list(inspect.signature(found).parameters) if parameters and found is not None else []
    if found is None or not set(parameters) <= set(known):
        where = getattr(owner, "__name__", repr(owner))
        raise UnknownSGLang(
            f"SGLang {__version__} has no {where}.{name}({', '.join(parameters)}), which this "
            f"version of mooncake-connector needs; it knows SGLang {KNOWN_VERSION}"
        )
