"""A JSON object of settings, from a file or from a text. Strict: nothing in it is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from mooncake_engine.errors import ConfigError


def read(path: str, remedy: str = "") -> dict[str, Any]:
    """The object in the file `path`.

    Raises:
        ConfigError: It cannot be read (`remedy` says what to try), or is no such object.
    """
    try:
        text = Path(path).read_bytes().decode()
    except OSError as exc:
        raise ConfigError(
            f"cannot read the configuration file {path}: {exc.strerror}{remedy}"
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 (byte {exc.start})") from exc
    return parse(text, path)


def parse(text: str, source: str) -> dict[str, Any]:
    """The object that `text` is; `source` says in errors where it stands."""
    try:
        tree = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as exc:
        hint = ""
        if text[exc.pos :].lstrip().startswith(("//", "/*", "#")):
            hint = "; JSON has no comments, remove them"
        raise ConfigError(
            f"{source}, line {exc.lineno}, column {exc.colno}: {exc.msg}{hint}"
        ) from exc
    except ConfigError as exc:
        raise ConfigError(f"{source}: {exc}") from exc
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} holds {tree!r:.60}; expected one object of settings")
    return tree


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"{key!r} is given twice; keep one")
        found[key] = value
    return found


def _constant(text: str) -> NoReturn:
    raise ConfigError(f"{text} is not a JSON number")
