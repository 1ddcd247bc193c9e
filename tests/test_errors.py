"""The pieces that messages share."""

import re
import sys
import warnings

import pytest

from attrib_zoo.errors import aligned, html_table, warn


def test_columns_of_text():
    assert aligned([["a", "bbb", "c"], ["dd", "e", ""]]) == ["a   bbb  c", "dd  e"]


def test_a_header_is_underlined_and_numbers_stand_to_the_right():
    assert aligned([["", "x"], ["long", "1.5"]], rule=True, right=True) == ["        x", "----  ---", "long  1.5"]


def test_a_line_of_another_length_is_a_mistake():
    with pytest.raises(ValueError, match="shorter"):
        aligned([["a", "b"], ["c"]])


def test_a_warning_points_outside_the_library_however_deep_it_is_raised():
    space = {"__name__": "attrib_zoo.somewhere", "warn": warn}
    exec("def inner(): warn('careful', RuntimeWarning)\ndef outer(): inner()", space)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        space["outer"]()
        line = sys._getframe().f_lineno - 1
    (warning,) = caught
    assert (warning.filename, warning.lineno, warning.category) == (__file__, line, RuntimeWarning)


def test_tables_for_notebooks_are_escaped_and_have_their_heads():
    cells = [("a<b", "1"), ("c", "2 & 3")]
    first = html_table(cells, title="<t>")
    assert re.findall(r"<(t[hd]) [^>]*>([^<]*)</", first) == [
        ("th", "a&lt;b"),
        ("td", "1"),
        ("th", "c"),
        ("td", "2 &amp; 3"),
    ]
    assert first.startswith("<b>&lt;t&gt;</b>")
    assert re.findall(r"<(t[hd]) ", html_table(cells, head=True)) == ["th", "th", "td", "td"]
