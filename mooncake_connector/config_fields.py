"""Settings as a flat table: dotted name -> type and default. Pure; knows no setting by name."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
from mooncake_engine.errors import ConfigError
from msgspec import inspect

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    S = TypeVar("S", bound=msgspec.Struct)


class Field(NamedTuple):
    """One setting."""

    type: Any  # an annotation, with its msgspec.Meta
    default: object


def fields_of(struct: type[msgspec.Struct], prefix: str = "") -> dict[str, Field]:
    """Every setting of `struct` and of the Structs in it, by dotted name, in order."""
    table: dict[str, Field] = {}
    for field in msgspec.structs.fields(struct):
        name = prefix + field.name
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            table |= fields_of(field.type, f"{name}.")
        else:
            table[name] = Field(field.type, field.default)
    return table


def flatten(tree: Mapping[str, object], fields: Mapping[str, Field], source: str) -> dict[str, Any]:
    """Nested or dotted settings as dotted ones, not checked yet but for their names.

    Raises:
        ConfigError: An unknown name (the nearest right one is named), a section that is no
            object, or two spellings of one setting that differ.
    """
    flat: dict[str, Any] = {}
    _flatten(tree, "", fields, source, flat)
    return flat


def _flatten(
    tree: Mapping[str, object],
    prefix: str,
    fields: Mapping[str, Field],
    source: str,
    flat: dict[str, Any],
) -> None:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in fields:
            put(flat, name, value, source)
        elif any(known.startswith(f"{name}.") for known in fields):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {name} is {value!r}; expected an object of settings")
            _flatten(value, f"{name}.", fields, source, flat)
        else:
            raise ConfigError(f"{source}: unknown setting {name!r}{nearest(name, fields)}")


def put(flat: dict[str, Any], name: str, value: object, source: str) -> None:
    """Set `name`; refuse a second value that differs from the first."""
    if name in flat and flat[name] != value:
        raise ConfigError(
            f"{source}: {name} is given twice, as {flat[name]!r} and as {value!r}; keep one"
        )
    flat[name] = value


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` for the known name most like `name`, or nothing.

    The last part counts too: `lanes_per_pear` means `engine.tcp.lanes_per_peer`.
    """
    names = [name.split(".") for name in known]
    # Sections are names too: "engin" means "engine".
    whole = list(dict.fromkeys(".".join(n[:end]) for n in names for end in range(1, len(n) + 1)))
    last = {other.rpartition(".")[2]: other for other in reversed(whole)}
    found = difflib.get_close_matches(name, whole, 1, 0.75)
    if not found:
        ends = difflib.get_close_matches(name.rpartition(".")[2], last, 1, 0.75)
        found = [last[end] for end in ends]
    return f"; did you mean {found[0]!r}?" if found else ""


def check(name: str, value: object, kind: Any, source: str) -> Any:  # noqa: ANN401  # any setting
    """`value` as `kind`; `ConfigError` naming setting, value, source and what is right."""
    try:
        converted = msgspec.convert(value, kind)
    except msgspec.ValidationError:
        converted = math.nan
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ConfigError(f"{name} is {value!r} ({source}); expected {describe(kind)}")
    return converted


def check_text(name: str, text: str, kind: Any, source: str) -> Any:  # noqa: ANN401  # any setting
    """Like `check`, for a value that is a text: numbers and booleans are read from it."""
    value: object = text.strip()
    info = inspect.type_info(kind)
    if isinstance(info, inspect.LiteralType):
        value = next((v for v in info.values if str(v).lower() == text.strip().lower()), text)
    elif isinstance(info, inspect.BoolType):
        value = _BOOLEANS.get(text.strip().lower(), text)
    elif isinstance(info, inspect.IntType | inspect.FloatType):
        number = int if isinstance(info, inspect.IntType) else float
        try:
            value = number(text)
        except ValueError:
            value = text
    return check(name, value, kind, source)


_BOOLEANS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(
    ("0", "false", "no", "off"), False
)


def build(struct: type[S], values: Mapping[str, object], prefix: str = "") -> S:
    """The Struct that holds `values`, which names every setting of it."""
    parts: dict[str, object] = {}
    for field in msgspec.structs.fields(struct):
        name = prefix + field.name
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            parts[field.name] = build(field.type, values, f"{name}.")
        else:
            parts[field.name] = values[name]
    return struct(**parts)


def values_of(struct: msgspec.Struct, prefix: str = "") -> dict[str, object]:
    """The settings that `struct` holds, by dotted name."""
    values: dict[str, object] = {}
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if isinstance(value, msgspec.Struct):
            values |= values_of(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def show(value: object) -> str:
    """A setting as it is written in JSON."""
    return msgspec.json.encode(value).decode()


def describe(kind: Any) -> str:  # noqa: ANN401  # an annotation
    """What a value of this type looks like, for an error message."""
    match inspect.type_info(kind):
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType() | inspect.FloatType() as info:
            noun = "an integer" if isinstance(info, inspect.IntType) else "a number"
            low = "" if info.ge is None else f"{info.ge}"
            low = low if info.gt is None else f"more than {info.gt}"
            high = "" if info.le is None else f"{info.le}"
            if low and high:
                return f"{noun} from {low} to {high}"
            return f"{noun} of at least {low}" if low else noun
        case inspect.LiteralType(values=values):
            return "one of " + ", ".join(repr(value) for value in values)
        case inspect.VarTupleType(item_type=inspect.StrType()):
            return "a list of strings"
        case inspect.DictType():
            return "an object"
        case inspect.StrType(pattern=str(pattern)):
            return f"a string like {pattern}"
        case _:
            return "a string"
