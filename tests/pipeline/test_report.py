"""Reports: strict JSON, plain text, one safe HTML file; charts."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.calibrate.errors import ThresholdError, UsageError, WriteError
from qpipe.pipeline import charts, report
from qpipe.pipeline.html import to_html
from qpipe.pipeline.report_file import save_report

EVIL = "<script>alert(1)</script>"
ESCAPE = "\x1b]0;evil\x07\x9bm"


def _report(rows: int = 2, **changes: object) -> report.Report:
    columns = (
        report.Column(key="tensor", title="tensor"),
        report.Column(key="sqnr_db", title="SQNR dB", kind="decibel"),
        report.Column(key="top1", title="same top-1", kind="share"),
    )
    table = report.Table(
        name="outputs",
        title="Outputs",
        columns=columns,
        rows=tuple({"tensor": f"t{i}", "sqnr_db": 30.0 + i, "top1": 0.984} for i in range(rows)),
    )
    fields = {"kind": "validate", "title": "a.onnx against b.onnx", "tables": (table,), **changes}
    return report.Report(**fields)  # type: ignore[arg-type]


def _rows(*names: str) -> tuple[report.Table, ...]:
    column = report.Column(key="tensor", title="tensor")
    return (report.Table(name="t", title="T", columns=(column,), rows=tuple({"tensor": n} for n in names)),)


def test_json_is_strict_whatever_the_numbers() -> None:
    totals = {"worst": math.inf, "best": -math.inf, "odd": math.nan, "n": np.int64(3), "f": np.float32(0.5)}
    data = json.loads(report.to_json(_report(totals=totals)))
    assert data["totals"] == {"worst": "inf", "best": "-inf", "odd": "nan", "n": 3, "f": 0.5}
    assert data["schema_version"] == 1
    assert data["kind"] == "validate"
    assert data["tables"]["outputs"][1] == {"tensor": "t1", "sqnr_db": 31.0, "top1": 0.984}


def test_thresholds_decide() -> None:
    kept = report.Verdict(name="min_cosine", subject="y, exact", value=0.99, limit=0.9, passed=True)
    missed = report.Verdict(name="min_sqnr_db", subject="y, exact", value=20.0, limit=30.0, passed=False)
    _report(verdicts=(kept,)).require()
    with pytest.raises(ThresholdError) as caught:
        _report(verdicts=(kept, missed)).require()
    assert caught.value.exit_code == 1
    assert "1 of 2" in str(caught.value)
    assert "sqnr_db 20" in str(caught.value)
    assert not _report(verdicts=(kept, missed)).passed


def test_text_shows_names_as_they_are_and_obeys_none_of_them() -> None:
    text = report.to_text(_report(tables=_rows("[red]a[/red]", ESCAPE), title=ESCAPE, notes=(ESCAPE,)))
    assert "[red]a[/red]" in text
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\x9b" not in text
    assert r"\x1b]0;evil\x07\x9bm" in text


def test_text_fits_the_width() -> None:
    long = "encoder/" * 40
    lines = report.to_text(_report(tables=_rows(long)), width=60).splitlines()
    assert max(map(len, lines)) <= 60
    assert "".join(line.strip() for line in lines).count("encoder/") == 40


@pytest.mark.parametrize(
    ("value", "kind", "shown"),
    [
        (None, "number", "-"),
        (0.98765, "share", "98.77 %"),
        (0.5, "ratio", "0.50x"),
        (11_300_000, "bytes", "11.3 MB"),
        (999, "bytes", "999 B"),
        (31.25, "decibel", "31.2"),
        (math.inf, "decibel", "∞"),
        (math.nan, "number", "NaN"),
        (0.99987, "number", "0.999870"),
        (1.2e-5, "number", "1.2e-05"),
        (1234567, "count", "1 234 567"),
        ("MatMul", "number", "MatMul"),
    ],
)
def test_values_read_as_their_column_says(value: object, kind: str, shown: str) -> None:
    assert report.show(value, kind) == shown


class _Page(HTMLParser):
    """Collects tags, texts and everything that would reach for the network."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.outside += [str(values[name]) for name in ("src", "href", "data", "srcset") if name in values]

    def handle_data(self, data: str) -> None:
        self.text += data


def _page(given_report: report.Report) -> _Page:
    page = _Page()
    page.feed(to_html(given_report))
    return page


def test_html_escapes_names_everywhere() -> None:
    chart = report.Chart(title=EVIL, caption=EVIL, svg=charts.histogram_svg([0, 1, 2], [3, 4], {EVIL: (0, 1)}))
    verdict = report.Verdict(name="min_cosine", subject=EVIL, value=1.0, limit=0.9, passed=True)
    evil = _report(
        title=EVIL,
        tables=_rows(EVIL, ESCAPE),
        charts=(chart,),
        notes=(EVIL,),
        verdicts=(verdict,),
        totals={EVIL: EVIL},
        environment={EVIL: EVIL},
        recipe={EVIL: ESCAPE},
    )
    page = _page(evil)
    assert page.tags.count("script") == 1
    assert page.text.count("alert(1)") >= 8
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", to_html(evil))


def test_html_is_one_file_that_asks_nobody() -> None:
    page = _page(_report(charts=(report.Chart(title="c", svg=charts.histogram_svg([0, 1], [1])),)))
    assert page.outside == []
    assert "link" not in page.tags
    html = to_html(_report())
    assert "default-src 'none'" in html
    assert "@import" not in html


def test_html_of_500_tensors_stays_below_2_megabytes() -> None:
    rng = np.random.default_rng(0)
    names = [f"/encoder/layer.{i}/attention/self/query/MatMul_output_0" for i in range(500)]
    pictures = []
    for name in names:
        counts, edges = np.histogram(rng.standard_t(3, 5000), bins=400)
        ranges = {
            m: (float(edges[i]), float(edges[-i])) for i, m in enumerate(("minmax", "percentile", "mse", "kl"), 2)
        }
        pictures.append(report.Chart(title=name, svg=charts.histogram_svg(edges, counts, ranges)))
    columns = tuple(report.Column(key=k, title=k, kind="number") for k in ("lo", "hi", "p9999", "cosine", "sqnr"))
    rows = tuple({"tensor": n, **{c.key: float(rng.normal()) for c in columns}} for n in names)
    table = report.Table(name="t", title="T", columns=(report.Column(key="tensor", title="t"), *columns), rows=rows)
    html = to_html(_report(tables=(table,), charts=tuple(pictures)))
    assert len(html.encode()) < 2_000_000


def test_every_form_is_saved_and_none_is_overwritten(tmp_path: Path) -> None:
    for name in ("r.json", "r.html", "r.txt"):
        path = tmp_path / name
        save_report(_report(), path)
        before = path.read_bytes()
        assert b"a.onnx against b.onnx" in before
        with pytest.raises(WriteError):
            save_report(_report(title="other"), path)
        assert path.read_bytes() == before
        save_report(_report(title="other"), path, force=True)
        assert b"other" in path.read_bytes()
    with pytest.raises(UsageError):
        save_report(_report(), tmp_path / "r.pdf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.json", "r.txt"]


def test_a_table_is_found_by_name() -> None:
    assert report.to_text(_report(rows=0)).strip() == "a.onnx against b.onnx"
    assert len(_report().table("outputs").rows) == 2
    with pytest.raises(KeyError):
        _report().table("none")


def _bar_heights(svg: str) -> list[float]:
    """Return the height of every bar, read back from the outline."""
    path = next(e.attrib["d"] for e in ET.fromstring(svg).iter() if e.attrib.get("class") == "bar")
    level, heights = 0, []
    for command, number in re.findall(r"([hv])(-?\d+)", path):
        if command == "v":
            level -= int(number)
        else:
            heights += [level] * (int(number) // charts.BAR_WIDTH)
    return heights


def test_bars_show_the_logarithm_of_the_counts() -> None:
    heights = _bar_heights(charts.histogram_svg(np.arange(97.0), [0] * 95 + [999]))
    assert heights[:95] == [0] * 95
    assert heights[95] == charts.PLOT
    third = _bar_heights(charts.histogram_svg(np.arange(97.0), [9] * 95 + [999]))
    assert set(third[:95]) == {round(charts.PLOT / 3)}


def test_ranges_stand_where_their_limits_are() -> None:
    svg = charts.histogram_svg(np.linspace(-4, 4, 97), np.ones(96), {"mse": (-2.0, 9.0)})
    bracket = re.search(r'd="M(\d+) \d+V\d+H(\d+)v4"', svg)
    assert bracket is not None
    quarter = charts.LEFT + charts.BARS * charts.BAR_WIDTH // 4
    assert int(bracket[1]) == quarter
    assert int(bracket[2]) == charts.WIDTH - charts.RIGHT  # beyond the data: drawn at the edge, told in the title
    assert "-2 to 9" in svg


def test_middles_do_as_well_as_borders() -> None:
    middles, counts = np.array([0.5, 1.5, 2.5]), np.array([1.0, 2.0, 3.0])
    ET.fromstring(charts.histogram_svg(middles, counts))
    with pytest.raises(ValueError, match="edges"):
        charts.histogram_svg([0, 1, 2, 3, 4], [1, 2])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 10**12), min_size=1, max_size=300),
    st.floats(-1e30, 1e30),
    st.floats(0, 1e30),
)
def test_any_histogram_draws_and_keeps_its_counts(counts: list[int], lo: float, width: float) -> None:
    edges = np.linspace(lo, lo + width, len(counts) + 1)
    svg = charts.histogram_svg(edges, counts, {"r": (lo, lo + width / 2)})
    ET.fromstring(svg)
    assert "nan" not in svg
    assert len(_bar_heights(svg)) == charts.BARS
    _, again = charts.rebin(edges, np.array(counts, float), charts.BARS)
    assert again.sum() == pytest.approx(sum(counts), rel=1e-9)


def test_horizontal_bars_are_as_long_as_their_values() -> None:
    svg = charts.bars_svg(["a", EVIL, "c"], [1.0, 2.0, math.nan])
    tree = ET.fromstring(svg)
    widths = [int(e.attrib["width"]) for e in tree.iter() if e.tag.endswith("rect")]
    assert widths[0] * 2 == pytest.approx(widths[1], abs=1)
    assert widths[2] == 0


def test_long_names_leave_out_what_they_share() -> None:
    names = [f"model.encoder.layers.{i}.attention.self.query/MatMul_output_0" for i in range(3)]
    tree = ET.fromstring(charts.bars_svg([*names, "short"], [1.0, 2.0, 3.0, 4.0]))
    shown = [e.text for e in tree.iter() if e.attrib.get("text-anchor") == "end"]
    assert shown == [*(f"…{i}.attention.self.…ery/MatMul_output_0" for i in range(3)), "short"]
