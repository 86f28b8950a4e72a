"""vLLM's set-ups: aggregated, two regular servers, ours, and the two peers in vLLM's own tree."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from harness.completions import CompletionFailed, complete, token_prompt
from harness.process import ServerFailed
from harness.servers import HOST, connector, free_port

from serving import legs, vllm_load, vllm_timers
from serving.setup import Running, Setup, SetupFailed
from serving.vllm_servers import PEERS_PYTHON, VllmServers, said

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from harness.servers import Server

    from serving.setup import Place

Build = Callable[[VllmServers], Running]

PATHS = {"tcp": "tcp", "shm": "same host"}  # our protocol -> route
TCP, SAME_HOST = PATHS.values()
SHARED_PAGES = {"engine.shm.share_registered": True}
UNPINNED = "os.sched_setaffinity ignored while it starts, so that its workers share all cores"
MOONCAKE_NEEDED = (
    "torch.accelerator.current_device_index() says 0 and the platform's set_device does nothing; "
    "unmodified, its worker ends with 'Cannot access accelerator device when none is available.'"
)
#: A server's first requests allocate and connect; NIXL's first contact takes seconds.
WARM_UP_TOKENS = (70, 1600)


def setups() -> tuple[Setup, ...]:
    """All of them, the reference first."""
    return (
        _setup("aggregated", "", _aggregated, kind="aggregated", servers=1),
        _setup("2 regular", "", _regular, kind="regular"),
        *(
            _setup(
                f"ours {pairs}P{pairs}D, {path}",
                route,
                partial(_ours, path, pairs),
                kind="ours",
                servers=2 * pairs,
                pairs=pairs,
            )
            for pairs in (1, 2)
            for path, route in PATHS.items()
        ),
        _setup(
            "ours 1P1D, shm, shared pages",
            SAME_HOST,
            partial(_ours, "shm", 1, more=SHARED_PAGES),
            kind="ours",
        ),
        _setup("NIXL, UCX_TLS=tcp", TCP, partial(_nixl, "NixlConnector", "tcp")),
        _setup(
            "NIXL, UCX_TLS=tcp, not pinned",
            TCP,
            partial(_nixl, "UnpinnedNixlConnector", "tcp"),
            needed=UNPINNED,
        ),
        _setup("NIXL, default", SAME_HOST, partial(_nixl, "NixlConnector", "")),
        _setup(
            "NIXL, default, not pinned",
            SAME_HOST,
            partial(_nixl, "UnpinnedNixlConnector", ""),
            needed=UNPINNED,
        ),
        _setup("Mooncake, tcp", TCP, _mooncake, needed=MOONCAKE_NEEDED),
    )


def _setup(
    name: str,
    route: str,
    build: Build,
    *,
    kind: str = "peer",
    servers: int = 2,
    pairs: int = 1,
    needed: str = "",
) -> Setup:
    return Setup(
        name=name,
        framework="vllm",
        route=route,
        kind=kind,
        servers=servers,
        pairs=pairs,
        needed=needed,
        open=partial(_opened, build),
    )


@contextlib.contextmanager
def _opened(build: Build, place: Place) -> Iterator[Running]:
    """A server that does not start, or a first request that fails, is a set-up that failed."""
    with VllmServers(place.logs, place.model) as servers:
        try:
            running = build(servers)
            for number, length in enumerate(WARM_UP_TOKENS):
                prompt = token_prompt(length, seed=-1 - number)
                complete(running.url, prompt, max_tokens=4)
                for skipped, hand in enumerate((running.hand, running.hand_at_once), 1):
                    if hand is not None:
                        hand(prompt[skipped:], 4)
        except (ServerFailed, CompletionFailed, OSError) as failed:
            raise SetupFailed(said(failed)) from failed
        yield running


def _running(servers: VllmServers, router: Server, *, stops: bool = False, **more: Any) -> Running:  # noqa: ANN401 - fields
    def ask(prompt: list[int], max_tokens: int) -> Any:  # noqa: ANN401 - it is `complete`'s Reply
        return complete(router.url, prompt, max_tokens=max_tokens)

    if stops:
        # NIXL's idle workers take a whole core from whoever has the turn. Ours and aggregated
        # servers sleep while idle, and a stopped server of ours would lose its lease in etcd.
        more["pause"] = servers.stop_for_now
        more["resume"] = partial(servers.go_on, router.url)
    return Running(
        url=router.url,
        ask=ask,
        load=partial(vllm_load.run, router.url, str(servers.model)),
        facts=servers.facts(),
        **more,
    )


def _aggregated(servers: VllmServers) -> Running:
    return _running(servers, _ready(servers.serve("aggregated"))[0])


def _regular(servers: VllmServers) -> Running:
    both = _ready(*(servers.serve(f"regular-{number}") for number in (1, 2)))
    return _running(servers, *_ready(servers.round_robin(*(server.url for server in both))))


def _ours(
    path: str, pairs: int, servers: VllmServers, more: Mapping[str, object] = MappingProxyType({})
) -> Running:
    etcd = servers.etcd()
    settings = {"engine.protocol": path, "engine.strict_transport": True, **more}
    bootstraps = [free_port() for _ in range(pairs)]
    started = [
        servers.serve(
            f"prefill-{number}",
            connector("kv_producer", etcd, {**settings, "bootstrap_port": port}),
            listed=True,
        )
        for number, port in enumerate(bootstraps, 1)
    ]
    started += [
        servers.serve(f"decode-{number}", connector("kv_consumer", etcd, settings), listed=True)
        for number in range(1, pairs + 1)
    ]
    urls = [server.url for server in _ready(*started)]
    prefill, decode = urls[:pairs], urls[pairs:]
    return _running(
        servers,
        *_ready(servers.proxy(etcd)),
        prefill=tuple(prefill),
        decode=tuple(decode),
        metrics=tuple(decode),
        hand=partial(legs.prefill_first, prefill[0], decode[0]),
        hand_at_once=partial(
            legs.both_at_once, prefill[0], decode[0], f"http://{HOST}:{bootstraps[0]}"
        ),
        timers=partial(vllm_timers.ours, prefill, decode),
    )


def _nixl(name: str, tls: str, servers: VllmServers) -> Running:
    _peers_installed()
    transfer = {"kv_connector": name}
    if name != "NixlConnector":
        transfer["kv_connector_module_path"] = "serving.vllm_on_cpu"
    environment = {"VLLM_NIXL_SIDE_CHANNEL_HOST": HOST, **({"UCX_TLS": tls} if tls else {})}
    prefill, decode = _ready(
        *(
            servers.serve(
                side,
                {**transfer, "kv_role": role},
                {**environment, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())},
                PEERS_PYTHON,
            )
            for side, role in (("prefill", "kv_producer"), ("decode", "kv_consumer"))
        )
    )
    return _running(
        servers,
        *_ready(servers.fixed_proxy(prefill.url, decode.url, "prefill-first")),
        prefill=(prefill.url,),
        decode=(decode.url,),
        metrics=(decode.url,),
        hand=partial(legs.prefill_first, prefill.url, decode.url),
        timers=partial(vllm_timers.nixl, decode.url),
        stops=True,
    )


def _mooncake(servers: VllmServers) -> Running:
    _peers_installed()
    port = free_port()
    transfer = {
        "kv_connector": "CpuMooncakeConnector",
        "kv_connector_module_path": "serving.vllm_on_cpu",
        "kv_connector_extra_config": {"mooncake_protocol": "tcp"},
    }
    prefill, decode = _ready(
        servers.serve(
            "prefill",
            {**transfer, "kv_role": "kv_producer"},
            {"VLLM_MOONCAKE_BOOTSTRAP_PORT": str(port)},
            PEERS_PYTHON,
        ),
        servers.serve("decode", {**transfer, "kv_role": "kv_consumer"}, {}, PEERS_PYTHON),
    )
    proxy = servers.fixed_proxy(f"{prefill.url},{port}", decode.url, "both-at-once")
    return _running(
        servers,
        *_ready(proxy),
        prefill=(prefill.url,),
        decode=(decode.url,),
        hand_at_once=partial(legs.both_at_once, prefill.url, decode.url, f"http://{HOST}:{port}"),
        timers=partial(vllm_timers.mooncake, prefill.log),
        stops=True,
    )


def _peers_installed() -> None:
    if not PEERS_PYTHON.exists():
        raise SetupFailed(f"{PEERS_PYTHON} is missing; scripts/bench serving makes it")


def _ready(*servers: Server) -> tuple[Server, ...]:
    for server in servers:
        server.wait_ready()
    return servers
