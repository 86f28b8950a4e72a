"""SGLang servers of several ranks without models, as a test sees them: `sglang_child.py` is inside.

A test speaks for what joins the ranks in SGLang: the router, and the collectives in which the
schedulers of one server agree on a request's end.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from harness.servers import free_port
from node_stage import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: No test waits longer for what should come at once; only a broken backend takes so long.
SOON = 30.0
#: Importing SGLang takes 10 s on two idle cores.
IMPORTS_S = 240.0


class Options(msgspec.Struct, kw_only=True):
    """One rank, or a prefill server's bootstrap server."""

    role: str  # prefill, decode or bootstrap
    model: str  # folder of the model's config.json
    config: str  # our settings
    port: int  # --disaggregation-bootstrap-port
    rank: int = 0  # in the order of SGLang's world
    tp: int = 1  # attention's tensor-parallel size
    pp: int = 1
    dp: int = 1  # attention's data-parallel size
    balance: str = "follow_bootstrap_room"
    group_port: int = 0  # where ranks of several stages meet
    mla: bool = False
    layers: int = 2
    page_size: int = 4
    dtype: str = "auto"
    kv_layout: str | None = None
    states: tuple[str, ...] = ()
    seed: int | None = None


class RankError(Exception):
    """A command failed in the rank's process."""


class RankProcess:
    """One forked process; `start` and `finish` let several work at once."""

    def __init__(self, parent: Forks, options: Options) -> None:
        self.options = options
        self._channel = parent.fork(options)
        self._text = b""
        self.pid = int(self._line())

    def start(self, command: str, *args: object, **named: object) -> None:
        self._channel.sendall(json.dumps([command, args, named]).encode() + b"\n")

    def finish(self) -> Any:  # noqa: ANN401 - JSON
        """The answer to the oldest command that was started."""
        reply = json.loads(self._line())
        if "error" in reply:
            raise RankError(f"{reply['error']}\n{reply['trace']}")
        return reply["answer"]

    def ask(self, command: str, *args: object, **named: object) -> Any:  # noqa: ANN401 - JSON
        self.start(command, *args, **named)
        return self.finish()

    def await_status(self, name: str, status: str, timeout: float = SOON) -> list[str]:
        """Wait until a request has this status; all it had so far."""
        seen: list[str] = []

        def there() -> bool:
            seen[:] = self.ask("statuses", name)
            assert seen[-1:] == [status] or seen[-1:] not in (["Failed"], ["Success"]), (
                f"{name} became {seen[-1]}, not {status}: "
                f"{self.ask('fail', name) if seen[-1] == 'Failed' else ''}"
            )
            return seen[-1:] == [status]

        until(there, f"{name} to be {status}", timeout)
        return seen

    def await_read(self) -> None:
        """Wait until a read runs and is stopped by `hold_reads`."""
        until(lambda: self.ask("held"), "a read to run", SOON)

    def kill(self) -> None:
        """Returns when nothing of it is left. Idempotent."""
        if self._channel.fileno() < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ConnectionError):
            while self._channel.recv(65536):
                pass
        self._channel.close()

    def stop(self) -> None:
        """Returns when it has stopped in its tracks."""
        os.kill(self.pid, signal.SIGSTOP)
        stat = Path(f"/proc/{self.pid}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it to stop")

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _line(self) -> bytes:
        while b"\n" not in self._text:
            assert select.select([self._channel], [], [], 2 * SOON)[0], "no answer"
            more = self._channel.recv(65536)
            assert more, "the rank's process has ended"
            self._text += more
        line, _, self._text = self._text.partition(b"\n")
        return line


class Forks:
    """The process that has imported SGLang, from which ranks are forked."""

    def __init__(self, folder: Path) -> None:
        here = Path(__file__).parent
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environ |= {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_HOST_IP": "127.0.0.1"}
        environ |= {"SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0"}
        self._folder = folder
        self._numbers = itertools.count()
        with (folder / "ranks.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(here / "sglang_child.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environ,
            )
        assert self._process.stdout
        ready = select.select([self._process.stdout], [], [], IMPORTS_S)[0]
        if not ready or self._process.stdout.readline() != b"ready\n":
            self.close()
            raise AssertionError((folder / "ranks.log").read_text()[-3000:])

    def fork(self, options: Options) -> socket.socket:
        """A connection to a new rank; it first says its pid."""
        name = str(self._folder / f"{next(self._numbers)}")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind(name)
            listener.listen()
            listener.settimeout(SOON)
            assert self._process.stdin
            line = json.dumps([name, msgspec.to_builtins(options)])
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
            channel, _ = listener.accept()
        channel.settimeout(None)
        return channel

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.kill()
        self._process.wait(SOON)
        self._process.stdout.close()


class Server:
    """All ranks of one server, in the order of SGLang's world: stages, then groups, then shards."""

    def __init__(self, ranks: Sequence[RankProcess], port: int) -> None:
        self.ranks = list(ranks)
        self.address = f"127.0.0.1:{port}"
        self.port = port
        self.bootstrap: RankProcess | None = None

    def each(self, command: str, *args: object, **named: object) -> list[Any]:
        """The same command to all ranks at once; their answers."""
        for rank in self.ranks:
            rank.start(command, *args, **named)
        return [rank.finish() for rank in self.ranks]

    def await_status(self, name: str, status: str, timeout: float = SOON) -> list[list[str]]:
        return [rank.await_status(name, status, timeout) for rank in self.ranks]

    def kill(self) -> None:
        for rank in [*self.ranks, *([self.bootstrap] if self.bootstrap else [])]:
            rank.kill()

    def assert_nothing_is_left(self) -> None:
        """No table has an entry of a request that is over."""

        def empty() -> bool:
            tables = self.each("tables")
            left[:] = [{k: v for k, v in table.items() if v} for table in tables]
            return not any(left)

        left: list[dict[str, int]] = []
        with contextlib.suppress(AssertionError):
            until(empty, "empty tables", 5)
        assert not any(left), f"left behind: {left}"


class Servers:
    """Makes servers; kills them at the end."""

    def __init__(self, forks: Forks, folder: Path) -> None:
        self._forks = forks
        self._folder = folder
        self._made: list[RankProcess] = []

    def make(
        self,
        role: str,
        *,
        port: int = 0,
        settings: dict[str, object] | None = None,
        **options: Any,  # noqa: ANN401 - Options'
    ) -> Server:
        """Start a server; prefill's ranks are registered when this returns."""
        port = port or free_port()
        tp, pp, dp = (options.get(name, 1) for name in ("tp", "pp", "dp"))
        size = tp * pp * dp
        options["layers"] = options.get("layers", 2)
        seed = options.pop("seed", 1 if role == "prefill" else None)
        model = options.pop("model", "tiny")
        how = Options(
            role=role,
            model=str(self._model(model, options["layers"])),
            config=str(self._config(settings or {})),
            port=port,
            group_port=free_port() if pp > 1 else 0,
            **options,
        )
        bootstrap = None
        if role == "prefill":
            bootstrap = self._rank(msgspec.structs.replace(how, role="bootstrap"))
            bootstrap.finish()
        ranks = [
            self._rank(
                msgspec.structs.replace(
                    how, rank=number, seed=None if seed is None else seed + number
                )
            )
            for number in range(size)
        ]
        for rank in ranks:
            rank.finish()
        server = Server(ranks, port)
        server.bootstrap = bootstrap
        return server

    def close(self) -> None:
        for rank in self._made:
            rank.kill()

    def _rank(self, options: Options) -> RankProcess:
        self._made.append(RankProcess(self._forks, options))
        return self._made[-1]

    def _model(self, name: str, layers: int) -> Path:
        """What SGLang reads of a model when it loads none of its weights."""
        folder = self._folder / f"{name}-{layers}"
        folder.mkdir(exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 64 if name == "tiny" else 128,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "vocab_size": 64,
            "max_position_embeddings": 2048,
            "torch_dtype": "float32",
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def _config(self, settings: dict[str, object]) -> Path:
        engine = {
            "protocol": "tcp",
            "host": "127.0.0.1",
            "connect_timeout_s": 5.0,
            "tcp": {"min_port": 0, "max_port": 0},
            "metadata": {"p2p_min_port": 0, "p2p_max_port": 0},
        }
        path = self._folder / f"mooncake-{abs(hash(json.dumps(settings)))}.json"
        path.write_text(json.dumps({"testing": True, "engine": engine} | settings))
        return path


@contextlib.contextmanager
def servers(forks: Forks, folder: Path) -> Iterator[Servers]:
    made = Servers(forks, folder)
    try:
        yield made
    finally:
        made.close()
