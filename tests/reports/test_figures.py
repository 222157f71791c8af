"""Figures: no text over text or outside the picture, every method told apart, the source of bytes on the axis."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axis import Tick
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from synthetic_rows import H100, Rows, demo_rows, make_rows, single_rows, sweep_rows, wide_rows

from kvscope.reports.build import all_figures
from kvscope.reports.cells import accuracy_cells
from kvscope.reports.families import families, family_note, family_styles
from kvscope.reports.figure_parts import ReportFigure, SkippedFigure
from kvscope.reports.figures_pareto import accuracy_against_memory, accuracy_against_reads
from kvscope.reports.labels import spread
from kvscope.reports.theme import COLORS, DENSE_COLOR, figure_names, method_styles, short_lines
from kvscope.results.frames import Run, make_run
from kvscope.results.run_schema import MethodInfo
from kvscope.results.schema import ResidencyRecord, SampleRow

Drawing = Callable[[Run, pd.DataFrame], list[ReportFigure | SkippedFigure]]
NAMES = [
    "accuracy_against_memory",
    "accuracy_against_reads",
    "accuracy_by_length",
    "accuracy_minus_dense",
    "accuracy_by_task",
    "needle_heatmap",
    "depth_by_task",
    "memory_by_length",
    "tpot_by_length",
]


def long_labels() -> Rows:
    """Four methods of one name, told apart by long options only."""
    samples, footprints, info = demo_rows()
    options = [f"budget_fraction=0.{i}25,chunk_tokens=64,seed={i}" for i in range(4)]
    rename = {old.label: f"random:{text}" for old, text in zip(info.methods, options, strict=True)}
    return (
        [row.model_copy(update={"method_label": rename[row.method_label]}) for row in samples],
        [row.model_copy(update={"method_label": rename[row.method_label]}) for row in footprints],
        info.model_copy(
            update={
                "methods": tuple(m.model_copy(update={"label": rename[m.label]}) for m in info.methods),
                "plan": tuple(c.model_copy(update={"method_label": rename[c.method_label]}) for c in info.plan),
            }
        ),
    )


def swept() -> Rows:
    """dense, six settings of one method that chooses again every four steps, and random."""
    sweep = [
        f"lsa:tau={tau},threshold={x},chunk_tokens=16,indexer=attention" for x in (0.3, 0.5, 0.7) for tau in (4, 16)
    ]
    base = make_rows(
        ["dense", "lsa:threshold=0.5,tau=64", "random"], tasks=("niah_single_1", "niah_multikey_2"),
        lengths=(2048, 4096), samples=5, footprint_lengths=(2048, 4096),
    )  # fmt: skip

    def spread_out(rows: list[Any], made: Callable[[Any, str, int], Any]) -> list[Any]:
        found = []
        for row in rows:
            found += [made(row, label, i) for i, label in enumerate(sweep)] if row.method == "lsa" else [row]
        return found

    def sample(row: SampleRow, label: str, i: int) -> SampleRow:
        record = ResidencyRecord(
            tau=4, prompt_tokens=1000, resident_tokens=tuple(60 + 40 * i + k % 7 for k in range(40)),
            recalled_bytes=(0,) * 40, hit_rate=0.5, fallbacks=0,
        )  # fmt: skip
        held = row.resident_kv_bytes or 0
        return row.model_copy(
            update={
                "method_label": label,
                "config": {"mode": "threshold"},
                "residency": record,
                "resident_kv_bytes": held * (10 + i) // 10,
            }
        )

    samples, footprints, info = base
    methods: list[MethodInfo] = []
    for method in info.methods:
        copies = [method.model_copy(update={"label": label}) for label in sweep]
        methods += copies if method.name == "lsa" else [method]
    plan = [cell for cell in info.plan if not cell.method_label.startswith("lsa")]
    return (
        spread_out(samples, sample),
        spread_out(footprints, lambda row, label, _: row.model_copy(update={"method_label": label})),
        info.model_copy(update={"methods": tuple(methods), "plan": tuple(plan)}),
    )


def dense_depths() -> Rows:
    """The reference model's own grid: dense, ten lengths, ten parts of the depth, several tasks."""
    return make_rows(
        ["dense"],
        machine=H100,
        tasks=("niah_single_1", "niah_multikey_2", "vt"),
        lengths=tuple(1024 * 2**i for i in range(10)),
        samples=60,
        footprint_lengths=(1024,),
    )


def drawn(
    rows: Rows, *, samples: int | None = None, footprints: int | None = None, figures: Drawing = all_figures
) -> dict[str, ReportFigure]:
    run = make_run(rows[0][:samples], rows[1][:footprints], info=rows[2], folder=".")
    return {figure.name: figure for figure in figures(run, accuracy_cells(run)) if isinstance(figure, ReportFigure)}


def against(run: Run, cells: pd.DataFrame) -> list[ReportFigure | SkippedFigure]:
    """The figures that a sweep is drawn for."""
    return [accuracy_against_memory(run, cells), accuracy_against_reads(run, cells)]


@dataclass(frozen=True)
class Picture:
    """A figure and the place of every text that is really drawn."""

    figure: ReportFigure
    texts: list[tuple[str, Bbox]]

    @property
    def words(self) -> str:
        return " ".join(" ".join(text.split()) for text, _ in self.texts)


Pictures = dict[str, dict[str, Picture]]


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    found = {
        "demo": drawn(demo_rows()),
        "wide": drawn(wide_rows(tasks=2)),
        "single": drawn(single_rows()),
        "partial": drawn(demo_rows(), samples=123, footprints=5),
        "long": drawn(long_labels()),
        "depths": drawn(dense_depths()),
        "swept": drawn(swept()),
        "sweep": drawn(sweep_rows(), figures=against),
    }
    return {
        which: {name: Picture(figure, placed_texts(figure)) for name, figure in figures.items()}
        for which, figures in found.items()
    }


def placed_texts(figure: ReportFigure) -> list[tuple[str, Bbox]]:
    """Texts with their boxes; labels of ticks beyond the axis exist but are never drawn."""
    figure.figure.draw_without_rendering()
    hidden: set[int] = set()
    for axes in figure.figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            hidden |= {id(label) for tick in ticks if not low <= tick.get_loc() <= high for label in _labels(tick)}
    texts = [text for text in figure.figure.findobj(Text) if text.get_visible() and id(text) not in hidden]
    return [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]


def covered_pairs(texts: list[tuple[str, Bbox]], *, x_px: float, y_px: float) -> list[tuple[str, str]]:
    """Pairs of texts that lie over each other by more than so many pixels both ways."""
    x0, y0, x1, y1 = np.array([box.extents for _, box in texts]).T
    wide = np.minimum.outer(x1, x1) - np.maximum.outer(x0, x0) > x_px
    high = np.minimum.outer(y1, y1) - np.maximum.outer(y0, y0) > y_px
    return [(texts[a][0], texts[b][0]) for a, b in np.argwhere(np.triu(wide & high, 1))]


def _labels(tick: Tick) -> tuple[Text, Text]:
    return tick.label1, tick.label2


@pytest.mark.parametrize("which", ["demo", "wide", "single", "partial", "long", "depths", "swept"])
@pytest.mark.parametrize("name", [*NAMES, "resident_over_steps"])
def test_no_text_covers_another_or_leaves_the_picture(pictures: Pictures, which: str, name: str) -> None:
    if name not in pictures[which]:
        assert name == "resident_over_steps" or which == "single" or (name, which) == ("accuracy_minus_dense", "depths")
        assert name in ("accuracy_by_task", "depth_by_task", "resident_over_steps", "accuracy_minus_dense")
        return
    picture = pictures[which][name]
    found = picture.texts
    assert len(found) > 3
    page = picture.figure.figure.bbox
    outside = [text for text, box in found if box.x0 < 0 or box.y0 < 0 or box.x1 > page.x1 or box.y1 > page.y1]
    assert outside == []
    assert covered_pairs(found, x_px=1, y_px=2) == []


@pytest.mark.parametrize("name", ["accuracy_against_memory", "accuracy_against_reads"])
def test_a_sweep_of_many_settings_stays_readable(pictures: Pictures, name: str) -> None:
    """22 settings: one colour and one entry of the key a method, every point named by its budget alone."""
    picture = pictures["sweep"][name]
    assert picture.figure.data["method_label"].nunique() == 22
    for method in ("quest", "moba", "msa", "dsa"):
        assert f"{method}: by budget_tokens" in picture.words
    texts = [text for text, _ in picture.texts]
    for axes in picture.figure.figure.axes:
        inside = [text.get_text() for text in axes.texts]
        for budget in ("256", "512", "1K", "2K", "4K"):
            assert inside.count(budget) == 4, (axes.get_title(loc="left"), budget)
    assert texts.count("dense") == 3
    covered = covered_pairs(picture.texts, x_px=3, y_px=4)
    assert len(covered) <= 3, "texts that lie over each other, of more than seventy"


def test_families_are_settings_of_one_method_that_differ_in_one_option() -> None:
    labels = ["dense", "quest", "quest:budget_tokens=256", "quest:budget_tokens=4096", "lsa:tau=4,threshold=0.3",
              "lsa:tau=4,threshold=0.5", "lsa:tau=4,threshold=0.7", "lsa:tau=8,threshold=0.7", "moba:budget_tokens=256",
              "moba:budget_tokens=512"]  # fmt: skip
    lsa, quest = sorted(families(labels), key=lambda family: family.method)
    assert lsa.text == "lsa (tau=4): by threshold"
    assert list(lsa.values.values()) == ["0.3", "0.5", "0.7"]
    assert quest.values == {
        "quest": "default", "quest:budget_tokens=256": "256", "quest:budget_tokens=4096": "4K"
    }  # fmt: skip
    styles = family_styles(labels, [lsa, quest], with_method=True)
    assert styles["quest:budget_tokens=4096"].text == "quest 4K"
    assert len({styles[label].color for label in quest.values}) == 1
    assert len({(style.color, style.marker) for style in styles.values()}) == 6
    assert family_note([lsa, quest]) == (
        "What stands behind lsa (tau=4) is threshold. What stands behind quest is budget_tokens."
    )
    assert families(["dense", "recency", "random:fraction=0.2"]) == []
    dsa, _ = families([f"dsa:budget_tokens={n},indexer=/some/{where}" for n in (1, 2, 4) for where in ("a", "b")])
    assert dsa.text == "dsa (indexer=a): by budget_tokens"
    (dsa,) = families([f"dsa:budget_tokens={n},indexer=/some/where/mine" for n in (256, 512, 1024)])
    assert dsa.text == "dsa: by budget_tokens"


def test_every_method_is_named_in_the_figures_that_compare_methods(
    pictures: Pictures,
) -> None:
    for which in ("demo", "wide"):
        for name in NAMES:
            picture = pictures[which][name]
            texts = [text.replace("\n", "") for text, _ in picture.texts]
            for label in set(picture.figure.data["method_label"]):
                assert label in texts or f"by task: {label}" in picture.words, (which, name, label)


def test_labels_leave_out_what_tells_no_method_apart_and_the_subtitle_says_it(pictures: Pictures) -> None:
    for picture in pictures["swept"].values():
        assert "every lsa: chunk_tokens=16, indexer=attention" in picture.words
        assert picture.words.count("indexer=attention") == 1
    named = {
        "resident_over_steps": "lsa:tau=4,threshold=0.7",
        "memory_by_length": "lsa (tau=4) 0.7",
        "accuracy_against_memory": "lsa (tau=4):by threshold",
    }
    for name, text in named.items():
        assert text in pictures["swept"][name].words.replace(": ", ":"), name
    assert figure_names(["lsa:tau=4", "lsa", "random:seed=1"]) == {
        "lsa:tau=4": "lsa:tau=4", "lsa": "lsa", "random:seed=1": "random:seed=1",
    }  # fmt: skip
    assert figure_names(["lsa:chunk=4", "lsa:chunk=4,tau=2"]) == {
        "lsa:chunk=4": "lsa",
        "lsa:chunk=4,tau=2": "lsa:tau=2",
    }


def test_a_line_that_is_an_estimate_says_so(pictures: Pictures) -> None:
    assert "its line is an estimate" in pictures["swept"]["memory_by_length"].words
    assert "estimate" not in pictures["demo"]["memory_by_length"].words


def test_without_nvml_the_axis_and_the_picture_say_ledger(pictures: Pictures) -> None:
    for name in ("memory_by_length", "accuracy_against_memory"):
        picture = pictures["demo"][name]
        assert "KV cache on the device (ledger, not NVML)" in picture.words
        assert "NVML was not measured: no NVIDIA GPU" in picture.words
        assert "NVML was not measured: no NVIDIA GPU" in picture.figure.caption
        assert "KV cache on the GPU (NVML)" in pictures["wide"][name].words
        assert "ledger" not in pictures["wide"][name].words


def test_an_unfinished_run_says_so_in_every_picture(pictures: Pictures) -> None:
    for picture in pictures["partial"].values():
        assert "unfinished run (123 of 160 sample rows, 5 of 8 footprint rows)" in picture.words
    assert "unfinished" not in pictures["demo"]["accuracy_by_length"].words


def test_out_of_memory_is_marked(pictures: Pictures) -> None:
    for name in ("memory_by_length", "tpot_by_length"):
        (axes,) = pictures["wide"][name].figure.figure.axes
        assert len([line for line in axes.lines if line.get_marker() == "x"]) == 5
        assert "out of memory" in pictures["wide"][name].words
        assert "out of memory" not in pictures["demo"][name].words


def test_the_csv_behind_a_figure_holds_its_points(pictures: Pictures) -> None:
    data = pictures["demo"]["memory_by_length"].figure.data
    assert data["measured_bytes"].notna().sum() == 8
    assert data["predicted_bytes"].notna().sum() == 16
    assert (data.loc[data["measured_bytes"].notna(), "measured_bytes"] > 0).all()
    heat = pictures["demo"]["needle_heatmap"].figure.data
    assert heat[heat["depth"] != "all"]["n"].sum() == heat[heat["depth"] == "all"]["n"].sum() == 160


def test_heatmaps_pool_the_needle_tasks_alone(pictures: Pictures) -> None:
    heat = pictures["depths"]["needle_heatmap"].figure.data
    assert set(heat["task"]) == {"niah_* pooled"}
    assert set(heat[heat["depth"] == "all"]["n"]) == {120}
    assert heat["depth"].nunique() == 11
    by_task = pictures["depths"]["depth_by_task"]
    assert list(dict.fromkeys(by_task.figure.data["task"])) == [
        "niah_* pooled",
        "niah_single_1",
        "niah_multikey_2",
        "vt",
    ]
    assert all(task in by_task.words for task in by_task.figure.data["task"])


def test_where_no_footprint_ran_the_ledger_of_the_answers_is_marked_and_predictions_are_dotted(
    pictures: Pictures,
) -> None:
    picture = pictures["demo"]["memory_by_length"]
    data = picture.figure.data
    assert data["answered_bytes"].notna().sum() == 8
    assert not (data["answered_bytes"].notna() & data["measured_bytes"].notna()).any()
    (axes,) = picture.figure.figure.axes
    marked = [line for line in axes.lines if line.get_marker() not in ("None", "_", "x") and len(line.get_xdata()) == 1]
    hollow = [line for line in marked if line.get_markerfacecolor() == "white"]
    assert (len(hollow), len(marked)) == (8, 16)
    assert "measured while answering (ledger; no footprint cell)" in picture.words
    dotted = [line for line in axes.lines if line.get_linestyle() == ":" and line.get_zorder() < 2]
    assert len(dotted) == 4, "one prediction a method"
    assert "predicted before the run" in picture.words
    assert "answering" not in pictures["wide"]["memory_by_length"].words


def test_the_difference_to_dense_shows_half_a_point_its_interval_and_the_margin(pictures: Pictures) -> None:
    picture = pictures["wide"]["accuracy_minus_dense"]
    data, (axes,) = picture.figure.data, picture.figure.figure.axes
    assert data["scope"].nunique() == 8  # dense ran out of memory at the longest length
    data = data[data["scope"] == "all prompts"]  # the drawing holds these alone: rows for every length are too many
    assert axes.get_xscale() == "symlog"
    assert "margin, 1 point, fixed before" in picture.words
    spans = [tuple(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"]
    assert spans == [(-1.0, -1.0), (1.0, 1.0)]
    low, high = axes.get_xlim()
    assert low <= 100 * data["difference_low"].min() < 100 * data["difference_high"].max() <= high
    to_px = axes.transData.transform
    assert to_px((0.5, 0))[0] - to_px((0, 0))[0] > 0.03 * (to_px((high, 0))[0] - to_px((low, 0))[0])
    assert "accuracy_minus_dense" not in pictures["single"]


def test_ticks_of_lengths_that_are_close_leave_each_other_room() -> None:
    lengths = (504_704, 512_256, 519_872, 524_288)
    rows = make_rows(["dense"], tasks=("niah_single_1",), lengths=lengths, samples=2, footprint_lengths=lengths)
    for figure in drawn(rows).values():
        assert covered_pairs(placed_texts(figure), x_px=2, y_px=2) == [], figure.name


def test_pareto_front_by_brute_force(pictures: Pictures) -> None:
    data = pictures["wide"]["accuracy_against_memory"].figure.data
    for _, rows in data.groupby("length_tokens"):
        for row in rows.itertuples():
            better = rows[
                (rows["bytes"] <= row.bytes)
                & (rows["accuracy"] >= row.accuracy)
                & ((rows["bytes"] < row.bytes) | (rows["accuracy"] > row.accuracy))
            ]
            assert row.pareto == (len(better) == 0)


def test_a_figure_without_rows_says_why() -> None:
    info = make_rows(["dense"], tasks=("niah_single_1",), lengths=(1024,), samples=1, footprint_lengths=())[2]
    run = make_run([], [], info=info.model_copy(update={"plan": ()}), folder=".")
    figures = all_figures(run, accuracy_cells(run))
    assert all(isinstance(figure, SkippedFigure) and figure.reason for figure in figures)


def test_styles_differ_in_marker_and_colour() -> None:
    labels = ["dense", *(f"method_{i}" for i in range(8))]
    styles = method_styles(labels)
    assert styles["dense"].color == DENSE_COLOR
    assert len({style.color for style in styles.values()}) == 9
    assert len({style.marker for style in styles.values()}) == 9
    assert len({(style.marker, style.dash) for style in styles.values()}) == 9, "without colour, too"
    assert {styles[f"method_{i}"].dash for i in range(4)} == {"-", "--", "-.", ":"}
    many = method_styles([f"m{i}" for i in range(20)])
    assert len({(style.color, style.marker, style.dash) for style in many.values()}) == 20


def test_colours_stand_apart_on_white() -> None:
    for color in (DENSE_COLOR, *COLORS):
        red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        luminance = sum(
            weight * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
            for weight, c in zip((0.2126, 0.7152, 0.0722), (red, green, blue), strict=True)
        )
        assert 1.05 / (luminance + 0.05) > 2.0, color


def test_spread_keeps_order_room_and_bounds() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        count = int(draw.integers(1, 9))
        wanted, sizes = list(draw.uniform(0, 100, count)), list(draw.uniform(5, 12, count))
        places = spread(wanted, sizes, low=-5, high=120)
        order = np.argsort(wanted, kind="stable")
        for above, below in itertools.pairwise(order):
            assert places[below] - places[above] >= (sizes[above] + sizes[below]) / 2 - 1e-6
        assert min(p - s / 2 for p, s in zip(places, sizes, strict=True)) >= -5 - 1e-6
        if sum(sizes) <= 125:
            assert max(p + s / 2 for p, s in zip(places, sizes, strict=True)) <= 120 + 1e-6
    assert spread([10.0, 50.0], [5.0, 5.0], low=0, high=100) == [10.0, 50.0]
    assert math.isclose(sum(spread([10.0, 10.0], [6.0, 6.0], low=0, high=100)) / 2, 10.0)


def test_labels_break_at_colon_and_commas() -> None:
    assert short_lines("lsa") == "lsa"
    assert short_lines("lsa:threshold=0.5,tau=64") == "lsa:\nthreshold=0.5,tau=64"
    assert short_lines("random:fraction=0.125,chunk_tokens=64,seed=3") == (
        "random:\nfraction=0.125,\nchunk_tokens=64,\nseed=3"
    )
