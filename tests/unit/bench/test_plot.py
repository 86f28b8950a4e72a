from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest
from mooncake_engine.errors import ConfigError

from mooncake_connector.bench import plot
from mooncake_connector.bench.report import Figures, Line

if TYPE_CHECKING:
    from pathlib import Path

LINES = [
    Line(
        workload="sweep",
        op="read",
        block=block,
        batch=1,
        threads=1,
        variant=variant,
        is_limit=variant != "ours",
        figures=Figures(
            bandwidth=block / 1e4,
            between=1e-5,
            mean=1e-5,
            p50=1e-5,
            p99=3e-5,
            p999=4e-5,
            cpu_initiator=0.1,
            cpu_target=0.1,
            valid=1,
            rounds=1,
        ),
    )
    for block in (4096, 8192, 16384)
    for variant in ("ours", "C <limit>")
]


@pytest.fixture(scope="module", autouse=True)
def fonts() -> None:
    """Matplotlib keeps the font files open that it has used once."""
    plot._figure(LINES, "read").savefig(io.BytesIO())


def test_a_page_is_whole_in_itself_and_has_the_table(tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    plot.plot(LINES, page, "read & more")
    text = page.read_text()
    start, end = text.index("<svg"), text.index("</svg>") + len("</svg>")
    assert len(list(ET.fromstring(text[start:end]).iter())) > 50
    assert "read &amp; more" in text
    assert "C &lt;limit&gt;" in text[end:]
    assert "BlkSize (B)" in text[end:]
    assert 'src="' not in text
    assert "<script" not in text


def test_a_picture_is_a_png(tmp_path: Path) -> None:
    picture = tmp_path / "sweep.png"
    plot.plot(LINES, picture, "read")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_each_variant_has_a_curve_over_the_block_sizes_and_the_limit_one() -> None:
    figure = plot._figure(LINES, "read")
    bandwidth, latency = figure.axes
    drawn = {str(line.get_label()): list(line.get_xdata()) for line in bandwidth.lines}
    assert drawn == {"ours": [4096, 8192, 16384], "limit": [4096, 8192, 16384]}
    assert [tick.get_text() for tick in latency.get_xticklabels()] == ["4K", "8K", "16K"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*none/a\.png"):
        plot.plot(LINES, tmp_path / "none" / "a.png", "read")


def test_without_matplotlib_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plot.check_can_plot()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'mooncake-connector\[bench\]'"):
        plot.check_can_plot()
