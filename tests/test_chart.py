"""Line charts as SVG."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from srpo_jax.report.chart import COLOURS, Line, chart


def test_a_chart_draws_every_line_inside_its_frame():
    svg = chart("a < b", "x", "y", [Line("one", [(0, 1), (5, 9)]), Line("dot", [(2.5, 4)])])
    ElementTree.fromstring(svg)
    assert svg.count("<polyline") == 2 and svg.count("<circle") == 3 and "a &lt; b" in svg
    with pytest.raises(ValueError, match="nothing to draw"):
        chart("t", "x", "y", [Line("none", [])])


def test_lines_beyond_the_colours_and_long_names_stay_apart_and_in_sight():
    names = [f"a name that is rather long, number {i}" for i in range(len(COLOURS) + 12)]
    svg = chart("t", "x", "y", [Line(name, [(0, i), (1, i)]) for i, name in enumerate(names)])
    strokes = re.findall('stroke="([^"]+)" stroke-width="2"( stroke-dasharray)?', svg)
    assert len(set(strokes)) == len(names)
    width, height = map(float, re.search('viewBox="0 0 ([0-9]+) ([0-9]+)"', svg).groups())
    places = re.findall(r'<text x="([0-9.]+)" y="([0-9.]+)" text-anchor="start">a name', svg)
    assert all(float(x) + 6 * len(names[0]) < width and float(y) < height for x, y in places)


def test_inside_a_page_a_chart_has_no_ground_of_its_own():
    lines = [Line("one", [(0, 1), (5, 9)])]
    assert "#fff" in chart("t", "x", "y", lines)
    assert "#fff" not in chart("t", "x", "y", lines, inline=True)
