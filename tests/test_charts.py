"""ldm/drawing/charts.py: the right numbers at the right place of the right axes, the same bytes twice."""

import ast
import os
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from ldm.drawing import charts


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures drawn so far, in order, each of them also written as ever."""
    written, write = [], charts.write_figure
    monkeypatch.setattr(charts, "write_figure", lambda path, figure: (written.append(figure), write(path, figure)))
    return written


def panels_of(figure) -> dict:
    """The visible axes of a figure by title."""
    return {axes.get_title("left"): axes for axes in figure.axes if axes.get_visible()}


# ---------------------------------------------------------------------------------------------------------- loss curves


def test_loss_curves_of_one_row_and_of_many(tmp_path, drawn):
    sizes, contents = [], []
    for rows in (1, 50):
        history = [
            {"epoch": k, "loss": 10 ** (-k / 10), "val_loss": 10 ** (-k / 12), "learning_rate": k} for k in range(rows)
        ]
        for copy in "ab":
            charts.loss_curves(history, tmp_path / f"{rows}{copy}.png")
        content = (tmp_path / f"{rows}a.png").read_bytes()
        assert content == (tmp_path / f"{rows}b.png").read_bytes()
        contents.append(content)
        sizes.append(iio.imread(tmp_path / f"{rows}a.png").shape)
    assert sizes[0] == sizes[1] == (250, 720, 4)  # two panels: loss with val_loss, learning_rate
    assert contents[0] != contents[1]


def test_loss_curves_have_the_epochs_in_which_something_was_measured(tmp_path, drawn):
    history = [{"epoch": 0, "loss": 3.0}, {"epoch": 1, "loss": 1.5, "val_loss": 2.2}, {"epoch": 3, "loss": 0.9}]
    charts.loss_curves(history, tmp_path / "a.png")
    (panel,) = panels_of(drawn[0]).values()
    loss, validation = panel.lines
    assert loss.get_xdata().tolist() == [0, 1, 3] and loss.get_ydata().tolist() == [3.0, 1.5, 0.9]
    assert validation.get_xdata().tolist() == [1] and validation.get_ydata().tolist() == [2.2]


def test_scale_legend_and_warning_of_a_panel():
    def panel(*series):
        axes = charts.canvas.Figure().subplots()
        charts._draw_metric(axes, "loss", [("curve", charts.WHOLE, points) for points in series])
        return axes

    assert panel({0: 1.0, 1: 0.09}).get_yscale() == "log"
    assert panel({0: 1.0, 1: 0.11}).get_yscale() == "linear", "less than a decade"
    assert panel({0: 1.0, 1: 0.0}).get_yscale() == "linear", "zero has no logarithm"
    assert panel({0: 1.0}).get_legend() is None
    assert len(panel({0: 1.0}, {0: 2.0}).get_legend().get_texts()) == 2
    assert "2 not finite" in panel({0: 1.0, 1: np.nan, 2: np.inf}).get_title("left")
    assert "1 not finite" in panel({0: np.nan}).get_title("left"), "nothing finite at all is still a panel"


def test_an_empty_history_says_so(tmp_path):
    for rows in ([], [{"epoch": 0.0}]):
        with pytest.raises(ValueError, match="holds no epoch"):
            charts.loss_curves(rows, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


# ------------------------------------------------------------------------------------------------------ codebook health

RANKS = "how often each code was used, last epoch"


def history_of(epochs=3, **columns):
    """A history in which every column holds value, value / 2, value / 3, ..."""
    return [{"epoch": k, **{name: value / (k + 1) for name, value in columns.items()}} for k in range(epochs)]


def test_dead_codes_are_those_used_neither_in_the_brain_nor_beside_it():
    assert charts.dead_codes([0, 3, 0, 2, 0], [0, 0, 5, 1, 0]) == 2
    assert charts.dead_codes(np.zeros(7), np.zeros(7)) == 7
    assert charts.dead_codes([1.0, 0.0], [0.0, 0.5]) == 0
    assert charts.dead_codes(np.array([200, 0], np.uint8), np.array([56, 0], np.uint8)) == 1, "200 + 56 wraps to 0"


@pytest.mark.parametrize(
    ("foreground", "background", "message"),
    [
        ([1, 2], [1], "one shape"),
        ([[1, 2]], [[1, 2]], "one shape"),
        ([], [], "one shape"),
        ([1, -1], [0, 0], "not negative"),
        ([1, np.nan], [0, 0], "finite"),
    ],
)
def test_what_is_not_a_pair_of_counts_is_refused(tmp_path, foreground, background, message):
    history = history_of(usage=0.5)
    with pytest.raises(ValueError, match=message):
        charts.dead_codes(foreground, background)
    with pytest.raises(ValueError, match=message):
        charts.codebook_health(history, tmp_path / "a.png", foreground, background)
    assert not (tmp_path / "a.png").exists()


def test_codebook_health_shows_shares_codes_and_ranks(tmp_path, drawn):
    columns = dict(usage=0.9, usage_foreground=0.6, usage_background=0.3, perplexity=3, revived=7, val_usage=0.1)
    history = history_of(**columns)
    charts.codebook_health(history, tmp_path / "a.png", [0, 3, 9, 2, 0, 1], [0, 0, 0, 8, 0, 4])
    panels = panels_of(drawn[0])
    assert list(panels) == ["codes used (%)", "perplexity", "codes revived per epoch", RANKS]
    usage, perplexity, revived, ranks = ([line.get_ydata() for line in axes.lines] for axes in panels.values())
    assert np.allclose(usage, np.outer([90, 60, 30], [1, 1 / 2, 1 / 3]))
    assert panels["codes used (%)"].get_ylim() == (-2, 102), "so that two runs compare"
    assert np.allclose(perplexity[0], [3, 1.5, 1]) and set(perplexity[1]) == {6}, "and a line at K"
    assert np.allclose(revived, [[7, 3.5, 7 / 3]])
    assert [line.tolist() for line in ranks] == [[9, 3, 2, 1], [8, 4]], "each ranked by itself, without the unused"
    legend = panels[RANKS].get_legend()
    assert legend.get_title().get_text() == "2 of 6 codes dead"
    assert [text.get_text() for text in legend.get_texts()] == ["foreground: 4 used", "background: 2 used"]
    for axes in (panels["codes used (%)"], panels[RANKS]):
        assert len({line.get_linestyle() for line in axes.lines}) == len(axes.lines), "apart in grey print too"


@pytest.mark.parametrize(
    ("columns", "titles"),
    [
        (dict(loss=1), [RANKS]),
        (dict(usage=0.5), ["codes used (%)", RANKS]),
        (dict(usage=0.5, usage_background=0.1, perplexity=9), ["codes used (%)", "perplexity", RANKS]),
        (dict(perplexity=9, revived=0), ["perplexity", RANKS]),
        (dict(revived=3), ["codes revived per epoch", RANKS]),
    ],
)
def test_columns_that_older_runs_lack_only_cost_their_panel(tmp_path, drawn, columns, titles):
    for epochs in (1, 30):
        history = history_of(epochs, **columns)
        charts.codebook_health(history, tmp_path / "a.png", np.zeros(16), np.zeros(16))
        assert list(panels_of(drawn[-1])) == titles


def test_codebook_health_of_64_000_codes_has_the_same_bytes_twice(tmp_path):
    history = history_of(usage=0.9, perplexity=4000)
    foreground, background = np.random.default_rng(0).poisson([[2.0], [0.1]], (2, 64_000))
    for name in "ab":
        charts.codebook_health(history, tmp_path / f"{name}.png", foreground, background)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


# ----------------------------------------------------------------------------------------------------------- rate curve


def test_rate_curve_joins_points_by_rising_bits_and_marks_each_curve_its_own_way(tmp_path, drawn):
    curves = {"VQ": [(9000, 0.8, 28), (3000, 0.6, 24)], "FSQ": [(64_000, 0.9, 32)]}
    references = [("mean image", 0.4, 19.5), ("black", 0.0, 14)]
    for name in "ab":
        charts.rate_curve(tmp_path / f"{name}.png", curves, references)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    panels = panels_of(drawn[0])
    assert list(panels) == ["foreground SSIM", "PSNR (dB)"]
    for axes, expected in zip(panels.values(), ([[0.6, 0.8], [0.9], 0.4, 0], [[24, 28], [32], 19.5, 14]), strict=True):
        vq, fsq, mean, black = axes.lines
        assert axes.get_xscale() == "log"
        assert vq.get_xdata().tolist() == [3000, 9000] and vq.get_ydata().tolist() == expected[0]
        assert fsq.get_ydata().tolist() == expected[1] and fsq.get_marker() != vq.get_marker()
        assert [set(line.get_ydata()) for line in (mean, black)] == [{expected[2]}, {expected[3]}]
        assert mean.is_dashed() and black.is_dashed() and not vq.is_dashed()
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["VQ", "FSQ", "mean image", "black"]


@pytest.mark.parametrize(
    ("curves", "references", "message"),
    [
        ({}, (), "at least one curve"),
        ({"VQ": []}, (), "VQ: points must be"),
        ({"VQ": [(1, 0.5, 20), (2, 0.5)]}, (), "VQ: points must be"),
        ({"VQ": [(0, 0.5, 20)]}, (), "VQ: .* bits above 0"),
        ({"VQ": [(1, np.nan, 20)]}, (), "VQ: .* finite"),
        ({"VQ": [(1, 0.5, 20)]}, [("mean", 0.4)], "mean: points must be"),
    ],
)
def test_rate_curve_refuses_what_it_cannot_place(tmp_path, curves, references, message):
    with pytest.raises(ValueError, match=message):
        charts.rate_curve(tmp_path / "a.png", curves, references)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ charts of a report


def words_of(figure) -> list[str]:
    """The words of the legend of a figure."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_by_slice_index_draws_mean_and_deviation_over_each_index_and_counts_what_is_not_finite(tmp_path, drawn):
    z, values = [3, 1, 1, 1, 1, 3, 7, 3], [5.0, 1.0, 1.0, 1.0, 5.0, 5.0, np.nan, np.inf]
    charts.by_slice_index(tmp_path / "a.png", {"ours": (z, values), "black": ([1, 3], [0, 0])}, "SSIM", "Test people")
    (axes,) = drawn[0].axes
    ours, black = axes.lines
    assert ours.get_xdata().tolist() == [1, 3] and ours.get_ydata().tolist() == [2, 5]
    band = axes.collections[0].get_paths()[0].vertices
    corners = {(x, round(y**2, 6)) for x, y in band - [(0, 2)] if x == 1}
    assert corners == {(1, 3)}, "2 give or take the root of 3"
    assert (3, 5) in {tuple(corner) for corner in band}, "and no spread at 3"
    assert words_of(drawn[0]) == ["ours (2 not finite)", "black"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title("left")) == ("slice index", "SSIM", "Test people")
    assert ours.get_marker() != black.get_marker() and ours.get_linestyle() != black.get_linestyle()


def test_distances_are_shares_of_each_side_and_the_threshold_is_a_line(tmp_path, drawn):
    samples, baseline = np.array([0.1, 0.1, 0.5, 0.9]), np.linspace(0.2, 1, 100)
    charts.distances(tmp_path / "a.png", samples, baseline, 0.15, "distance")
    (axes,) = drawn[0].axes
    theirs, ours = (patch.get_data() for patch in axes.patches)
    assert ours.values.sum() == pytest.approx(100) and theirs.values.sum() == pytest.approx(100)
    assert (theirs.edges == ours.edges).all(), "the same bins"
    assert ours.values.max() == 50
    assert [set(line.get_xdata()) for line in axes.lines] == [{0.15}]
    assert words_of(drawn[0])[:2] == [
        "test people: 0.0% below the threshold",
        "generated: 50.0% below the threshold",
    ]
    charts.distances(tmp_path / "a.png", [0.3], [0.3], 0.3, "distance")
    assert "generated: 0.0% below the threshold" in words_of(drawn[1]), "at the threshold is not below it"


def test_embedding_places_every_point_by_group_or_by_number(tmp_path, drawn):
    points = np.random.default_rng(0).normal(size=(6, 2))
    groups = np.array(["real", "fake", "real", "fake", "fake", "real"])
    charts.embedding(tmp_path / "a.png", points, groups, "both")
    fake, real = drawn[0].axes[0].collections
    assert (real.get_offsets() == points[groups == "real"]).all()
    assert (fake.get_offsets() == points[groups == "fake"]).all()
    assert words_of(drawn[0]) == ["fake (3)", "real (3)"]
    shapes = [mark.get_paths()[0].vertices.shape for mark in (fake, real)]
    assert shapes[0] != shapes[1], "another marker, not only another colour"
    charts.embedding(tmp_path / "a.png", points, range(6), "slice index", continuous=True)
    axes, bar = drawn[1].axes
    assert axes.collections[0].get_array().tolist() == [0, 1, 2, 3, 4, 5]
    assert bar.get_ylim() == (0, 5)
    assert not drawn[1].legends


def test_ranking_keeps_its_order_from_the_top_and_prints_each_number(tmp_path, drawn):
    rows = {"floor": (-0.001, 0.002), "model": (0.02, None), "blurred": (0.5, 0.01)}
    charts.ranking(tmp_path / "a.png", rows, "KID")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [-0.001, 0.02, 0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(rows)
    assert axes.yaxis_inverted(), "the first at the top"
    assert [text.get_text() for text in axes.texts] == ["-0.001 ± 0.002", "0.02", "0.5 ± 0.01"]
    left, right = axes.get_xlim()
    assert left < -0.003 and right > 0.51
    segments = [
        segment for segment in axes.collections[0].get_segments() if np.isfinite(segment).all() and len(segment)
    ]
    ends = [segment[:, 0].tolist() for segment in segments]
    assert np.allclose(ends, [[-0.003, 0.001], [0.49, 0.51]]), "and no error bar where none is known"


def test_a_ranking_shows_bars_beside_one_that_is_hundreds_of_times_as_long(tmp_path, drawn):
    charts.ranking(tmp_path / "a.png", {"floor": (0.014, 0.019), "model": (0.034, 0.021), "bad": (10.5, 1.4)}, "KID")
    charts.ranking(tmp_path / "b.png", {"floor": (0.0, 0.0), "model": (0.3, 0.1), "bad": (8.0, 1.0)}, "KID")
    (far,), (near,) = (figure.axes for figure in drawn)
    assert far.get_xlabel() == "KID; logarithmic beyond 0.019" and near.get_xlabel() == "KID"
    for axes, least in ((far, 0.05), (near, 0.02)):
        widths = [np.ptp(axes.transData.transform([(0, 0), (bar.get_width(), 0)])[:, 0]) for bar in axes.patches]
        whole = axes.get_window_extent().width
        assert widths[1] > least * whole and widths[1] < widths[2] < 0.8 * whole


def test_ladder_joins_points_by_rising_calls_with_their_errors(tmp_path, drawn):
    curves = {"DDPM": [(1000, 0.02, 0.01), (10, 0.9, 0.1)], "DDIM": [(5, 0.3, 0), (50, 0.1, 0)]}
    charts.ladder(tmp_path / "a.png", curves, "KID")
    (axes,) = drawn[0].axes
    ddpm, ddim = (container.lines for container in axes.containers)
    assert ddpm[0].get_xdata().tolist() == [10, 1000] and ddpm[0].get_ydata().tolist() == [0.9, 0.02]
    assert np.allclose([bar[:, 1] for bar in ddpm[2][0].get_segments()], [[0.8, 1], [0.01, 0.03]])
    assert ddim[0].get_marker() != ddpm[0].get_marker()
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    charts.ladder(tmp_path / "a.png", {"DDIM": [(5, 0.3, 0), (50, -0.1, 0)]}, "KID")
    assert drawn[1].axes[0].get_yscale() == "linear", "an unbiased KID may be negative"


def test_histograms_are_means_of_shares_whatever_each_slice_holds(tmp_path, drawn):
    real = [[1, 3], [0, 0], [300, 100], [np.nan, 1]]
    charts.histograms(tmp_path / "a.png", real, [[0, 7]])
    (axes,) = drawn[0].axes
    real, fake = axes.lines
    assert real.get_xdata().tolist() == [25, 75], "centres of the bins, in % of the grey range"
    assert real.get_ydata().tolist() == [50, 50] and fake.get_ydata().tolist() == [0, 100]
    assert {25, 75} <= set(axes.collections[0].get_paths()[0].vertices[:, 1]), "50 % give or take 25 %"
    assert words_of(drawn[0]) == ["real: 2 slices", "generated: 1 slices"]


CHARTS = {
    "by_slice_index": ({"a": ([1, 2], [0.1, 0.2])}, "SSIM"),
    "distances": ([0.1, 0.2], [0.3], 0.05, "distance"),
    "embedding": (np.eye(2), ["a", "b"], "title"),
    "ranking": ({"floor": (0.1, 0.1)}, "KID"),
    "ladder": ({"DDIM": [(5, 0.1, 0.1)]}, "KID"),
    "histograms": ([[1, 2]], [[3, 4]]),
}


@pytest.mark.parametrize("name", CHARTS)
def test_charts_have_the_same_bytes_twice_and_fit_a_telephone(tmp_path, name):
    for copy in "ab":
        getattr(charts, name)(tmp_path / f"{copy}.png", *CHARTS[name])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert iio.imread(tmp_path / "a.png").shape[1] == 720
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("by_slice_index", ({}, "SSIM"), "at least one series"),
        ("by_slice_index", ({"a": ([1, 2], [1])}, "SSIM"), "a: z and values"),
        ("distances", ([], [1], 0, "d"), "samples must be"),
        ("distances", ([1], [np.nan], 0, "d"), "baseline must be"),
        ("distances", ([1], [1], np.nan, "d"), "threshold must be"),
        ("embedding", (np.zeros((2, 3)), [1, 2], "t"), "points must be"),
        ("embedding", (np.full((2, 2), np.nan), [1, 2], "t"), "points must be"),
        ("embedding", (np.zeros((2, 2)), [1], "t"), "2 points but groups"),
        ("embedding", (np.zeros((2, 2)), [1, np.nan], "t", True), "groups must be"),
        ("ranking", ({}, "KID"), "values of a ranking"),
        ("ranking", ({"a": (np.nan, 1)}, "KID"), "values of a ranking"),
        ("ladder", ({}, "KID"), "at least one curve"),
        ("ladder", ({"DDIM": [(0, 1, 1)]}, "KID"), "DDIM: .* network calls above 0"),
        ("histograms", ([1, 2], [[1, 2]]), "shapes"),
        ("histograms", ([[1, 2, 3]], [[1, 2]]), "shapes"),
        ("histograms", ([[1, 2]], [[0, 0]]), "generated: no histogram"),
    ],
)
def test_charts_refuse_what_they_cannot_place(tmp_path, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(charts, name)(tmp_path / "a.png", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_no_global_plotting_state():
    """pyplot keeps every figure alive and may look for a display: the source must never import it."""
    tree = ast.parse(Path(charts.__file__).read_text(encoding="utf-8"))
    names = [
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    ]
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any("pyplot" in name for name in names + modules)
