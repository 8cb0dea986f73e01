"""Pictures of landscapes: what is on them, and that panels can be compared."""

import json

import numpy as np
import pytest

from otmdr_jax.experiments import report
from otmdr_jax.experiments.report import page
from otmdr_jax.experiments.report.landscape import comparable
from tests.experiments.test_report_page import make

pytest.importorskip("matplotlib")


def record(losses, kind="random", points=None, labels=None, **more):
    losses = np.asarray(losses, float)
    axes = [np.linspace(-1, 1, n).tolist() for n in losses.shape]
    return {
        "step": 7,
        "kind": kind,
        "axes": axes,
        "axis_names": [f"Axis {i} (unit)" for i in range(len(axes))],
        # As in landscape.json, where null stands for what is not finite.
        "losses": np.where(np.isfinite(losses), losses, None).tolist(),
        "points": points,
        "labels": labels,
        "explained_variance": None,
        "eigenvalues": None,
        **more,
    }


def bowl(scale, n=9):
    x, y = np.meshgrid(np.linspace(-1, 1, n), np.linspace(-1, 1, n), indexing="ij")
    return 0.01 + scale * (x**2 + 3 * (y - 0.5) ** 2)


def panels(figure, what):
    return [ax for ax in figure.axes if (ax.get_gid() or "").startswith(what)]


def filled(ax):
    """The sets of contours that are filled."""
    return [c for c in ax.collections if hasattr(c, "levels") and c.filled][0]


class TestContours:
    def test_panels_share_axes_levels_and_colours(self):
        pairs = [("SGD", record(bowl(10))), ("OT-MDR", record(bowl(1)))]
        figure = report.contour_figure(pairs)
        one, two = panels(figure, "landscape:")
        assert [ax.get_gid() for ax in (one, two)] == [
            "landscape:SGD", "landscape:OT-MDR",
        ]  # fmt: skip
        assert one.get_xlim() == two.get_xlim() == (-1, 1)
        first, second = filled(one), filled(two)
        np.testing.assert_array_equal(first.levels, second.levels)
        np.testing.assert_allclose(
            first.levels[[0, -1]], [bowl(1).min(), bowl(10).max()]
        )
        ends = [(c.norm.vmin, c.norm.vmax) for c in (first, second)]
        assert ends[0] == ends[1]
        # Decades: levels of equal ratio.
        assert np.ptp(np.diff(np.log(first.levels))) < 1e-9
        bars = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
        assert [bar.get_ylabel() for bar in bars] == ["Mean loss (nats)"] * 2
        assert bars[0].get_ylim() == bars[1].get_ylim()
        assert bars[0].get_yticks().tolist() == [0.01, 0.1, 1, 10]
        assert one.get_xlabel() == "Axis 0 (unit)"
        assert one.get_ylabel() == "Axis 1 (unit)"

    def test_the_colour_bar_has_round_numbers(self):
        losses = np.linspace(1.93, 6.338, 9).reshape(3, 3)
        figure = report.contour_figure([("a", record(losses))])
        (bar,) = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
        assert bar.get_ylim() == (1.93, 6.338)
        shown = [x for x in bar.get_yticks() if 1.93 <= x <= 6.338]
        np.testing.assert_allclose(shown, np.arange(2.4, 6.1, 0.6))

    def test_the_first_axis_runs_to_the_right(self):
        losses = np.array([[1.0, 1.1], [2.0, 2.1], [3.0, 3.1]])  # grows along axis 0
        figure = report.contour_figure([("a", record(losses))])
        (ax,) = panels(figure, "landscape:")
        contours = filled(ax)
        assert np.ptp(np.diff(contours.levels)) < 1e-9  # no decades: equal steps
        lowest = contours.get_paths()[0].vertices
        assert lowest[:, 0].max() < -0.8 and np.ptp(lowest[:, 1]) > 1

    def test_what_is_not_finite_is_left_out(self):
        losses = bowl(1)
        losses[0] = np.nan, *[np.inf] * 8
        figure = report.contour_figure([("a", record(losses))])
        (ax,) = panels(figure, "landscape:")
        contours = filled(ax)
        drawn = np.concatenate([p.vertices for p in contours.get_paths()])
        assert drawn[:, 0].min() >= -0.75 and np.isfinite(contours.levels).all()

    def test_runs_and_checkpoints_are_marked(self):
        points = [[0.0, 0.0], [0.5, -0.5], [-0.5, 0.2]]
        runs = record(bowl(1), "runs", points, ["a", "b$", "c"])
        figure = report.contour_figure([("three", runs)])
        (ax,) = panels(figure, "landscape:")
        names = [text.get_text() for text in figure.legends[0].texts]
        assert names == ["a", r"b\$", "c"]
        found = [line.get_xydata()[0].tolist() for line in ax.lines]
        assert found == points
        path = record(
            bowl(1), "trajectory", points, ["step 1", "step 2", "step 9"],
            explained_variance=[0.9, 0.05],
        )  # fmt: skip
        figure = report.contour_figure([("run", path)])
        (ax,) = panels(figure, "landscape:")
        assert ax.lines[0].get_xydata().tolist() == points
        names = [text.get_text() for text in figure.legends[0].texts]
        assert names == ["Checkpoints", "step 1 (first)", "step 9 (last)"]
        assert "90 % + 5 % of the variance" in ax.get_title()

    def test_eigenvalues_are_told(self):
        one = record(bowl(1), "hessian", eigenvalues=[9.08, 7.0])
        figure = report.contour_figure([("SGD", one)])
        assert figure.axes[0].get_title() == "SGD\nEigenvalues 9.08, 7"

    def test_a_flat_loss_is_drawn(self):
        figure = report.contour_figure([("flat", record(np.full((3, 3), 2.3)))])
        assert panels(figure, "landscape:")


class TestSurfaces:
    def test_panels_share_heights_and_colours(self):
        pairs = [("SGD", record(bowl(10))), ("OT-MDR", record(bowl(1)))]
        figure = report.surface_figure(pairs)
        one, two = panels(figure, "surface:")
        assert one.get_zlim() == two.get_zlim()
        surfaces = [ax.collections[0] for ax in (one, two)]
        assert surfaces[0].get_clim() == surfaces[1].get_clim()
        # Heights are logarithms, ticks say the losses.
        np.testing.assert_allclose(
            one.get_zlim(), np.log10([bowl(1).min(), bowl(10).max()]), atol=0.1
        )
        ticks = zip(one.get_zticks(), one.get_zticklabels(), strict=True)
        assert all(float(t.get_text()) == pytest.approx(10**at) for at, t in ticks)


class TestLines:
    def test_methods_share_one_axes(self):
        values = np.linspace(-1, 1, 5) ** 2 + 0.01
        values[0] = np.nan
        pairs = [("SGD", record(values)), ("SAM", record(2 * values))]
        figure = report.line_figure(pairs)
        (ax,) = figure.axes
        lines = {line.get_gid(): line for line in ax.lines}
        assert set(lines) == {"landscape:SGD", "landscape:SAM"}
        np.testing.assert_array_equal(lines["landscape:SGD"].get_ydata(), values)
        assert ax.get_yscale() == "log" and ax.get_ylabel() == "Mean loss (nats)"

    def test_runs_are_marked_on_their_line(self):
        values = record([1.0, 2.0, 1.5], "runs", [[-1.0], [0.5]], ["a", "b"])
        (ax,) = report.line_figure([("both", values)]).axes
        marks = [line.get_xydata()[0].tolist() for line in ax.lines[1:]]
        assert marks == [[-1, 1], [0.5, 1.75]]


def test_the_picture_fits_the_dimensions(tmp_path):
    two, one = record(bowl(1)), record([1.0, 2.0])
    for name, pairs, surface in (
        ("contours.png", [("a", two)], False),
        ("surface.png", [("a", two)], True),
        ("line.png", [("a", one)], False),
    ):
        path = report.plot_landscape(pairs, tmp_path / name, surface=surface)
        assert path.stat().st_size > 5_000


@pytest.mark.parametrize(
    ("draw", "pairs", "message"),
    [
        (report.contour_figure, [], "at least one"),
        (report.contour_figure, [("a", record([1.0, 2.0]))], "2 dimensions .* got 1"),
        (report.line_figure, [("a", record(bowl(1)))], "1 dimensions .* got 2"),
        (
            lambda pairs: report.plot_landscape(pairs, "x.png"),
            [("a", record(bowl(1))), ("b", record([1.0, 2.0]))],
            "equal dimensions .* got 1, 2",
        ),
        (report.contour_figure, [("a", record(np.full((2, 2), np.nan)))], "finite"),
    ],
)
def test_bad_input_says_what_must_hold(draw, pairs, message):
    with pytest.raises(ValueError, match=message):
        draw(pairs)


def test_what_belongs_side_by_side():
    flat = bowl(1)

    def one(kind="random", seed=0, split="train", losses=flat):
        return record(losses, kind, seed=seed, split=split, num_examples=9)

    pairs = [
        ("a", one()), ("b", one()), ("c", one(seed=1)), ("d", one(split="test")),
        ("e", one("hessian")), ("f", one("hessian", seed=1)), ("g", one("runs")),
        ("h", one("runs")), ("i", one(losses=[1.0, 2.0])),
    ]  # fmt: skip

    def of_data(text):
        return {**one(), "settings": {"data": text}}

    pairs[2:2] = [
        ("n", of_data("mine-9-labels1-p12")),  # by their pixels, and by their files
        ("m", of_data("mine-9-labels1-r34")),
        ("o", of_data("mine-9-labels2-p12")),
    ]
    groups = comparable(pairs)
    names = ["".join(label for label, _ in group) for group in groups]
    assert names == ["ab", "nm", "o", "c", "d", "ef", "g", "h", "i"]


def test_a_report_shows_the_landscapes_of_its_runs(tmp_path):
    runs = [
        make("SGD", 0, folder=tmp_path / "a"),
        make("SAM", 1, folder=tmp_path / "b"),
    ]
    for run, scale in zip(runs, (10, 1), strict=True):
        run.folder.mkdir()
        one = record(bowl(scale), seed=0, split="train", num_examples=1000)
        (run.folder / "landscape.json").write_text(json.dumps(one))
    found = page.compose("Title", runs, report.summarise(runs), whole=True)
    text = found.text.split("## Loss landscape")[1].split("\n## ")[0]
    assert "1000 images of the train set" in text and "own norm" in text
    names = ("landscape", "landscape_surface")
    for name, what in zip(names, ("landscape", "surface"), strict=True):
        assert f"({name}.png)" in text
        both = panels(found.pictures[name].figure(), what)
        assert [ax.get_gid() for ax in both] == [f"{what}:SGD", f"{what}:SAM"]
