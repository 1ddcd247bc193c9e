"""Means with intervals, paired differences, every format, the plots and the page."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import pytest
import strategies as zoo
import torch
from benchmark_cases import CHEAP, IMAGES, Batches, brightness, by_hand
from hypothesis import given, settings
from hypothesis import strategies as st

from attrib_zoo import GradCAM
from attrib_zoo.benchmark import FAMILIES, Measure, evaluate, write_report
from attrib_zoo.benchmark.estimates import Estimate, estimate
from attrib_zoo.benchmark.markup import parts
from attrib_zoo.errors import DataError, OptionError, shown

NAN = math.nan
FOUR = {"Grad_CAM & co": [0.1, 0.4, 0.2, 0.9], "B": [0.2, NAN, 0.4, 0.6], "none": [NAN] * 4}
AREA = Measure("area", lambda asked: asked.clean, points=(0.0, 0.5, 1.0), area=True)
LOW = Measure("AD(50)", lambda asked: asked.clean, lower=True)


# ---------------------------------------------------------------------- intervals


def test_the_interval_is_that_of_all_resamples():
    """Resampled means of four values of which one is 1 are binomial: P(0) = .32, P(2) = .21, P(3) = .05."""
    found = estimate(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert (found.mean, found.low, found.high, found.images) == (0.25, 0.0, 0.75, 4)
    two = estimate(torch.tensor([3.0, 5.0]))
    assert (two.mean, two.low, two.high) == (4, 3, 5)


def test_the_interval_of_many_images_is_the_normal_one():
    values = zoo.normal(1000, seed=3) * 7 + 20
    found = estimate(values)
    half = 1.96 * float(values.std(correction=0)) / 1000**0.5
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-12)
    assert found.mean - found.low == pytest.approx(half, rel=0.08)
    assert found.high - found.mean == pytest.approx(half, rel=0.08)


def test_only_finite_values_count():
    found = estimate(torch.tensor([1.0, NAN, 3.0, math.inf]))
    assert (found.mean, found.low, found.high, found.images) == (2, 1, 3, 2)
    one = estimate(torch.tensor([NAN, 3.0]))
    assert (one.mean, one.images, math.isnan(one.low), math.isnan(one.high)) == (3, 1, True, True)
    none = estimate(torch.tensor([NAN]))
    assert (math.isnan(none.mean), none.images) == (True, 0)


@given(st.integers(2, 12), zoo.SEEDS, st.floats(-5, 5), st.floats(0.1, 3))
@settings(max_examples=15)
def test_intervals_move_with_the_values(count, seed, shift, scale):
    values = zoo.normal(count, seed=seed)
    one, two = estimate(values), estimate(values * scale + shift)
    for name in ("mean", "low", "high"):
        assert getattr(two, name) == pytest.approx(getattr(one, name) * scale + shift, abs=1e-9)
    assert one.low <= one.mean <= one.high
    before = torch.random.get_rng_state()
    assert estimate(values) == one
    assert torch.equal(torch.random.get_rng_state(), before)


def test_estimates_in_words():
    found = Estimate(44.481, 40.1, 48.906, 9)
    assert found.text() == "44.48 [40.10, 48.91]"
    assert found.short(1) == "44.5 ±4.4"
    assert Estimate(1.5, NAN, NAN, 1).text() == Estimate(1.5, NAN, NAN, 1).short() == "1.50"
    assert Estimate(NAN, NAN, NAN, 0).text() == Estimate(NAN, NAN, NAN, 0).short() == "–"


# ---------------------------------------------------------------------- differences


def test_differences_are_paired():
    """Two methods whose intervals overlap by far, though one is better by 0.1 on every image."""
    values = [float(v) for v in zoo.normal(30, seed=1)]
    table = by_hand({"a": values, "b": [v + 0.1 for v in values], "c": values[::-1]})
    found = table.difference("b", "a", "score")
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert table.estimate("a", "score").high > table.estimate("b", "score").low
    noise = table.difference("c", "a", "score")
    assert noise.mean == pytest.approx(0, abs=1e-12)
    assert noise.low < 0 < noise.high
    text = table.differences()
    assert [line.split("|")[1].strip() for line in text.splitlines()] == ["minus a", "-" * 9, "b", "c"]
    assert "0.1000 [0.1000, 0.1000]*" in text
    assert text.count("*") == 1
    assert "-0.1000 [-0.1000, -0.1000]*" in table.differences("b")


def test_differences_leave_out_what_one_of_both_lacks():
    table = by_hand({"a": [1.0, 2.0, NAN, 4.0], "b": [0.0, NAN, 1.0, 0.0]})
    assert table.difference("a", "b", "score").images == 2
    assert table.difference("a", "b", "score").mean == 2.5
    assert by_hand({"a": [1.0]}).differences().count("\n") == 1


def test_names_that_do_not_exist_are_refused():
    table = by_hand(FOUR)
    with pytest.raises(OptionError, match="method: must be one of Grad_CAM & co, B, none, got 'b'"):
        table.estimate("b", "score")
    with pytest.raises(OptionError, match=r"method: must be one of .*, got 'x'"):
        table.differences("x")
    with pytest.raises(OptionError, match="measure: must be one of score, got 'scores'"):
        table.difference("B", "none", "scores")
    with pytest.raises(OptionError, match="measure: must be one that has a curve, got 'score'"):
        table.curve("B", "score")


# ---------------------------------------------------------------------- formats


def markdown(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [cells[0], *cells[2:]]


def read(cell: str) -> tuple[float, float, float]:
    numbers = [float(part) for part in re.findall(r"-?\d+\.\d+", cell)]
    return (numbers[0], *numbers[1:]) if len(numbers) == 3 else (NAN, NAN, NAN)


def told(estimate: Estimate, digits: int) -> tuple[float, float, float]:
    return tuple(round(value, digits) for value in (estimate.mean, estimate.low, estimate.high))


def same(one, two) -> bool:
    return all(a == pytest.approx(b, abs=1e-9, nan_ok=True) for a, b in zip(one, two, strict=True))


def test_markdown_reads_back():
    table = by_hand({**FOUR, "with | bar": [1.0, 2.0, 3.0, 4.0]}, [LOW])
    head, *rows = markdown(table.to_markdown())
    assert head == ["method", "AD(50) ↓", "images", "forward", "backward", "x forward", "peak MB"]
    assert [row[0] for row in rows] == table.methods
    for row in rows:
        assert same(read(row[1]), told(table.estimate(row[0], "AD(50)"), 2))
    assert rows[0][2:] == ["4", "1", "0", "2.00", "3"]
    assert rows[1][2:] == ["3", "2", "1", "4.00", "–"]
    assert rows[2][1:3] == ["–", "0"]
    assert "* B, AD(50): 1 image without a value (no region, or no finite map)" in table.to_markdown()
    assert "* none, AD(50): 4 images without a value" in table.to_markdown()


def test_text_has_a_column_for_each_method():
    table = by_hand(FOUR, [LOW, AREA], curve=(1, 1, 1))
    lines = str(table).splitlines()
    body = [line for line in lines[: lines.index("")] if not set(line) <= set("- ")]
    assert re.split(r"\s{2,}", body[0].strip()) == table.methods
    assert len({len(line) for line in body}) == 1, "columns are flush"
    cells = {row[0]: row[1:] for row in (re.split(r"\s{2,}", line.strip()) for line in body[1:])}
    assert list(cells) == ["AD(50) ↓", "area ↑", "images", "forward", "backward", "x forward", "peak MB"]
    for method, cell in zip(table.methods, cells["AD(50) ↓"], strict=True):
        assert cell == table.estimate(method, "AD(50)").short(2)
    assert cells["forward"] == ["1", "2", "3"]
    assert "4 images; mean ±half its 95 % bootstrap interval" in str(table)
    assert "masking auto, score softmax, seed 0, Net 0123, attrib_zoo 1, torch 2" in str(table)
    assert repr(table) == "<Table of 3 methods, 2 measures, 4 images>"


def test_csv_reads_back():
    odd = {name: [1.0, 2.0, 3.0, 4.0] for name in ("a\rb", "a\nb", 'a "b", c', "a\r\n")}
    table = by_hand(FOUR | odd, [LOW, AREA], curve=(1, 1, 1))
    rows = list(csv.DictReader(io.StringIO(table.to_csv(), newline="")))
    assert len(rows) == 14
    assert "\r\n" not in table.to_csv().replace('a\r\n"', "")
    for row in rows:
        found = table.estimate(row["method"], row["measure"])
        assert same([float(row[k]) for k in ("mean", "low", "high")], [found.mean, found.low, found.high])
        assert int(row["images"]) == found.images


def test_json_reads_back():
    table = by_hand(FOUR, [LOW])
    found = json.loads(table.to_json(), parse_constant=pytest.fail)
    assert found["setting"] == table.records.setting
    assert list(found["methods"]) == table.methods
    for method, facts in found["methods"].items():
        wanted = vars(table.estimate(method, "AD(50)"))
        assert facts["measures"]["AD(50)"] == {
            k: None if isinstance(v, float) and math.isnan(v) else v for k, v in wanted.items()
        }
        assert facts["cost"] == vars(table.records.costs[method])


def test_latex_reads_back():
    table = by_hand({**FOUR, r"100% #1 {a}\b^~$": [1.0, 2.0, 3.0, 4.0]}, [LOW])
    lines = table.to_latex().splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrrr}"
    assert lines[-1] == r"\end{tabular}"
    rows = [re.split(r" (?<!\\)& ", line.removesuffix(r" \\")) for line in lines if line.endswith(r" \\")]
    assert rows[0][:2] == ["method", r"AD(50) $\downarrow$"]
    assert rows[1][0] == r"Grad\_CAM \& co"
    assert rows[4][0] == r"100\% \#1 \{a\}\textbackslash{}b\textasciicircum{}\textasciitilde{}\$"
    assert [len(row) for row in rows] == [7] * 5
    for method, row in zip(table.methods, rows[1:], strict=True):
        assert same(read(row[1]), told(table.estimate(method, "AD(50)"), 2))
    assert rows[2][-1] == "--"


def test_pandas_has_a_row_for_each_image_and_method():
    """Seen with pandas 3.1.1, which no extra installs."""
    pytest.importorskip("pandas")
    table = by_hand(FOUR, [LOW, AREA], curve=(1, 1, 1))
    frame = table.to_pandas()
    assert list(frame.columns) == ["method", "image", "target", "clean", "AD(50)", "area"]
    assert len(frame) == 12
    assert [str(kind) for kind in frame.dtypes[1:]] == ["int64", "int64", "float64", "float64", "float64"]
    means = 100 * frame.groupby("method", sort=False)["AD(50)"].mean()  # fractions, as the measures give them
    assert list(means.index) == table.methods
    assert means.tolist() == pytest.approx([table.estimate(m, "AD(50)").mean for m in table.methods], nan_ok=True)
    row = frame[(frame.method == "B") & (frame.image == 3)].iloc[0]
    assert (row.target, row.clean, row["AD(50)"]) == (0, 0.5, 0.6)
    assert frame[frame.method == "B"]["AD(50)"].isna().tolist() == [False, True, False, False]


def test_what_only_some_rows_have():
    table = by_hand({"a": [1.0, 2.0], "random map": [1.0, 2.0]}, [LOW, AREA], curve=(1, 2, 3))
    assert table.controls == ["random map"]  # also where no run has named them
    rows = table.records.rows
    rows["a", 1].values["AD(50)"], rows["a", 1].curves["area"] = NAN, [NAN] * 3
    assert table.cells()[1][0][3] == "2", "as many images as any measure has"
    assert table.curve("a", "area").tolist() == [1, 2, 3]
    del rows["a", 1].curves["area"]
    assert table.curve("a", "area").tolist() == [1, 2, 3]
    lacking = by_hand({"a": [1.0, 2.0], "chance": [NAN, 2.0]}, [LOW])
    assert "chance, AD(50): 1 image without a value (no region, or no finite map)" in lacking.notes()
    assert not any("chance" in note for note in by_hand({"a": [1.0], "chance": [NAN]}, [LOW]).notes())


def test_percents_are_percents():
    table = by_hand({"a": [0.1, 0.3]}, [LOW, Measure("share", lambda asked: asked.clean, percent=False)])
    assert table.values("a", "AD(50)").tolist() == pytest.approx([10, 30])
    assert table.values("a", "share").tolist() == pytest.approx([0.1, 0.3])
    assert table.cells()[1][0][1:3] == ["20.00 [10.00, 30.00]", "0.2000 [0.1000, 0.3000]"]


def test_numbers_of_curves():
    values = torch.tensor([[0.0, 1.0, 4.0]])
    assert Measure("m", lambda _: values).number(values).item() == pytest.approx(5 / 3)
    assert AREA.number(values).item() == pytest.approx((0.5 + 2.5) / 2)


# ---------------------------------------------------------------------- plots


def test_the_plot_has_a_panel_for_each_curve_and_one_for_the_cost():
    curves = [*FAMILIES["road"], *FAMILIES["insertion"]]
    table = by_hand(FOUR, [LOW, *curves])
    for row in table.records.rows.values():
        row.curves = {m.name: [row.values[m.name] * (1 + p) for p in m.points] for m in curves}
    sheet = table.plot()
    titles = [axes.get_title(loc="left") for axes in sheet.axes]
    assert titles == ["ROAD MoRF ↓", "ROAD LeRF ↑", "insertion ↑", "AD(50) against cost (up and left is better)"]
    lines = {line.get_color(): line for line in sheet.axes[0].lines}
    assert len(lines) == 3
    first = sheet.axes[0].lines[0]
    assert first.get_xdata().tolist() == pytest.approx([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert first.get_ydata().tolist() == pytest.approx([40 * (1 + i / 10) for i in range(1, 10)])
    scatter = sheet.axes[-1]
    assert scatter.yaxis_inverted(), "less is better is up"
    assert scatter.containers[0].lines[0].get_xydata().tolist() == [pytest.approx([2, 40])]
    assert [text.get_text() for text in sheet.legends[0].get_texts()] == table.methods
    sheet.canvas.draw()


def test_every_row_of_a_plot_is_told_apart_and_the_legend_shows_its_line():
    controls = ["random map", "image edges", "centre blob", "m0, untrained", "perfect map"]
    names = [*(f"m{i}" for i in range(40)), *controls]
    (curve,) = [m for m in FAMILIES["road"] if "LeRF" in m.name]
    table = by_hand({name: [0.5, 0.25] for name in names}, [curve], curve=[1.0] * len(curve.points))
    table.records.setting = {**table.records.setting, "controls": controls}
    sheet = table.plot()
    drawn, handles = sheet.axes[0].lines, sheet.legends[0].legend_handles
    looks = [[(h.get_color(), h.get_marker(), str(h.get_linestyle())) for h in lines] for lines in (drawn, handles)]
    assert looks[0] == looks[1]
    assert len(set(looks[0])) == len(names)
    assert all(h.get_linestyle() != "None" and h.get_linewidth() > 1 for h in handles)
    grey = [matplotlib.colors.to_rgb(h.get_color()) for h in handles]
    assert [max(c) == min(c) for c in grey] == [name in controls for name in names]


NAMES = ["$\\frac{", "$x$ and $y$", "_hidden", "a\nb", "\ud800", "\x1b[2J", "x" * 5000, "|"]


def test_names_are_drawn_and_written_as_they_stand(monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # where there may be no TeX
    measure = replace(LOW, name="$\\frac{")
    table = by_hand({name: [0.5, 0.25] for name in NAMES}, [measure])
    sheet = table.plot()
    for axes in sheet.axes:
        axes.tick_params(labelbottom=False, labelleft=False)  # numbers, which TeX may set if the user says so
    sheet.canvas.draw()
    assert [text.get_text() for text in sheet.legends[0].get_texts()] == [shown(name, 100) for name in NAMES]
    assert sheet.axes[0].get_ylabel() == "$\\frac{"
    lines = table.to_markdown().split("\n\n")[0].splitlines()
    assert len(lines) == 2 + len(NAMES)
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in lines}) == 1
    table.to_markdown().encode()


def test_panels_stand_side_by_side_or_one_below_the_other():
    curves = [*FAMILIES["road"], *FAMILIES["insertion"]]
    table = by_hand({"a": [0.5, 0.25]}, curves, curve=[1.0] * 20)
    table.records.rows = {
        key: replace(row, curves={m.name: [0.5] * len(m.points) for m in curves})
        for key, row in table.records.rows.items()
    }
    for across in (1, 2):
        sheet = table.plot(across)
        sheet.canvas.draw()
        boxes = [axes.get_position() for axes in sheet.axes]
        assert len({round(box.x0, 1) for box in boxes}) == across
        assert sheet.get_size_inches()[0] == pytest.approx(4.4 * across)


def test_the_plot_bears_equal_values_and_one_image(monkeypatch):
    by_hand({"a": [0.1] * 7, "b": [0.7] * 7}, [LOW]).plot().canvas.draw()
    by_hand({"a": [0.1]}, [Measure("m", lambda asked: asked.clean)]).plot().canvas.draw()
    monkeypatch.setattr("attrib_zoo.benchmark.table.estimate", lambda _: Estimate(0.5, 0.6, 0.7, 3))
    sheet = by_hand({"a": [0.1]}, [LOW]).plot()  # a mean beside its interval, as rounding could have it
    sheet.canvas.draw()
    assert sheet.axes[-1].containers[0].lines[0].get_ydata().tolist() == [0.5]


# ---------------------------------------------------------------------- words


def summed_up(values: dict[str, list[float]], controls: tuple[str, ...] = (), measure: Measure = LOW) -> str:
    table = by_hand(values, [measure])
    table.records.setting = {**table.records.setting, "controls": list(controls)}
    return table.summary()


SPREAD = [0.1 * i % 1 for i in range(40)]


def shifted(by: float) -> list[float]:
    return [value + by for value in SPREAD]


def test_words_tell_a_leader_from_a_tie():
    """Paired: a shift of every image is clear, however far the images spread; one of half of them, up and down, not."""
    wobble = [value + (0.05 if i % 2 else -0.049) for i, value in enumerate(SPREAD)]
    assert "a is ahead of all others by AD(50)." in summed_up({"a": SPREAD, "b": shifted(0.01)})
    assert "b is ahead" in summed_up({"a": SPREAD, "b": shifted(0.01)}, measure=AREA).replace("area", "AD(50)")
    text = summed_up({"a": SPREAD, "b": wobble, "c": shifted(0.2)})
    assert "By AD(50), a has the best mean, but these images cannot tell it from b." in text
    assert "ahead" not in text
    same = summed_up({"a": SPREAD, "b": SPREAD, "c": shifted(0.2), "d": wobble})
    assert "By AD(50), a and b have the same, best mean, but these images cannot tell them from d." in same
    assert "By AD(50), a and b have the same, best mean." in summed_up({"a": SPREAD, "b": SPREAD})


def test_words_say_where_a_map_that_knows_nothing_is_as_good():
    wobble = [value + (0.05 if i % 2 else -0.049) for i, value in enumerate(SPREAD)]
    level = summed_up({"a": SPREAD, "b": shifted(0.01), "random map": wobble})
    assert "no method can be told from random map, which knows nothing of the model: it ranks nothing here" in level
    assert "beats every method" in summed_up({"a": SPREAD, "b": SPREAD, "random map": shifted(-0.02)})
    for harmless in ("perfect map", "a, untrained", "chance"):
        text = summed_up({"a": SPREAD, "b": shifted(0.01), harmless: shifted(-0.02)}, (harmless,))
        assert "a is ahead of all others" in text


def test_words_admit_few_images_and_a_lonely_method():
    assert "With fewer than 30 images all of this is a hint" in summed_up({"a": SPREAD[:29], "b": SPREAD[:29]})
    assert "hint" not in summed_up({"a": SPREAD, "b": SPREAD})
    assert "a was measured alone" in summed_up({"a": SPREAD, "random map": shifted(0.3)})
    assert summed_up({"a": [NAN] * 3}).startswith("1 method on 3 images, judged by 1 measure.")


def test_a_notebook_shows_words_ties_and_no_empty_column():
    (first, second) = Measure("one", LOW.compute, lower=True), Measure("two", LOW.compute)
    table = by_hand({"a<b>": SPREAD, "b": SPREAD, "c": shifted(0.2)}, [first, second])
    for row in table.records.rows.values():
        row.values["two"] = NAN
    text = table._repr_html_()
    assert html.escape(table.summary()) in text
    assert "a&lt;b&gt;" in text
    assert "<b>" not in text
    assert "two ↑" not in text
    cells = re.findall(r'<td data-value="[\d.]+"( class="\w+")? data-label="one ↓">', text)
    assert cells == [' class="best"', ' class="best"', ""]
    assert "peak MB" in text
    for cost in table.records.costs.values():
        cost.peak = None
    assert "peak MB" not in table._repr_html_()
    table = by_hand({"a": SPREAD, "b": [v + (0.05 if i % 2 else -0.049) for i, v in enumerate(SPREAD)]}, [first])
    assert 'class="tied"' in table._repr_html_()


def test_many_measures_are_shown_in_parts_that_fit_a_screen():
    table = by_hand({"a": SPREAD, "b": SPREAD}, [Measure(f"m{i}", LOW.compute) for i in range(19)])
    found = parts(table)
    assert [part.title for part in found] == ["", "", "", "Cost"]
    assert [len(part.head) for part in found[:3]] == [7, 7, 5]
    assert [name for part in found[:3] for name in part.head] == [f"m{i} ↑" for i in range(19)]


# ---------------------------------------------------------------------- the page


class Page(HTMLParser):
    """The cells of the table with their sort values, the pictures, and the tags that are open at the end."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[tuple[str, str]]] = []
        self.pictures: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append((values.get("data-value", ""), values.get("class", "")))
        if tag == "img":
            self.pictures.append(values["src"])
        assert not {"href", "srcset", "data"} & values.keys()

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[str, Page]:
    model = zoo.small_cnn()

    def blind(inputs, target):
        return torch.full_like(inputs, torch.nan)

    methods = {"Grad-CAM": GradCAM(model), "<b>": CHEAP["darkness"], "blind": blind}
    table = evaluate(model, methods, Batches(4), "ad,deletion", show_progress=False)
    path = write_report(
        tmp_path_factory.mktemp("page") / "report.html",
        table,
        model,
        methods,
        lambda i: IMAGES[i],
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        title="Cats & <dogs>",
        class_name=lambda i: f"<i>class & {i}</i>",
    )
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    page.table = table
    return text, page


def test_the_page_needs_nothing_else(page):
    text, read = page
    assert read.open == []
    frame = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert len(frame) < 0.2 * len(text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|src=\"(?!data:image/)", frame)
    assert (
        len(read.pictures) == 2 + 2 * 3 * 2
    )  # curves for wide and narrow screens; two methods that have values, three images, plain and map
    assert all(re.match("data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$", picture) for picture in read.pictures)


def test_names_are_shown_as_they_are(page):
    text, read = page
    assert "<i>" not in text
    assert "<b>" not in text
    assert "Cats & <dogs>" in read.text
    assert re.search(r"<i>class & \d</i>, \d+%", read.text)
    assert read.rows[2][0][0] == "<b>"
    assert "blind, AD(100): 7 images without a value" in read.text


def test_the_table_can_be_sorted_by_exact_values_and_the_best_is_bold(page):
    _, read = page
    table = read.table
    head, *rows = read.rows[: 1 + len(table.methods)]
    assert len(rows) == len(table.methods) == 3 + 3
    assert {len(row) for row in (head, *rows)} == {1 + len(table.measures)}
    assert len(read.rows) == 2 * (1 + len(table.methods)), "measures, then costs"
    for method, row in zip(table.methods, rows, strict=True):
        assert row[0][0] == method
        for measure, (value, _) in zip(table.measures, row[1:], strict=False):
            mean = table.estimate(method, measure.name).mean
            assert value == ("" if math.isnan(mean) else str(mean))
    for _, *row in read.rows[2 + len(table.methods) :]:
        assert all(value == "" or float(value) >= 0 for value, _ in row)
    for column, measure in enumerate(table.measures, start=1):
        bold = [row[0][0] for row in rows if row[column][1] == "best"]
        means = {m: table.estimate(m, measure.name).mean for m in table.methods}
        means = {m: -mean if measure.lower else mean for m, mean in means.items() if not math.isnan(mean)}
        first = max(means, key=means.get)
        assert bold == ([] if first in table.controls else [first])


def bold_rows(tmp_path, values, lower=False):
    """The methods in bold of a table with one measure, one image."""
    model = zoo.small_cnn()
    methods = {name: (lambda x, t, v=v: x.new_full((len(x), 1, 4, 4), v)) for name, v in values.items()}
    measure = Measure("m", lambda asked: asked.maps.mean((1, 2, 3)), lower=lower, percent=False)
    table = evaluate(model, methods, Batches(7), [measure], controls=False, show_progress=False)
    path = write_report(tmp_path / "r.html", table, model, {}, lambda i: IMAGES[i], mean=(0.0,) * 3, std=(1.0,) * 3)
    return re.findall(
        r'<tr[^>]*><td data-value="([^"]*)">[^<]*</td><td data-value="[^"]*" class="best"', path.read_text()
    )


@pytest.mark.parametrize("lower", [False, True])
def test_all_tied_means_are_bold_unless_a_control_is_better(tmp_path, lower):
    sign = -1 if lower else 1
    tied = {"a": sign * 0.5, "b": sign * (0.5 + 1e-7), "c": sign * 0.25}  # a and b are printed alike
    assert bold_rows(tmp_path, tied, lower) == ["a", "b"]
    assert bold_rows(tmp_path, {**tied, "random map": sign * 0.5}, lower) == ["a", "b"]
    assert bold_rows(tmp_path, {**tied, "random map": sign * 0.75}, lower) == []
    assert bold_rows(tmp_path, {**tied, "perfect map": sign * 0.75}, lower) == ["a", "b"]


def test_the_best_of_some_methods_at_some_decimals():
    """An untrained twin still reads the model, so it takes no method's place; nor does a method that is not asked."""
    table = by_hand({"a": [0.52, 0.52], "b": [0.49, 0.49], "a, untrained": [0.8, 0.8], "edges": [0.54, 0.54]})
    table.records.setting = {**table.records.setting, "controls": ["a, untrained"]}
    assert table.best("score") == ["edges"]
    assert table.best("score", among=["a", "b"]) == ["a"]
    assert table.best("score", digits=1, among=["a", "b"]) == ["a", "b"]
    table.records.setting["controls"] = ["a, untrained", "edges"]
    assert table.best("score") == []
    assert table.best("score", digits=1) == ["a", "b"]  # printed alike, so the control is not seen to be better
    assert by_hand({"a": [NAN], "random map": [1.0]}).best("score") == []


def test_the_page_shows_best_median_and_worst(page):
    _, read = page
    values = read.table.values("<b>", "AD(100)").sort().values
    wanted = [f"{what}: {values[i]:.2f}" for what, i in (("best", 0), ("median", 3), ("worst", 6))]
    found = re.findall(r"(?:best|median|worst): [\d.]+", read.text)
    assert [text.rstrip(".") for text in found][3:] == wanted


def test_pictures_are_ranked_by_the_measure_asked_for(tmp_path):
    model = zoo.small_cnn()
    table = evaluate(model, {"b": brightness}, Batches(4), "ad,sparseness", controls=False, show_progress=False)
    options = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "rank_by": "sparseness"}
    path = write_report(tmp_path / "r.html", table, model, {"b": brightness}, lambda i: IMAGES[i], **options)
    values = table.values("b", "sparseness").sort(descending=True).values  # more is better
    assert f"best: {values[0]:.2f}<br>" in path.read_text()
    assert f"worst: {values[-1]:.2f}<br>" in path.read_text()
    with pytest.raises(OptionError, match=r"rank_by: must be one of AD.100., AD.50., AD.15., sparseness, got 'beauty'"):
        write_report(tmp_path / "r.html", table, model, {}, lambda i: IMAGES[i], **{**options, "rank_by": "beauty"})
    with pytest.raises(DataError, match=r"path: cannot write '.*r.html' \(No such file or directory\); choose another"):
        write_report(tmp_path / "no" / "r.html", table, model, {}, lambda i: IMAGES[i], **options)
