from __future__ import annotations

from mooncake_connector.bench.report import Figures, Line, columns, heading, text


def line(block: int = 4096, variant: str = "ours", **more: object) -> Line:
    figures = Figures(
        bandwidth=1.23456,
        between=20e-6,
        mean=10e-6,
        p50=9e-6,
        p99=30e-6,
        p999=40e-6,
        cpu_initiator=0.25,
        cpu_target=None,
        of_limit=0.956,
        valid=5,
        rounds=6,
    )
    return Line(
        **{  # type: ignore[arg-type]  # a test's shorthand
            "workload": "sweep",
            "op": "read",
            "block": block,
            "batch": 16,
            "threads": 1,
            "variant": variant,
            "figures": figures,
            **more,
        }
    )


def test_the_columns_are_tebenchs_then_ours() -> None:
    shown = columns([line(), line(8192)], peers=False)
    assert heading(shown).split("  ")[0] == "BlkSize (B)"
    assert [column.title for column in shown] == [
        *["BlkSize (B)", "Batch", "BW (GB/s)", "Avg Lat (us)", "Avg Tx (us)", "P99 Tx (us)"],
        *["P999 Tx (us)", "% of limit", "CPU s/GB", "valid"],
    ]


def test_every_figure_stands_under_its_heading() -> None:
    shown = columns([line()], peers=True)
    cells, start = {}, 0
    for column in shown:
        cells[column.title] = text(line(), shown)[start : start + column.width].strip()
        start += column.width + 2
    assert cells == {
        "BlkSize (B)": "4096",
        "Batch": "16",
        "BW (GB/s)": "1.235",
        "Avg Lat (us)": "20.0",
        "Avg Tx (us)": "10.0",
        "P99 Tx (us)": "30.0",
        "P999 Tx (us)": "40.0",
        "% of limit": "96",
        "ours / it": "",
        "CPU s/GB": "0.25 + ?",
        "valid": "5 / 6",
    }


def test_what_differs_between_lines_has_a_column() -> None:
    shown = columns([line(), line(variant="C sockets", threads=4, op="write")], peers=False)
    assert [column.title for column in shown][:3] == ["Variant", "Op", "Threads"]


def test_a_line_without_figures_says_why() -> None:
    skipped = line(variant="", figures=None, note="skipped: needs 2 of 1 bytes")
    assert text(skipped, columns([skipped], peers=False)).endswith("skipped: needs 2 of 1 bytes")
