"""`mooncake-connector`: the configuration, the NICs, an etcd and a proxy from the command line."""

from __future__ import annotations

import enum
import logging
import os
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import Annotated

import typer
from mooncake_engine.errors import ConfigError, EngineError
from rich.console import Console
from rich.table import Table

from mooncake_connector import config_fields
from mooncake_connector.bench.command import bench_app
from mooncake_connector.config import load_config
from mooncake_connector.errors import ConnectorError
from mooncake_connector.etcd_server import etcd_command
from mooncake_connector.topology_cli import show_topology

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
config_app = typer.Typer(no_args_is_help=True, help="Show, check and write mooncake.json.")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
app.command("topology")(show_topology)


class _Style(enum.StrEnum):
    PREFILL_FIRST = "prefill-first"
    BOTH_AT_ONCE = "both-at-once"


_HIDDEN = "engine.metadata.password"


def main() -> None:
    """Entry point: what the user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except (ConnectorError, EngineError) as exc:
        print(f"mooncake-connector: {exc}", file=sys.stderr)
        sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("mooncake-connector"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[  # the callback has acted
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Prefill/decode KV cache connector."""


@config_app.command("check")
def check(
    file: Annotated[Path | None, typer.Argument(help="Default: $MOONCAKE_CONFIG_PATH.")] = None,
) -> None:
    """Show every effective setting and where it came from; exit 2 if one cannot be used."""
    loaded = load_config(str(file) if file else None)
    table = Table("setting", "value", "from")
    for column in table.columns:
        column.overflow = "fold"
    for name, value in config_fields.values_of(loaded.config).items():
        shown = "***" if name == _HIDDEN and value else config_fields.show(value)
        origin = loaded.origins[name]
        table.add_row(name, shown, origin, style="dim" if origin == "default" else "")
    # Piped into a file or a pager there is no width to respect: never cut a value.
    console = Console(markup=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for notice in loaded.notices:
        print(notice)


@config_app.command("init")
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("mooncake.json"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a mooncake.json that holds every setting at its default."""
    text = resources.files("mooncake_connector").joinpath("data/mooncake.json").read_text()
    try:
        with path.open("w" if force else "x") as file:
            file.write(text)
    except FileExistsError as exc:
        raise ConfigError(f"{path} exists; --force overwrites it") from exc
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc
    print(f"wrote {path}")


@app.command("etcd")
def etcd(
    data_dir: Annotated[Path, typer.Option(help="Folder for the data; made when missing.")],
    host: Annotated[str, typer.Option(help="Address to listen on for clients.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port for clients.")] = 2379,
    peer_port: Annotated[int, typer.Option(min=1, max=65535, help="Unused, but needed.")] = 2380,
) -> None:
    """Run an etcd in the foreground; this process becomes it, so signals reach it."""
    command = etcd_command(data_dir, host, port, peer_port)
    print(f"etcd for clients at {host}:{port}, data in {data_dir}", file=sys.stderr, flush=True)
    os.execv(command[0], command)  # noqa: S606  # a list of arguments, no shell


@app.command("proxy")
def proxy(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any.")] = 8000,
    prefill: Annotated[
        list[str] | None, typer.Option(help="Base URL of a prefill server; may be repeated.")
    ] = None,
    decode: Annotated[
        list[str] | None, typer.Option(help="Base URL of a decode server; may be repeated.")
    ] = None,
    style: Annotated[_Style, typer.Option(help="Who starts when.")] = _Style.PREFILL_FIRST,
    config: Annotated[
        Path | None,
        typer.Option(help="mooncake.json whose etcd lists the servers; $MOONCAKE_CONFIG_PATH."),
    ] = None,
    allow_overrides: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Serve one OpenAI-compatible address in front of prefill and decode servers."""
    # Here, so that `config check` need not wait for aiohttp and gRPC.
    from mooncake_connector.proxy import ProxyConfig, serve

    loaded = load_config(str(config) if config else None)
    logging.basicConfig(
        level=loaded.config.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
    for notice in loaded.notices:
        logging.getLogger(__name__).info("%s", notice)
    serve(
        ProxyConfig(
            host=host,
            port=port,
            prefill=tuple(prefill or ()),
            decode=tuple(decode or ()),
            style=style.value,
            allow_overrides=allow_overrides,
        ),
        loaded.config.engine.metadata,
    )
