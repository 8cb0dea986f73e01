"""The whole report: what its page holds, and that its numbers are right."""

import html
import html.parser
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from otmdr_jax import data, metrics
from otmdr_jax.bnn import summary
from otmdr_jax.experiments import report
from otmdr_jax.experiments.report import (
    document,
    examples,
    page,
    plots,
    predictions,
    records,
    significance,
)
from tests.experiments.test_report import history

SVG = "http://www.w3.org/2000/svg"
CONFIG = {"method": "sam", "num_particles": 1, "data": "digits", "epochs": 2}
LABELS = np.asarray(data.load("digits").test.labels)
SECTIONS = [
    "Significance", "Learning curves", "Reliability", "All metrics", "Calibration",
    "Confusion", "Risk and coverage", "Shift", "Sharpness", "Loss landscape",
    "Worst examples", "Most uncertain examples", "Configuration", "Versions",
]  # fmt: skip


def make(label="SAM", seed=0, skill=3.0, folder=None, **config):
    """A run on the digits whose predictions are right by its skill."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(LABELS), 10))
    logits[np.arange(len(LABELS)), LABELS] += skill
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = {k: float(v) for k, v in metrics.evaluate(log_probs, LABELS).items()}
    return report.Run(
        folder, label, {**CONFIG, "seed": seed, **config}, found, history(seed),
        log_probs, LABELS,
    )  # fmt: skip


class Page(html.parser.HTMLParser):
    """Headings, pictures, marked paragraphs, and everything that a page refers to."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.links = [], []
        self.missing, self.alts, self.tags, self._open = [], [], set(), None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag in ("h1", "h2", "h3"):
            self._open = (tag, [])
        elif tag == "blockquote":
            self._open = (tag, [])
        elif tag == "svg":
            self.alts.append(attrs["aria-label"])
        elif tag in ("a", "link", "script", "iframe"):
            self.links.append(attrs.get("href") or attrs.get("src"))

    def handle_data(self, text):
        if self._open:
            self._open[1].append(text)

    def handle_endtag(self, tag):
        if self._open and self._open[0] == tag:
            text = "".join(self._open[1])
            found = self.missing if tag == "blockquote" else self.headings
            found.append(text.strip())
            self._open = None


def pictures(text):
    """Description -> the SVG of each panel and legend of a page."""
    found = [ElementTree.fromstring(x) for x in re.findall("<svg.*?</svg>", text)]
    return {svg.get("aria-label"): svg for svg in found}


def texts(svg):
    return ["".join(x.itertext()) for x in svg.iter(f"{{{SVG}}}text")]


def references(svg):
    for element in svg.iter():
        for key, value in element.items():
            if key.endswith("}href") and not value.startswith("data:"):
                assert value.startswith("#")
                yield value[1:]
            yield from re.findall(r"url\(#(.+?)\)", value)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page of two methods, one of them twice; one run has records beside it."""
    root = tmp_path_factory.mktemp("whole")
    runs = []
    for name, label, seed, skill in (
        ("a", "SGD", 0, 2.0), ("b", "SAM", 1, 4.0), ("c", "SAM", 2, 4.0),
    ):  # fmt: skip
        (root / name).mkdir()
        runs.append(make(label, seed, skill, root / name))
    measures = [
        {"name": "sam_gap", "value": 0.0123, "standard_error": None},
        {"name": "hessian_trace", "value": 45.6, "standard_error": 0.7},
    ]
    (root / "a" / "sharpness.json").write_text(
        json.dumps({"num_examples": 99, "step": 7, "measures": measures})
    )
    path = report.write(
        root / "page", runs, "Digits & <b>noise</b>", "otmdr report a b c",
        whole=True, baseline="SGD",
    )  # fmt: skip
    return path, runs


class TestThePage:
    @pytest.mark.slow
    def test_has_every_section_once_and_in_order(self, written):
        page = Page(written[0].read_text())
        titles = [x for x in page.headings if x in SECTIONS]
        assert titles == SECTIONS
        assert page.headings[0] == "Digits & <b>noise</b>" and "b" not in page.tags
        # The links at its head lead to the sections.
        assert len(page.links) == len(SECTIONS) + 1  # and the command
        text = written[0].read_text()
        for link in page.links:
            assert link.startswith("#") and f'id="{link[1:]}"' in text

    @pytest.mark.slow
    def test_needs_no_other_file(self, written):
        text = written[0].read_text()
        page = Page(text)
        assert not {"script", "link", "iframe"} & page.tags
        assert not re.search(r'(src|href|srcset)="(?!#|data:)', text)
        assert "@import" not in text and not re.search(r"url\((?!#)", text)

    def test_panels_are_the_pictures_of_the_markdown_cut_apart(self, written):
        text = written[0].read_text()
        found = pictures(text)
        assert Page(text).alts == list(found)
        shown = re.findall(
            r"!\[(.+?)\]\((\S+)\)", (written[0].parent / "report.md").read_text()
        )
        assert len(shown) == 9
        for alt, name in shown:
            with Image.open(written[0].parent / name) as whole:
                across, down = (72 * x / plots.DPI for x in whole.size)
            parts = [x for own, x in found.items() if own.partition(",")[0] == alt]
            boxes = [[float(x) for x in part.get("viewBox").split()] for part in parts]
            for part, (left, top, width, height) in zip(parts, boxes, strict=True):
                # 72 units an inch; a phone shows each nearly as large as it was drawn.
                assert left >= -0.1 and top >= -0.1 and width <= 360
                assert left + width <= across + 0.1 and top + height <= down + 1
                assert int(part.get("width")) == round(96 * width / 72)
            corners = [tuple(box[:2]) for box in boxes]
            assert len(set(corners)) == len(corners)
        # Panels have room beside each other, or stand below each other.
        assert 'class="panels" style="--panel: 2' in text
        assert "repeat(auto-fit, minmax(min(100%" in text

    def test_what_a_panel_says_is_text_of_that_panel_alone(self, written):
        found = pictures(written[0].read_text())
        titles = ("Training loss (nats)", "Test accuracy (%)", "Test NLL (nats)")
        for i, title in enumerate(titles, 1):
            said = texts(found[f"Learning curves, {i} of 3"])
            assert title in said and "Epoch" in said and "1.0" in said
            assert not set(titles) - {title} & set(said)
        assert texts(found["Learning curves, legend"]) == ["SGD", "SAM, n = 2"]
        worst = examples.worst(written[1][0])
        for i in range(examples.COUNT):
            name = f"Worst examples of SGD, {i + 1} of {examples.COUNT}"
            between = f"{worst.labels[i]} → {worst.predicted[i]}"
            assert texts(found[name]) == [between, f"{worst.confidence[i]:.0%}"]

    def test_pixels_are_where_they_are_the_content(self, written):
        found = pictures(written[0].read_text())
        with_pixels = {
            name.partition(" of ")[0].partition(",")[0]
            for name, svg in found.items()
            if next(svg.iter(f"{{{SVG}}}image"), None) is not None
        }
        assert with_pixels == {
            "Confusion matrices", "Worst examples", "Uncertain examples",
        }  # fmt: skip

    def test_a_picture_is_drawn_in_the_ink_and_on_the_paper_of_the_page(self, written):
        text = written[0].read_text()
        for svg in re.findall("<svg.*?</svg>", text):
            bare = re.sub(r'href="data:[^"]*"', "", svg)
            assert plots.INK not in bare and plots.PAPER not in bare
        # A share in a cell of a colour map keeps a colour of its own.
        matrix = pictures(text)["Confusion matrices, 1 of 2"]
        fills = {x.get("style") for x in matrix.iter(f"{{{SVG}}}text")}
        assert any(plots.DARK in x for x in fills)
        assert any(plots.LIGHT in x for x in fills)

    def test_a_picture_refers_to_its_own_parts_which_no_other_has(self, written):
        text = written[0].read_text()
        ids = re.findall(r'\bid="(.+?)"', text)
        assert len(set(ids)) == len(ids)
        for svg in pictures(text).values():
            own = {x.get("id") for x in svg.iter() if x.get("id")}
            assert own == set(references(svg))

    @pytest.mark.slow
    @pytest.mark.skipif(not shutil.which("chromium"), reason="there is no browser")
    @pytest.mark.parametrize(
        ("width", "scheme"), [(320, 1), (400, 0), (400, 1), (1280, 0), (1280, 1)]
    )
    def test_a_screen_shows_every_number(self, written, tmp_path, width, scheme):
        """Only tables are scrolled sideways, to their last number, beside the names.

        The headline is not, from 400 px on. 0 is the browser's dark scheme, 1 light.
        """
        framed = html.escape(written[0].read_text())
        (tmp_path / "frame.html").write_text(
            f'<iframe style="width:{width}px" srcdoc="{framed}"></iframe>'
            + """<script>
            onload = () => {
              const page = document.querySelector("iframe").contentDocument;
              const box = x => x.getBoundingClientRect();
              const found = {
                page: page.documentElement.scrollWidth, wide: 0, cut: 0, tables: 0,
              };
              const light = x => x.match(/[\\d.]+/g).slice(0, 3)
                .reduce((sum, one) => sum + Number(one), 0) / 3;
              found.paper = light(getComputedStyle(page.body).backgroundColor);
              const inks = [...page.querySelectorAll("figure text")]
                .filter(x => !x.style.fill).map(x => light(getComputedStyle(x).fill));
              found.inks = [inks.length, Math.min(...inks), Math.max(...inks)];
              const headline = page.querySelector(".scroll");
              found.headline = headline.scrollWidth - headline.clientWidth;
              for (const image of page.querySelectorAll("svg"))
                if (box(image).right > page.documentElement.clientWidth) found.cut++;
              for (const table of page.querySelectorAll(".scroll")) {
                found.tables++;
                if (box(table).left < 0) found.cut++;
                if (table.scrollWidth > table.clientWidth + 1) found.wide++;
                table.scrollLeft = 1e6;
                for (const row of table.querySelectorAll("tr")) {
                  const names = box(row.firstElementChild);
                  const last = box(row.lastElementChild);
                  if (Math.abs(names.left - box(table).left) > 1) found.cut++;
                  if (last.right > box(table).right + 1) found.cut++;
                  if (last.left < names.right - 1) found.cut++;
                }
              }
              document.title = JSON.stringify(found);
            };
            </script>"""
        )
        shown = subprocess.run(
            ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu",
             f"--blink-settings=preferredColorScheme={scheme}",
             f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
             (tmp_path / "frame.html").as_uri()],
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout  # fmt: skip
        found = json.loads(re.search("<title>(.*?)</title>", shown)[1])
        assert found["tables"] > 5 and found["cut"] == 0
        assert found["page"] <= width
        assert found["wide"] == 0 or width < 1280
        assert found["headline"] <= 1 or width < 400
        count, darkest, lightest = found["inks"]
        assert count > 100
        if scheme:
            assert found["paper"] > 240 and lightest < 60
        else:
            assert found["paper"] < 40 and darkest > 200

    def test_names_what_is_missing_and_what_makes_it(self, written):
        missing = Page(written[0].read_text()).missing
        for command, runs in (
            ("calibrate", "SGD (a), SAM (b), SAM (c)"),
            ("shift", "SGD (a), SAM (b), SAM (c)"),
            ("sharpness", "SAM (b), SAM (c)"),
            ("landscape", "SGD (a), SAM (b), SAM (c)"),
        ):
            (line,) = [x for x in missing if f"otmdr {command} RUN" in x]
            assert line.startswith(f"Missing: {runs}.")
        assert len(missing) == 4

    def test_shows_the_records_of_runs(self, written):
        text = (written[0].parent / "report.md").read_text()
        assert "| SAM's gap, ρ = 0.05 (nats) | 0.0123 |" in text
        assert "| Trace of the Hessian | 45.6 ± 0.7 |" in text
        assert "99 training images" in text

    def test_metrics_are_those_of_the_predictions(self, written):
        path, runs = written
        text = (path.parent / "report.md").read_text()
        of_sam = [
            metrics.sce(np.exp(run.log_probs), run.labels) for run in runs[1:]
        ]  # fmt: skip
        sgd = metrics.sce(np.exp(runs[0].log_probs), LABELS)
        assert f"| SCE ↓ | {sgd:.4f} | {np.mean(of_sam):.4f} |" in text

    @pytest.mark.slow
    def test_a_run_without_data_or_numbers_is_named(self, tmp_path):
        gone = make("gone", data=str(tmp_path / "nowhere.npz"))
        sick = make("sick")
        sick = sick._replace(log_probs=np.full_like(sick.log_probs, np.nan))
        other = make("other", data_seed=3)._replace(
            log_probs=gone.log_probs[:50], labels=gone.labels[:50]
        )
        path = report.write(tmp_path / "page", [gone, sick, other], "x", whole=True)
        missing = "\n".join(Page(path.read_text()).missing)
        assert "gone: its images cannot be read" in missing
        assert "sick: its predictions are not finite" in missing
        assert "other: the data here differ from its test set" in missing
        assert "sick, other: their test sets differ from gone's" in missing

    @pytest.mark.slow
    def test_a_run_cannot_write_into_the_page(self, tmp_path):
        run = make("<script>alert(1)</script>", folder=tmp_path / "<img src=x>")
        path = report.write(tmp_path / "page", [run], "x", whole=True)
        page = Page(path.read_text())
        assert "script" not in page.tags and len(page.alts) > 9
        assert page.alts[-1].startswith("Uncertain examples of <script>alert(1)</scr")
        assert "<script>alert(1)</script> (<img src=x>)" in page.headings

    @pytest.mark.slow
    def test_a_calibration_of_another_step_is_said(self, tmp_path):
        """`otmdr calibrate` keeps the step among its settings."""
        record = {"how": "h", "methods": [], "conformal": [], "alpha": 0.1}
        record["settings"] = {"step": 3}
        (tmp_path / "calibration.json").write_text(json.dumps(record))
        run = make("SGD", folder=tmp_path)
        run = run._replace(result={**run.result, "steps": 7})
        (said,) = records.out_of_date([run], records.CALIBRATION)
        assert said.endswith("measured at step 3, but its result is that of step 7.")

    def test_records_of_other_conditions_are_compared_where_they_are_alike(
        self, tmp_path
    ):
        def record(step, n, pairs, why=None):
            rows = [
                {"name": name, "severity": s, "accuracy": 0.1 * s, "nll": 1.0, "ece": 0}
                for name, s in pairs
            ]
            gone = [{"name": "svhn_cropped", "why": why}] if why else []
            return {"step": step, "num_examples": n, "seed": 0, "sets": [], "ood": [],
                    "clean": {"accuracy": 1.0, "nll": 0.0, "ece": 0.0},
                    "corruptions": rows, "missing": gone}  # fmt: skip

        pairs = [("contrast", 1), ("contrast", 5), ("rotation", 1)]
        runs = []
        for name, label, found in (
            ("a", "SGD", record(7, 360, pairs, "it is not prepared")),
            ("b", "SAM", record(3, 100, pairs[1:])),
        ):
            (tmp_path / name).mkdir()
            (tmp_path / name / "shift.json").write_text(json.dumps(found))
            run = make(label, folder=tmp_path / name)
            runs.append(run._replace(result={**run.result, "steps": 7}))
        path = report.write(tmp_path / "page", runs, "x", whole=True)
        text = (path.parent / "report.md").read_text()
        # The mean of contrast 5 and rotation 1, which both have.
        assert "| SGD | 100.00 | 30.00 |" in text and "| SAM | 100.00 | 30.00 |" in text
        assert "the 2 pairs of corruption and severity that all methods have" in text
        assert "SGD on 360, SAM on 100 examples" in text
        assert "SAM (b) was measured at step 3, but its result" in text
        assert "result is that of step 7." in text
        assert "SGD (a) was measured" not in text
        assert "**Missing:** svhn_cropped: it is not prepared" in text

    @pytest.mark.slow
    def test_runs_in_folders_of_one_name_are_told_apart(self, tmp_path):
        runs = []
        for i, place in enumerate(("p", "q")):
            folder = tmp_path / place / "run"
            folder.mkdir(parents=True)
            row = {"name": "sam_gap", "value": 1.5 + i, "standard_error": None}
            (folder / "sharpness.json").write_text(
                json.dumps({"num_examples": 9, "step": 7, "measures": [row]})
            )
            runs.append(make(seed=i, folder=folder))
        path = report.write(tmp_path / "page", runs, "x", whole=True)
        text = (path.parent / "report.md").read_text()
        assert "| Measure | SAM (p/run) | SAM (q/run) |" in text
        assert "| SAM's gap, ρ = 0.05 (nats) | 1.5 | 2.5 |" in text

    @pytest.mark.slow
    def test_a_landscape_without_a_finite_loss_is_named(self, tmp_path):
        record = {"step": 7, "kind": "random", "split": "train", "num_examples": 9,
                  "axes": [[0, 1]], "losses": [None, None], "points": None}  # fmt: skip
        (tmp_path / "landscape.json").write_text(json.dumps(record))
        path = report.write(tmp_path / "page", [make(folder=tmp_path)], "x", whole=True)
        missing = Page(path.read_text()).missing
        assert "Missing: SAM: none of its losses is finite." in missing

    @pytest.mark.slow
    def test_writing_anew_leaves_no_picture_of_before_and_no_file_of_others_out(
        self, tmp_path
    ):
        runs = [make("SGD", 0), make("SAM", 1)]
        report.write(tmp_path, runs, "x", whole=True)
        (tmp_path / "mine.png").write_bytes(b"mine")
        assert (tmp_path / "worst_1.png").exists()
        report.write(tmp_path, runs[:1], "x", whole=True)
        assert not (tmp_path / "worst_1.png").exists()
        assert (tmp_path / "worst_0.png").exists() and (tmp_path / "mine.png").exists()

    def test_an_unknown_baseline_is_refused_before_anything_is_written(self, tmp_path):
        with pytest.raises(ValueError, match="baseline must be one of 'SAM'; got 'x'"):
            report.write(tmp_path / "p", [make()], "x", whole=True, baseline="x")
        assert not (tmp_path / "p").exists()

    @pytest.mark.slow
    def test_says_what_html_needs(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "markdown_it", None)
        with pytest.raises(ImportError, match=r"markdown-it-py\..*'\.\[train\]'"):
            report.write(tmp_path / "p", [make()], "x", whole=True)
        assert not (tmp_path / "p").exists()

    def test_says_what_templates_need(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
        document._templates.cache_clear()
        with pytest.raises(ImportError, match=r"Jinja2\..*'\.\[train\]'"):
            report.write(tmp_path / "p", [make()], "x")
        assert not (tmp_path / "p").exists()

    def test_calibration_has_a_line_for_each_metric(self):
        nll = {"raw": 0.5, "raw_std": None, "calibrated": 0.25, "calibrated_std": 0.125}
        ece = {"raw": 0.1, "raw_std": 0.5, "calibrated": None, "calibrated_std": None}
        temperature = {"name": "temperature", "temperature": 2.0}
        found = {
            "methods": [
                {**temperature, "metrics": {"nll": nll, "ece": ece}},
                {"name": "matrix", "why": "too few examples"},
            ]
        }
        assert records.calibration_table(found) == (
            ["Metric", "raw", "temperature", "matrix"],
            [
                ["Temperature", "-", "2.000", "-"],
                ["NLL ↓", "0.5000", "0.2500 ± 0.1250", "failed"],
                ["ECE ↓", "0.1000 ± 0.5000", "-", "failed"],
            ],
        )
        found["methods"] = found["methods"][1:]
        table = records.calibration_table(found)
        assert table == (["Metric", "matrix"], [["Temperature", "-"]])

    def test_a_broken_record_is_named(self, tmp_path):
        (tmp_path / "shift.json").write_text("[1")
        run = make(folder=tmp_path)
        with pytest.raises(ValueError, match=r"shift\.json is no JSON"):
            records.read_record(run, records.SHIFT)
        (tmp_path / "shift.json").write_text("[1]")
        with pytest.raises(ValueError, match="a JSON object must stand here"):
            records.read_record(run, records.SHIFT)
        (tmp_path / "shift.json").write_text('{"clean": {}, "step": 3}')
        with pytest.raises(ValueError, match="lacks num_examples, corruptions, sets"):
            records.read_record(run, records.SHIFT)


class TestSignificance:
    @pytest.mark.slow
    def test_one_run_each_is_the_bootstrap_and_the_paired_test(self):
        runs = [make("SGD", 0, 2.0), make("SAM", 1, 2.2)]
        _, found = significance.compare(runs)
        p, other = (np.exp(run.log_probs) for run in (runs[1], runs[0]))
        for name in significance.TESTED:
            metric = getattr(metrics, name)
            interval = metrics.bootstrap(metric, p, LABELS)
            test = metrics.paired_test(metric, p, other, LABELS)
            np.testing.assert_allclose(found.intervals[name], interval, rtol=1e-9)
            mine = found.against[name]
            assert mine.difference == pytest.approx(test.difference, rel=1e-7)
            assert mine.p_value == test.p_value

    def test_the_interval_holds_what_the_test_does_not_reject(self):
        """By a loop over swaps, of differences just inside and outside of its ends."""
        rng = np.random.default_rng(3)
        gaps = np.stack([rng.gamma(0.4, size=30) - 0.3, rng.normal(0.3, size=30)], 1)
        found = significance.compare_means(
            gaps + 7.0, np.full_like(gaps, 7.0), num_samples=199, seed=5
        )
        rng = np.random.default_rng(5)
        swaps = [np.where(rng.random(30) < 0.5, -1.0, 1.0) for _ in range(199)]

        def p_of(own, difference):
            shifted = own - difference
            as_large = [abs(x @ shifted) >= abs(shifted.sum()) - 1e-12 for x in swaps]
            return (1 + sum(as_large)) / 200

        for own, one in zip(gaps.T, found, strict=True):
            assert one.difference == pytest.approx(own.mean())
            assert one.p_value == p_of(own, 0.0)
            step = 1e-9
            for end, inwards in ((one.low, step), (one.high, -step)):
                assert p_of(own, end + inwards) >= 0.05 > p_of(own, end - inwards)
            student = stats.ttest_1samp(own, 0.0).confidence_interval()
            assert one.low == pytest.approx(student.low, abs=0.07)
            assert one.high == pytest.approx(student.high, abs=0.07)

    @pytest.mark.parametrize(
        ("wins", "unlike"), [(5, 5), (6, 6), (8, 9), (7, 9), (4, 9), (0, 9), (0, 5)]
    )
    def test_no_interval_excludes_0_beside_a_large_p_value(self, wins, unlike):
        """Of right and wrong predictions the test is McNemar's; few differ of 60."""
        gaps = np.zeros((60, 1))
        gaps[:unlike] = np.where(np.arange(unlike) < wins, 1.0, -1.0)[:, None]
        (found,) = significance.compare_means(gaps, 0 * gaps, num_samples=3000)
        want = stats.binomtest(wins, unlike).pvalue
        assert found.p_value == pytest.approx(want, abs=0.025)
        assert (found.p_value < 0.05) == (want < 0.05)
        assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
        if (wins, unlike) == (5, 5):  # p = 0.06, where a bootstrap interval excludes 0
            rows = np.random.default_rng(0).integers(0, 60, (999, 60))
            assert np.quantile(gaps[rows].mean(axis=1), 0.025) > 0

    def test_the_interval_and_the_p_value_agree_on_any_data(self):
        rng = np.random.default_rng(0)
        seen = set()
        for seed in range(150):
            count = int(rng.integers(2, 40))
            thirds = rng.integers(-3, 4, (count, 1)) / 3  # means over three runs
            gaps = thirds + rng.choice([0.0, 0.3, rng.normal()])
            (found,) = significance.compare_means(
                gaps, 0 * gaps, num_samples=int(rng.choice([10, 99, 200])), seed=seed
            )
            excluded = not found.low <= 0 <= found.high
            assert excluded == (found.p_value < 0.05)
            assert found.low <= found.difference <= found.high
            seen.add(excluded)
        assert seen == {True, False}

    def test_seeds_are_averaged_example_by_example(self):
        runs = [make("SGD", 0, 2.0), make("SGD", 1, 2.0), make("SAM", 2, 3.0)]
        sgd, sam = significance.compare(runs, "SAM")
        for name in significance.TESTED:
            values = [getattr(metrics, name)(np.exp(r.log_probs), LABELS) for r in runs]
            mean = np.mean(values[:2])
            assert sgd.intervals[name].value == pytest.approx(mean, rel=1e-12)
            difference = sgd.against[name].difference
            assert difference == pytest.approx(mean - values[2], rel=1e-9)
            assert sgd.against[name].p_value < 0.01
        assert sgd.n == 2 and sam.against == {}

    def test_a_baseline_may_be_written_in_lower_case(self):
        assert significance.find_baseline(["SGD", "SAM"], "sgd") == "SGD"
        assert significance.find_baseline(["a", "A"], "A") == "A"
        with pytest.raises(ValueError, match="baseline must be one of"):
            significance.find_baseline(["aB", "Ab"], "ab")

    def test_of_infinite_values_nothing_is_said(self):
        runs = [make("SGD", 0), make("SAM", 1)]
        for i in (0, 1):
            log_probs = np.full_like(runs[i].log_probs, -np.inf)
            log_probs[:, LABELS[0]] = 0.0
            runs[i] = runs[i]._replace(log_probs=log_probs)
        found = significance.compare(runs)
        assert np.isnan(found[1].against["nll"].p_value)
        _, nll, _ = significance.tables(found)
        (line,) = [x for x in nll.lines if x[0] == "SAM"]
        assert nll.header[0] == "NLL ↓"
        assert line[-3:] == ["-", "-", "-"] and line[1] == "inf"
        # One infinite loss alone: any difference is as likely.
        one = np.array([[np.inf, 0.5], [0.1, 0.7], [0.2, 0.6]])
        infinite, known = significance.compare_means(one, np.zeros((3, 2)))
        assert infinite == (np.inf, -np.inf, np.inf, 1.0)
        assert np.isfinite(known.difference)

    def test_marks_what_is_significant(self):
        far = significance.compare([make("SGD", 0, 1.0), make("SAM", 1, 4.0)])
        near = significance.compare([make("SGD", 0, 3.0), make("SAM", 1, 3.0)])
        far, near = (
            [line[-1] for table in significance.tables(found) for line in table.lines]
            for found in (far, near)
        )
        assert "**< 0.001**" in far and not any("*" in p for p in near)


def drawn_colours(found):
    """Label -> the colours of its lines in the pictures and legends of a page."""
    from matplotlib.colors import to_hex

    colours, pictures = {}, {}
    panels = ("reliability", "confidence", "confusion", "worst", "uncertain")
    for name, picture in found.pictures.items():
        if name.startswith(panels):  # a panel for each label, no lines
            continue
        figure = picture.figure()
        for ax in figure.axes:
            for line in ax.lines:
                kind, _, label = str(line.get_gid()).partition(":")
                if label:
                    colours.setdefault(label, set()).add(to_hex(line.get_color()))
                    pictures.setdefault(label, set()).add(name)
        for legend in figure.legends:
            texts = [text.get_text() for text in legend.get_texts()]
            for text, handle in zip(texts, legend.legend_handles, strict=True):
                label = text.partition(", n = ")[0]
                if label in colours and hasattr(handle, "get_color"):
                    colour = handle.get_color()  # of error bars: one for each bar
                    colours[label].add(to_hex(colour if len(colour) > 1 else colour[0]))
    return colours, pictures


def test_a_method_has_one_colour_in_all_pictures_of_a_page(tmp_path):
    """Also in pictures that leave out other methods: diverged, or without a record."""
    labels = ["bad", "SGD", "SAM", "BNN", "SGVB"]
    runs = [make(x, i, folder=tmp_path / x) for i, x in enumerate(labels)]
    runs.append(make("SAM", 9, folder=tmp_path / "SAM2"))
    runs[0] = runs[0]._replace(log_probs=np.full_like(runs[0].log_probs, np.nan))
    values = {"accuracy": 0.5, "nll": 1.0, "ece": 0.1}
    for run in runs:
        run.folder.mkdir()
        landscape = {
            "step": 8, "kind": "random", "split": "test", "num_examples": 9, "seed": 0,
            "axes": [[-1.0, 0.0, 1.0]], "axis_names": ["Direction"], "points": None,
            "labels": [], "losses": [2.0, 1.0, 3.0],
        }  # fmt: skip
        row = {"name": "contrast", "severity": 1, **values}
        shifted = {
            "step": 8, "num_examples": 9, "clean": values, "corruptions": [row],
            "sets": [], "ood": [], "missing": [],
        }  # fmt: skip
        if run.label in ("SAM", "SGVB"):
            (run.folder / "landscape.json").write_text(json.dumps(landscape))
        if run.label == "SGVB":
            (run.folder / "shift.json").write_text(json.dumps(shifted))
        if run.label in ("BNN", "SGVB"):
            counts = [0, 3, 5] + [0] * (summary.NUM_BINS - 3)
            posterior = {"snr_counts": counts, "snr_db": {"dense": 1.0}}
            run.result["posterior"] = posterior
    costs = [
        {"label": label, "status": "finished", "seed": 0, "accuracy": accuracy,
         "gradient_evaluations": 10, "seconds": 1.0, "memory_mib": 1.0}
        for label, accuracy in (
            ("gone", 0.1), ("bad", None), ("SGVB", 0.7), ("SAM", 0.8), ("SGD", 0.9),
        )
    ]  # fmt: skip
    found = page.compose(
        "Title", runs, report.summarise(runs), whole=True, baseline="SGD", costs=costs
    )
    colours, pictures = drawn_colours(found)
    for i in (2, 5):  # a picture of single runs names them
        own = colours.pop(f"SAM ({runs[i].folder.name})")
        assert own == colours["SAM"]
    assert pictures["SGVB"] == {
        "cost", "learning_curves", "risk_coverage", "shift", "landscape_line",
        "signal_to_noise",
    }  # fmt: skip
    assert set(colours) == {*labels, "gone"}
    assert all(len(own) == 1 for own in colours.values())
    assert len(set().union(*colours.values())) == len(colours)
    # Two lines of one colour have other dashes.
    (ax,) = found.pictures["landscape_line"].figure().axes
    dashes = [x.get_linestyle() for x in ax.lines if "SAM" in str(x.get_gid())]
    assert len(set(dashes)) == len(dashes) == 2


def test_of_a_single_method_each_corruption_has_its_own_colour():
    values = {"accuracy": 0.5, "nll": 1.0, "ece": 0.1}
    names = ("contrast", "rotation", "noise")
    rows = [{"name": name, "severity": 1, **values} for name in names]
    ax = report.shift_figure([("SAM", {"clean": values, "corruptions": rows})]).axes[0]
    colours = {line.get_gid(): line.get_color() for line in ax.lines}
    assert len(set(colours.values())) == 4
    assert colours["mean:SAM"] == plots.COLOURS[0]


def test_signal_to_noise_is_the_mean_of_the_runs_of_a_label(tmp_path):
    counts = np.zeros((3, summary.NUM_BINS), int)
    counts[0, 10:12], counts[1, 12], counts[2, 30] = (1, 3), 8, 5
    layers = {"a": 4.0, "b": 1.0}, {"a": 2.0, "b": 2.0}, {"b": -1.0}
    runs = [make(label, i) for i, label in enumerate(("BNN", "BNN", "SGVB", "SGD"))]
    for run, row, decibels in zip(runs, counts, layers, strict=False):
        posterior = {"snr_counts": row.tolist(), "snr_db": decibels}
        run.result["posterior"] = posterior
    left, right = report.signal_to_noise_figure(runs).axes
    shares, means = (
        {x.get_gid(): x.get_xydata().T for x in ax.lines} for ax in (left, right)
    )
    x, y = shares["share:BNN"]
    np.testing.assert_allclose(x, np.arange(-59, 60, 2))  # the middle of 2 dB
    assert y[y > 0].tolist() == [12.5, 37.5, 50.0]
    assert x[y > 0].tolist() == [-39, -37, -35]
    x, y = shares["share:SGVB"]
    assert (x[y > 0], y[y > 0]) == (1, 100)
    assert means["layers:BNN"].tolist() == [[1, 2], [3.0, 1.5]]
    assert means["layers:SGVB"].tolist() == [[1], [-1.0]]
    assert [text.get_text() for text in right.get_xticklabels()] == ["a", "b"]
    path = report.plot_signal_to_noise(runs, tmp_path / "picture.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="at least one run"):
        report.signal_to_noise_figure(runs[3:])


class TestPictures:
    def axes(self, figure, gid):
        (found,) = [ax for ax in figure.axes if ax.get_gid() == gid]
        return found

    def test_confidences_of_right_and_wrong_predictions(self):
        run = make(skill=1.5)
        ax = self.axes(predictions.confidence_figure([run], 5), "confidence:SAM")
        probs = np.exp(run.log_probs)
        counts = {"Right": np.zeros(5), "Wrong": np.zeros(5)}
        for row, label in zip(probs, LABELS, strict=True):
            kind = "Right" if row.argmax() == label else "Wrong"
            counts[kind][int(np.ceil(5 * row.max())) - 1] += 100 / len(LABELS)
        for bars in ax.containers:
            heights = [bar.get_height() for bar in bars]
            np.testing.assert_allclose(heights, counts[bars.get_label()])

    def test_a_confidence_on_an_edge_is_in_the_bin_below(self):
        run = make()
        half = np.zeros_like(run.log_probs)
        half[:, :2], half[:, 2:] = np.log(0.5), -np.inf
        ax = self.axes(
            predictions.confidence_figure([run._replace(log_probs=half)], 4),
            "confidence:SAM",
        )
        heights = sum(np.array([bar.get_height() for bar in x]) for x in ax.containers)
        np.testing.assert_allclose(heights, [0, 100, 0, 0])

    def test_every_panel_names_its_axes(self):
        runs = [make(label) for label in "abcde"]
        for figure, gid in (
            (predictions.confusion_figure(runs), "confusion"),
            (predictions.confidence_figure(runs), "confidence"),
        ):
            # A page may show each of them alone.
            for label in "abcde":
                ax = self.axes(figure, f"{gid}:{label}")
                assert ax.get_title() == label
                assert ax.get_xlabel() and ax.get_ylabel()

    def test_confusion_is_scikit_learns(self):
        from sklearn.metrics import confusion_matrix

        runs = [make(seed=seed, skill=1.0) for seed in (0, 1)]
        ax = self.axes(predictions.confusion_figure(runs), "confusion:SAM")
        predicted = np.concatenate([run.log_probs.argmax(axis=1) for run in runs])
        want = confusion_matrix(np.tile(LABELS, 2), predicted, normalize="true")
        np.testing.assert_allclose(ax.images[0].get_array(), 100 * want)

    def test_risk_at_full_coverage_is_the_error(self):
        runs = [make(seed=seed, skill=1.0) for seed in (0, 1)]
        (ax,) = predictions.risk_coverage_figure(runs).axes
        (line,) = ax.lines
        assert line.get_gid() == "risk:SAM"
        errors = [np.mean(run.log_probs.argmax(axis=1) != LABELS) for run in runs]
        assert line.get_ydata()[-1] == pytest.approx(100 * np.mean(errors))
        # The surest half of each run, by hand.
        halves = []
        for run in runs:
            order = np.argsort(-run.log_probs.max(axis=1))[: len(LABELS) // 2]
            halves.append(np.mean(run.log_probs.argmax(axis=1)[order] != LABELS[order]))
        at = np.argmin(np.abs(line.get_xdata() - 50))
        assert line.get_ydata()[at] == pytest.approx(100 * np.mean(halves))

    def test_worst_and_most_uncertain_examples(self):
        run = make(skill=1.0)
        of_label = run.log_probs[np.arange(len(LABELS)), LABELS]
        worst = examples.worst(run, 5)
        assert worst.rows.tolist() == np.argsort(of_label)[:5].tolist()
        entropy = -(np.exp(run.log_probs) * run.log_probs).sum(axis=1)
        uncertain = examples.most_uncertain(run, 5)
        assert uncertain.rows.tolist() == np.argsort(-entropy)[:5].tolist()
        images = data.load("digits").test.images
        figure = examples.examples_figure(images, worst)
        for part, row in zip(figure.subfigs[:5], worst.rows, strict=True):
            (image,), (text,) = part.artists, part.texts
            np.testing.assert_array_equal(image.get_array(), images[row, ..., 0])
            predicted = run.log_probs[row].argmax()
            confidence = np.exp(run.log_probs[row].max())
            between = "=" if predicted == LABELS[row] else "→"
            title = f"{LABELS[row]} {between} {predicted}\n{confidence:.0%}"
            assert text.get_text() == title

    @pytest.mark.parametrize(("shape", "across_to_up"), [((4, 8), 2), ((9, 3), 1 / 3)])
    def test_images_keep_their_proportions(self, shape, across_to_up):
        images = np.zeros((len(LABELS), *shape, 3), np.uint8)
        figure = examples.examples_figure(images, examples.worst(make(), 2))
        for part in figure.subfigs[:2]:
            box = part.artists[0].get_window_extent()
            assert box.width / box.height == pytest.approx(across_to_up, rel=0.05)
            assert part.bbox.x0 <= box.x0 and box.x1 <= part.bbox.x1
            assert part.bbox.y0 <= box.y0 and box.y1 <= part.bbox.y1

    def test_classes_have_their_names_where_the_data_have_them(self):
        names = [f"digit of the kind {i}" for i in range(10)]
        named = make(skill=1.0)._replace(data={"class_names": names})
        ax = self.axes(predictions.confusion_figure([named]), "confusion:SAM")
        want = ["digit of the …" for _ in range(10)]
        for axis in (ax.get_xticklabels(), ax.get_yticklabels()):
            assert [text.get_text() for text in axis] == want
        # Runs whose data name them otherwise have numbers in common, and no more.
        others = named._replace(data={"class_names": list("abcdefghij")})
        figure = predictions.confusion_figure([named, others])
        axis = self.axes(figure, "confusion:SAM").get_xticklabels()
        assert [text.get_text() for text in axis] == list("0123456789")
        chosen = examples.worst(others, 3)
        figure = examples.examples_figure(data.load("digits").test.images, chosen)
        for part, row in zip(figure.subfigs[:3], chosen.rows, strict=True):
            predicted = "abcdefghij"[others.log_probs[row].argmax()]
            title = f"{'abcdefghij'[LABELS[row]]} → {predicted}\n"
            assert part.texts[0].get_text().startswith(title)

    def test_panels_have_one_scale_beside_one_without_numbers(self):
        runs = [make("a", 0, 0.5), make("b", 1, 9.0), make("sick")]
        runs[2] = runs[2]._replace(log_probs=np.full_like(runs[2].log_probs, np.nan))
        for figure, what in (
            (predictions.confidence_figure(runs), "confidence"),
            (predictions.reliability_figure(runs), "histogram"),
        ):
            low, high = (self.axes(figure, f"{what}:{x}") for x in "ab")
            assert low.get_ylim() == high.get_ylim()
            tops = [x.get_y() + x.get_height() for x in [*low.patches, *high.patches]]
            assert high.get_ylim()[1] == pytest.approx(1.05 * max(tops))

    def test_the_colour_bar_of_a_confusion_has_ticks_where_errors_are(self):
        figure = predictions.confusion_figure([make()])
        (bar,) = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
        assert bar.get_yticks().tolist() == [0, 1, 5, 20, 50, 100]

    def test_panels_without_numbers_say_so(self):
        sick = make("sick")
        sick = sick._replace(log_probs=np.full_like(sick.log_probs, np.nan))
        for figure, gid in (
            (predictions.confidence_figure([make(), sick]), "confidence:sick"),
            (predictions.confusion_figure([make(), sick]), "confusion:sick"),
        ):
            ax = self.axes(figure, gid)
            (text,) = ax.texts
            assert text.get_text() == "no finite predictions"
            assert not len(ax.get_xticks()) and not len(ax.get_yticks())
