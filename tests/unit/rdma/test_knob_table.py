"""docs/rdma.md names every knob, with the default and the range that the code has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from mooncake_engine.config import RdmaConfig

from mooncake_connector import config_fields, config_tent, env_table
from mooncake_connector.config import load_config

PAGE = Path(__file__).parents[3] / "docs" / "rdma.md"
FIELDS = config_fields.fields_of(RdmaConfig)
#: A text that the variable takes, where "1" is none.
TEXTS = {
    "MC_VERBS_BINDING": "pyverbs",
    "MC_ENDPOINT_STORE_TYPE": "FIFO",
    "MC_MTU": "512",
    "MC_SLICE_SIZE": "8192",
    "MC_MAX_MR_SIZE": "8192",
    "MC_MIN_RPC_PORT": "14000",
    "MC_MAX_RPC_PORT": "18000",
    "MC_MAX_CQE_PER_CTX": "8192",
}
SEEN = {"wire", "query", "counters", "argument", "run", "suite", "unit"}


class Row(NamedTuple):
    field: str
    variables: list[str]
    keys: list[str]
    default: str
    range: str
    effect: str
    seen: str


def rows() -> list[Row]:
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[0].startswith("`"):
            names = [re.findall(r"`([^`]+)`", cell) for cell in cells[:3]]
            found.append(Row(names[0][0], names[1], names[2], *cells[3:]))
    return found


def shown(default: object) -> str:
    """A default as the table writes it."""
    match default:
        case bool():
            return str(default).lower()
        case float():
            return f"{default:g}"
        case "" | ():
            return "none"
        case _:
            return str(default)


ROWS = rows()


def test_the_table_has_a_row_for_every_field_in_order_and_no_other() -> None:
    assert [row.field for row in ROWS] == list(FIELDS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.field)
def test_a_row_tells_the_default_and_the_range_of_its_field(row: Row) -> None:
    assert row.default == shown(FIELDS[row.field].default)
    said = config_fields.describe(FIELDS[row.field].type)
    said = re.sub(r"^(an integer|a number) from |^one of |'", "", said)
    plain = {"true or false": "true, false", "a list of strings": "list", "a string": "text"}
    assert row.range == plain.get(said, said)
    assert row.effect
    assert set(row.seen.split(", ")) <= SEEN


@pytest.mark.parametrize(
    ("variable", "field"), [(name, row.field) for row in ROWS for name in row.variables]
)
def test_a_rows_variable_sets_its_field(variable: str, field: str) -> None:
    origins = load_config(environ={variable: TEXTS.get(variable, "1")}).origins
    assert origins[f"engine.rdma.{field}"] == variable


def test_every_variable_and_every_key_of_the_transport_has_its_row() -> None:
    variables = {name for row in ROWS for name in row.variables}
    assert variables >= {variable.name for variable in env_table.RDMA}
    keys = {key for row in ROWS for key in row.keys}
    assert keys == {
        key.removeprefix("transports/rdma/")
        for key in config_tent.KEYS
        if key.startswith(("transports/rdma/", "topology/"))
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.field)
def test_where_two_variables_are_given_the_first_wins(row: Row) -> None:
    texts = {name: TEXTS.get(name, "1") for name in row.variables}
    if texts:
        assert load_config(environ=texts).origins[f"engine.rdma.{row.field}"] == row.variables[0]
