"""The charts of the report: ticks, thinning, places of points by plain rules, and well-formed SVG."""

import re

import numpy as np
import pytest
from test_report import Page

from evaluation_wsdino.report import TEMPLATES
from evaluation_wsdino.report.charts import line_chart, scatter_map, thin, ticks


def drawn(macro, *arguments):
    """What a macro of the charts writes, well formed."""
    text = str(getattr(TEMPLATES.get_template("charts.html").module, macro)(*arguments))
    Page(text)
    return text


def test_ticks_are_round_and_span_the_values():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.87) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    rng = np.random.default_rng(0)
    for low, width in zip(rng.normal(size=200) * 1e3, 10 ** rng.uniform(-6, 6, size=200), strict=True):
        marks = ticks(low, low + width)
        assert marks[0] <= low + 1e-6 * width and marks[-1] >= low + width * (1 - 1e-6) and 3 <= len(marks) <= 9
        assert np.allclose(np.diff(marks), marks[1] - marks[0])
    assert len(ticks(3, 3)) >= 2 and len(ticks(0, 0)) >= 2


def test_thinning_keeps_the_mean_and_drops_what_is_not_a_number():
    values = list(enumerate(np.random.default_rng(0).normal(size=1000)))
    points = thin(values, most=100)
    assert len(points) == 100 and np.mean([y for _, y in points]) == pytest.approx(np.mean([y for _, y in values]))
    assert thin([(1, 1.0), (2, float("nan")), (3, None)]) == [(1, 1.0)] and thin([]) == []


def test_a_line_chart_places_points_by_a_plain_rule():
    chart = line_chart("t", [("a", [(0, 0.0), (10, 1.0)], "#000", True)], share=True)
    assert chart["curves"][0]["places"] == [(56.0, 176.0), (350.0, 10.0)]  # the corners of the plotting area
    assert 'points="56.0,176.0 350.0,10.0 "' in drawn("line_chart", chart)
    assert line_chart("t", [("a", [], "#000", False)]) is None


def test_a_line_chart_names_the_place_of_a_single_point_and_fits_its_numbers():
    text = drawn("line_chart", line_chart("Learning rate", [("dna", [(12, 0.00015)], "#000", False)]))
    assert ">12</text>" in text and "<circle" in text
    label = re.search(r'<text class="tick" x="(\d+)" y="[^"]+" text-anchor="end">([\d.]{7})</text>', text)
    assert float(label[1]) >= 6.9 * 7  # eleven pixels high, a digit is 6.9 wide in the widest of common fonts


def test_ticks_of_a_narrow_range_are_told_apart():
    labels = [label for _, label in line_chart("t", [("a", [(0, 11.0), (1, 11.1)], "#000", False)])["y_ticks"]]
    assert [float(label) for label in labels] == ticks(11.0, 11.1, 4) and len(set(labels)) == len(labels)


def test_small_charts_are_well_formed():
    drawn("bars", [("a<b", [(0.5, "1/2", "#000"), (0, "left out", "#111")])])
    table = Page(drawn("confusion_table", ["a", "b"], [[2, 1], [0, 0]], "c"))
    assert "2" in table.texts and "1" in table.texts
    point = {"x": 0.0, "y": 0.0, "label": "p", "moa": "a"}
    assert "translate(310.0,310.0)" in drawn("scatter_map", scatter_map([point], [("moa", "mechanism", ["a"])]))
