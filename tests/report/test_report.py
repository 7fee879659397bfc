"""The report page: self-contained, escaped, whole with any stage missing, right in what it says,
and sound in a real browser.
"""

import base64
import json
import re
import shutil
import subprocess
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from helpers_report import DEPTH, EVIL, EVIL_PATH, smoke_config, write_manifest, write_run
from helpers_scores import naive_score, one_hot, predicted
from helpers_stages import stage_here

from pipeline.competition.metric import WEIGHTS
from pipeline.competition.targets import TARGET_NAMES, TARGETS
from pipeline.evaluation.curves import Line
from pipeline.report.ablation import forest
from pipeline.report.charts import (
    BOTTOM,
    LEFT,
    POINTS,
    RIGHT,
    TOP,
    chart,
    colour,
    curve,
    jpeg_uri,
    ticks,
)
from pipeline.report.cost import duration
from pipeline.report.inputs import find_run
from pipeline.report.page import render
from pipeline.report.scores import confusion, reduction, score_charts, worst
from pipeline.run import layout
from pipeline.run.config import resolved
from pipeline.run.presets import load_config

FOLDERS = {
    layout.SLICES: "conversion",
    layout.VOLUMES: "montage",
    layout.VOCO: "pretraining",
    layout.CLASSIFIERS: "training",
    layout.SCORES: "scores",
    layout.SUBMISSION: "test",
}
CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium or google-chrome on PATH: the page was not tried in a browser",
)


class Page(HTMLParser):
    """Tags with their attributes, and the text by section id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.section = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("h1", "h2") and dict(attrs).get("id"):
            self.section = dict(attrs)["id"]

    def handle_data(self, data):
        self.sections[self.section] = self.sections.get(self.section, "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(out: Path) -> str:
    return render(find_run(out, smoke_config(), None, "--config smoke"))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def html(out):
    return page_of(out)


@pytest.fixture
def copy(out, tmp_path):
    return shutil.copytree(out, tmp_path / "run")


def test_page_loads_nothing_from_anywhere_and_runs_no_script(html):
    page = Page(html)
    loading = ("src", "href", "srcset", "action", "data")
    urls = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in loading
    ]
    assert urls
    assert all(url.startswith(("data:", "#")) for url in urls)
    assert not re.search(r"url\(|@import", html)
    assert not page.all("script")
    policy = next(
        attributes["content"]
        for attributes in page.all("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy, "the browser itself refuses scripts and requests"


def test_links_inside_the_page_resolve_and_ids_are_unique(html):
    page = Page(html)
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    links = [attributes["href"] for attributes in page.all("a")]
    assert len(links) == 11
    assert all(link.startswith("#") and ids[link[1:]] == 1 for link in links)


def test_every_picture_has_alt_text_and_decodes_and_every_figure_a_caption(html):
    page = Page(html)
    pictures = page.all("img")
    assert len(pictures) > 30
    for one in pictures:
        assert one["alt"]
        data = np.frombuffer(
            base64.b64decode(one["src"].partition("base64,")[2], validate=True), np.uint8
        )
        assert cv2.imdecode(data, cv2.IMREAD_COLOR) is not None
    figures = re.findall(r"<figure>.*?</figure>", html, re.DOTALL)
    assert len(figures) > 10
    assert all(
        re.search(r"<figcaption>.{20,}</figcaption>", figure, re.DOTALL) for figure in figures
    )
    assert all(attributes.get("aria-label") for attributes in page.all("svg"))


def test_headings_never_skip_a_level(html):
    levels = [int(tag[1]) for tag, _ in Page(html).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert set(levels) == {1, 2, 3, 4}
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_every_column_and_every_row_of_a_table_has_a_header(html):
    rows: list[list[tuple[str, str | None]]] = []
    for tag, attributes in Page(html).tags:
        if tag == "table":
            expected = "col"
        elif tag == "tr":
            rows.append([("row of", expected)])
            expected = "row"
        elif tag in ("th", "td"):
            rows[-1].append((tag, attributes.get("scope")))
    kinds = Counter(kind for (_, kind), *_ in rows)
    assert kinds["col"] == html.count("</table>") > 15
    assert kinds["row"] > kinds["col"]
    for (_, kind), first, *others in rows:
        assert first == ("th", kind)
        assert set(others) == {("th", "col") if kind == "col" else ("td", None)}


def test_what_comes_from_data_is_text_and_never_markup(html):
    page = Page(html)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not {"script", "i", "u"} & {
        tag for tag, attributes in page.tags if tag != "i" or attributes
    }
    assert html.count("<i>R</i>") == html.count("<i>"), "the orientation mark is the page's own"
    assert EVIL in page.sections["worst"]
    assert EVIL_PATH in page.sections["conversion"]
    assert "<i>why</i>" in page.sections["conversion"]
    assert "<b>bad</b>" in page.sections["test"]
    assert any(EVIL in attributes["alt"] for attributes in page.all("img")), (
        "as a picture's description too"
    )


def test_config_and_flags_are_escaped(out):
    config = smoke_config().model_copy(update={"name": "</title><script>alert(2)</script>"})
    html = render(find_run(out, config, None, "--config '</pre><script>'"))
    assert not Page(html).all("script")


def test_whole_run_has_every_section_filled(html):
    page = Page(html)
    assert [one for one in page.sections if one] == ["summary", *(name for name in _order())]
    assert "has not run" not in html
    assert "300 slices of 26 series" in page.sections["conversion"]
    assert "RLE Lossless" in page.sections["conversion"]
    assert "7 of 9 test patients predicted" in page.sections["test"]
    assert "standard deviation of 0.34 (bowel), 0.68 (liver)" in page.sections["test"]
    assert "not for clinical use" in page.sections["summary"]


def _order() -> list[str]:
    return [
        "conversion",
        "montage",
        "pretraining",
        "training",
        "scores",
        "worst",
        "test",
        "ablation",
        "probes",
        "cost",
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_stage_that_has_not_run_leaves_one_line(copy, folder):
    shutil.rmtree(copy / folder)
    page = Page(page_of(copy))
    text = page.sections[FOLDERS[folder]]
    assert "has not run" in text
    assert len(text.split()) < 30
    assert all(
        "has not run" not in page.sections[name]
        for other, name in FOLDERS.items()
        if other != folder
    )


TABLES = (
    "01_slices/quarantine.csv",
    "07_oof/scores.json",
    "08_submission/fallbacks.csv",
    "10_ablation/probes.csv",
)


@pytest.mark.parametrize("file", TABLES)
def test_a_stage_whose_table_is_gone_is_left_out_with_a_warning(copy, file, capfd):
    stage = file.split("/")[0]
    rewrite = json.loads((copy / stage / "manifest.json").read_text())
    rewrite["outputs"] = {file.split("/")[1]: {"bytes": (copy / file).stat().st_size, "digest": ""}}
    (copy / stage / "manifest.json").write_text(json.dumps(rewrite))
    (copy / file).unlink()
    page = Page(page_of(copy))
    assert stage not in FOLDERS or "has not run" in page.sections[FOLDERS[stage]]
    assert f"{file} is missing" in capfd.readouterr().err


def test_logs_removed_after_scoring_cost_the_curves_only(copy):
    for path in copy.glob("06_folds/fold*/log.jsonl"):
        path.unlink()
    assert "nested" in Page(page_of(copy)).sections["scores"]


def test_folds_of_an_earlier_larger_count_are_not_shown(copy):
    shutil.copytree(copy / layout.CLASSIFIERS / "fold1", copy / layout.CLASSIFIERS / "fold7")
    assert "fold 7" not in page_of(copy)


def test_a_grid_without_comparisons_makes_a_page(copy):
    table = json.loads((copy / layout.ABLATION / "table.json").read_text())
    (copy / layout.ABLATION / "table.json").write_text(
        json.dumps({**table, "compared": [], "sentences": []})
    )
    assert "ablation" in Page(page_of(copy)).sections


def test_without_an_ablation_nobody_hears_of_it(copy):
    shutil.rmtree(copy / layout.ABLATION)
    page = Page(page_of(copy))
    assert not {"ablation", "probes"} & set(page.sections)
    assert not [one for one in page.all("a") if one["href"] in ("#ablation", "#probes")]


def test_pretraining_stands_beside_what_needs_no_network(html):
    text = " ".join(Page(html).sections["pretraining"].split())
    assert (
        "Best held-out position accuracy 0.500, silhouette 0.310, thumbnail 0.420, by chance 0.3"
        in text
    )
    assert "chance silhouette thumbnail network" in text, "the legend"


def test_ablation_says_what_its_intervals_support_and_no_more(html):
    text = " ".join(Page(html).sections["ablation"].split())
    assert "voco2d against scratch: score" in text
    assert (
        "+0.0000 to +0.0000); the interval holds 0, so these runs show no difference; 0.000 would"
        in text
    )
    assert "liver_only against scratch: score −" in text
    assert "better (less is better)" in text
    assert "liver only" in text
    assert "2 min 10 s" in text, "what pretraining cost"
    probes = " ".join(Page(html).sections["probes"].split())
    assert "start (stored) 0.650, start (settled) 0.650" in probes, "the mean of two seeds"
    assert "place 0.250" in probes
    assert "bowel (AUC)" in probes
    assert "over the folds and 2 seeds" in probes


def test_forest_puts_differences_on_one_axis(out):
    compared = json.loads((out / layout.ABLATION / "table.json").read_text())["compared"]
    drawn = forest(compared, "score")
    same, better = drawn["rows"]
    assert same["low"] == same["value"] == same["high"] == drawn["zero"]
    assert 4 <= better["low"] <= better["value"] <= better["high"] < drawn["zero"] <= 96
    assert [same["style"], better["style"]] == ["soft", "c3"]
    assert drawn["side"] == "left"
    assert forest(compared, "mAP")["side"] == "right"
    marks = {text: at for at, text in drawn["ticks"]}
    assert marks["0"] == pytest.approx(drawn["zero"], abs=0.01)


def test_scores_alone_make_a_page(copy):
    for folder in (*FOLDERS, layout.ABLATION, "data"):
        if folder != layout.SCORES:
            shutil.rmtree(copy / folder)
    page = Page(page_of(copy))
    assert "Patient" in page.sections["worst"]
    assert not page.all("img")


def test_volumes_removed_after_training_cost_the_pictures_only(copy):
    for path in (copy / layout.VOLUMES).glob("*.npy"):
        path.unlink()
    assert "series" in Page(page_of(copy)).sections["montage"]


def test_headline_is_the_nested_score_with_its_interval(out, html):
    scores = json.loads((out / layout.SCORES / "scores.json").read_text())
    text = " ".join(Page(html).sections["summary"].split())
    found = scores["intervals"]["nested"]["score"]
    assert (
        f"{scores['nested']['score']:.4f} nested score, 95 % interval {found['low']:.4f} to"
        f" {found['high']:.4f}" in text
    )
    word = "below" if scores["reduction"]["nested"]["score"] >= 0 else "above"
    saved, floor = (
        abs(scores["reduction"]["nested"]["score"]),
        scores["floors"]["weighted_means"]["score"],
    )
    assert f"{100 * saved:.1f} % {word} the {floor:.4f}" in text


def test_baselines_stand_beside_the_scores_with_their_intervals(out, html):
    scores = json.loads((out / layout.SCORES / "scores.json").read_text())
    text = " ".join(Page(html).sections["scores"].split())
    for name in ("histogram", "thumbnail"):
        found = scores["intervals"][name]["score"]
        assert f"{name} {found['value']:.4f} ({found['low']:.4f} to {found['high']:.4f})" in text
        for value in scores["floors"][name].values():
            assert f"{value:.4f}" in text


def test_a_blend_is_shown_by_model_and_target(copy, html):
    assert "Blend" not in Page(html).sections["scores"]
    path = copy / layout.SCORES / layout.CALIBRATION
    fitted = json.loads(path.read_text())
    fitted["models"] = ["run-a", EVIL]
    fitted["weights"] = {
        target.name: [0.1 * k, 1 - 0.1 * k] for k, target in enumerate(TARGETS, start=1)
    }
    path.write_text(json.dumps(fitted))
    found = page_of(copy)
    assert EVIL not in found
    text = " ".join(Page(found).sections["scores"].split())
    assert "run-a0.1000.2000.3000.4000.500" in text.replace(" ", "")
    assert "0.9000.8000.7000.6000.500Shareofeachmodel" in text.replace(" ", "")


def test_scores_of_a_run_before_the_baselines_make_a_page(copy):
    path = copy / layout.SCORES / "scores.json"
    scores = json.loads(path.read_text())
    for name in ("histogram", "thumbnail"):
        del scores["floors"][name], scores["intervals"][name]
    path.write_text(json.dumps(scores))
    text = " ".join(Page(page_of(copy)).sections["scores"].split())
    assert f"{scores['nested']['score']:.4f}" in text
    assert "histogram" not in text


def test_reduction_is_that_of_two_scores_and_its_resamples_are_paired():
    labels = one_hot(60)
    values = predicted(labels, 1.5)
    constant = np.repeat(labels.mean(0, keepdims=True) * WEIGHTS, len(labels), axis=0)
    found = reduction(labels, values, 200, 0)
    ratio = (
        naive_score(labels.tolist(), values.tolist())["score"]
        / naive_score(labels.tolist(), constant.tolist())["score"]
    )
    assert found["value"] == pytest.approx(1 - ratio, abs=1e-12)
    assert found["low"] < found["value"] < found["high"]
    same = reduction(labels, constant, 50, 0)
    assert abs(same["low"]) < 1e-12, "what is compared with itself differs in no resample"
    assert abs(same["high"]) < 1e-12


def test_lowest_honest_value_of_each_row_is_marked(html):
    rows = re.findall(
        r'<tr><th scope="row">(bowel|score|liver|kidney|spleen|extravasation|any injury)'
        r"(<td[^\n]*?)</tr>",
        html,
    )
    rows = [cells for _, cells in rows if cells.count("<td") == 10]
    assert len(rows) == 7
    for cells in rows:
        values = re.findall(r'<td( class="best")?[^>]*>([\d.]+)', cells)[:7]
        assert [bool(mark) for mark, _ in values].count(True) == 1
        assert min(float(value) for _, value in values) == next(
            float(value) for mark, value in values if mark
        )


def test_worst_errors_are_ordered_by_their_part_of_the_score(out):
    errors = worst(find_run(out, smoke_config(), None, ""))
    table = pl.read_parquet(out / layout.SCORES / "patients.parquet")
    labels, nested = (
        table.select(pl.col(f"^{kind}_.*$")).to_numpy().astype(float)
        for kind in ("label", "nested")
    )
    score = naive_score(labels.tolist(), nested.tolist())
    assert errors[0]["patient_id"] == EVIL
    assert [one["share"] for one in errors] == sorted(
        (one["share"] for one in errors), reverse=True
    )
    true, weight = nested[0, 1], (labels[:, :2] * [1, 2]).sum()
    assert errors[0]["targets"][0]["share"] == pytest.approx(
        -2 * np.log(true) / weight / 6 / score["score"], rel=1e-9
    )
    assert errors[0]["share"] == pytest.approx(
        errors[0]["any"] + sum(one["share"] for one in errors[0]["targets"])
    )
    assert [one["true"] for one in errors[0]["targets"]] == [1, 1, 2, 2, 2]


def test_worst_errors_show_the_labelled_slice_and_evenly_chosen_ones(out):
    errors = worst(find_run(out, smoke_config(), None, ""))
    marked = [one for one in errors[0]["series"]["pictures"] if one["injuries"]]
    assert [(one["plane"], one["injuries"]) for one in marked] == [(4, ["bowel"])], (
        "108 is the middle of the labels"
    )
    for error in errors:
        planes = [one["plane"] for one in error["series"]["pictures"]]
        assert len(planes) == 4
        assert planes == sorted(set(planes))
    shown = cv2.imdecode(
        np.frombuffer(base64.b64decode(marked[0]["uri"].partition(",")[2]), np.uint8), 0
    )
    assert shown.shape == (20, 24)
    assert abs(int(shown.mean()) - 80) <= 2, "plane 4 of the volume"
    assert [one["plane"] for one in errors[1]["series"]["pictures"]] == [
        1,
        3,
        5,
        7,
    ], "no label: evenly spread"
    assert DEPTH == 8


def test_stage_older_than_its_input_is_named(copy):
    assert "run it again" not in page_of(copy)
    write_manifest(copy, layout.VOLUMES, {"volumes": 1}, inputs={layout.SLICES: "an older digest"})
    assert "made before 01_slices was last made" in Page(page_of(copy)).sections["cost"]


def test_cost_sums_the_stages_and_repeats_the_command(html):
    text = " ".join(Page(html).sections["cost"].split())
    assert "all8 min 08 s" in text, "eight times 61 s: two folds, no data, no fold drawing"
    assert "321 MB" in text
    assert "./run_all.sh --config smoke" in text
    assert "python stages/04_pretrain_voco2d.py --config smoke" in text
    assert "bootstrap: 50" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(70.0, "all7 min 16 s"), (124.0, "all8 min 08 s"), (5.0, "all8 min 08 s")]
)
def test_folds_that_trained_side_by_side_count_once(copy, seconds, text):
    """In one sitting of 70 s; one after the other; the last of several sittings."""
    write_manifest(copy, layout.CLASSIFIERS, {"fold0": {}, "fold1": {}}, seconds=seconds)
    assert text in " ".join(Page(page_of(copy)).sections["cost"].split())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.13, "8.1 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 250_000), (1, 6), (0, 0.013), (-0.4, 0.9), (0, 8.3)]
)
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert low - 1e-9 <= found[0]
    assert found[-1] <= high + 1e-9
    steps = np.diff(found)
    assert np.allclose(steps, steps[0])
    assert f"{steps[0]:.0e}"[0] in "125"


def test_chart_puts_points_where_they_belong():
    drawn = chart(
        "t",
        "x",
        [Line("a", "c1", [(0, 0), (10, 2)]), Line("", "c2", [(5, 1)]), Line("none", "c3", [])],
    )
    first, second = (line["points"] for line in drawn["lines"])
    assert first[0] == (LEFT, BOTTOM)
    assert first[1][0] == RIGHT
    assert TOP < first[1][1] < TOP + 10
    assert second[0] == pytest.approx(
        ((LEFT + RIGHT) / 2, (first[0][1] + first[1][1]) / 2), abs=0.1
    )
    assert drawn["legend"] == [("c1", "a")]
    assert chart("empty", "x", [])["lines"] == []


def test_more_lines_than_colours_start_again():
    assert [colour(k) for k in (0, 5, 6)] == ["c1", "c6", "c1"]


def test_curve_thins_by_means_and_leaves_gaps_out():
    records = [
        {"step": k, "loss": float(k % 2), **({"rare": 1.0} if k == 7 else {})}
        for k in range(10 * POINTS)
    ]
    points = np.array(curve(records, "step", "loss"))
    assert len(points) == POINTS
    assert np.allclose(points[:, 1], 0.5)
    assert np.allclose(points[0], [4.5, 0.5])
    assert curve(records, "step", "rare") == [[7.0, 1.0]]
    assert curve(records, "step", "absent") == []
    assert curve([{"epoch": 1, "loss": 1}, {"epoch": 1, "loss": 3}], "epoch", "loss") == [
        [1.0, 2.0]
    ], "folds are averaged"


def test_area_under_the_drawn_precision_recall_curve_is_the_average_precision():
    from sklearn.metrics import auc, average_precision_score

    labels = one_hot(80)
    values = predicted(labels, 1.2)
    found, calibrated = score_charts(labels, values, values)
    assert [one["title"] for one in found] == [*TARGET_NAMES, "any injury"]
    x, y = np.array(found[0]["lines"][1]["points"]).T
    area = auc((x - LEFT) / (RIGHT - LEFT), (BOTTOM - y) / (BOTTOM - TOP))
    assert area == pytest.approx(average_precision_score(labels[:, 1], values[:, 1]), abs=0.005)
    share = (BOTTOM - found[0]["lines"][0]["points"][0][1]) / (BOTTOM - TOP)
    assert share == pytest.approx(labels[:, 1].mean(), abs=0.002)
    assert calibrated[0]["lines"][1]["points"] == calibrated[0]["lines"][2]["points"], (
        "raw and nested are the same here"
    )


def test_confusion_counts_patients():
    labels = one_hot(30)
    tables = confusion(labels, 0.8 * labels + 0.1)
    for table, name in zip(tables, TARGET_NAMES, strict=True):
        cells = np.array(table["cells"])
        assert table["name"] == name
        assert cells[..., 0].sum() == 30
        assert np.allclose(cells[..., 0], np.diag(np.diag(cells[..., 0]))), (
            "perfect predictions lie on the diagonal"
        )


def test_large_planes_are_shrunk_with_their_aspect():
    data = base64.b64decode(jpeg_uri(np.zeros((512, 256), np.uint8)).partition(",")[2])
    assert cv2.imdecode(np.frombuffer(data, np.uint8), 0).shape == (192, 96)


@pytest.mark.slow
def test_stage_writes_skips_and_notices_a_changed_stage(copy):
    arguments = ("--config", "smoke", "--out", str(copy))
    first = stage_here("09", *arguments)
    assert first.returncode == 0, first.stderr
    page = (copy / layout.REPORT / "index.html").read_text()
    assert f"--out {copy}" in page
    again = stage_here("09", *arguments)
    assert "up to date" in again.stderr
    write_manifest(
        copy,
        layout.SUBMISSION,
        {
            **json.loads((copy / layout.SUBMISSION / "manifest.json").read_text())["counts"],
            "predicted": 8,
        },
    )
    third = stage_here("09", *arguments)
    assert "up to date" not in third.stderr
    assert "8 of 9 test patients" in (copy / layout.REPORT / "index.html").read_text()


@pytest.mark.slow
def test_nothing_to_report_is_one_line(tmp_path):
    done = stage_here("09", "--config", "smoke", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing to report")
    assert "Traceback" not in done.stderr


def chromium(page: Path, profile: Path, dark: bool = False) -> tuple[str, list[str]]:
    """The DOM after loading, and the console's lines."""
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        *(f"--disable-{part}" for part in quiet),
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--window-size=1400,1000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@browser
def test_browser_reports_nothing_on_the_console_and_would_report_a_script(html, tmp_path):
    good, bad = tmp_path / "good.html", tmp_path / "bad.html"
    good.write_text(html)
    bad.write_text(html.replace("</main>", "<script>document.title = 'ran'</script></main>"))
    assert chromium(good, tmp_path / "a")[1] == []
    dom, console = chromium(bad, tmp_path / "b")
    assert console, "the page's own policy refuses the script, and this test would see it"
    assert "<title>ran" not in dom


FOLLOW = """<style>html { scroll-behavior: auto }</style><script>
document.body.dataset.found = JSON.stringify([...document.querySelectorAll("nav a")].map(one => {
  one.click()
  const target = document.querySelector(":target")
  const end = scrollY + innerHeight >= document.documentElement.scrollHeight - 1
  return target && (end || Math.abs(target.getBoundingClientRect().top) < 50) ? target.id : null
}))
</script>"""


@pytest.mark.slow
@browser
def test_browser_follows_the_contents_list(html, tmp_path):
    copy = tmp_path / "links.html"
    copy.write_text(
        re.sub(r"<meta http-equiv=[^>]*>", "", html).replace("</body>", FOLLOW + "</body>")
    )
    dom = Page(chromium(copy, tmp_path / "profile")[0])
    assert json.loads(dom.all("body")[0]["data-found"]) == ["summary", *_order()]


MEASURE = """<script>
const light = (colour) => {
  const c = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]
}
const measure = (page, window) => {
  const style = window.getComputedStyle(page.body)
  const ink = light(style.color), paper = light(style.backgroundColor)
  const box = one => one.getBoundingClientRect()
  const outside = one => !one.closest(".scroll, pre") && box(one).right > window.innerWidth + 1
  return {
    width: window.innerWidth, scroll: page.documentElement.scrollWidth, paper,
    dark: window.matchMedia("(prefers-color-scheme: dark)").matches,
    contrast: (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05),
    outside: [...page.querySelectorAll("main *")].filter(outside)
      .map(one => one.outerHTML.slice(0, 120)),
    images: page.images.length,
    broken: [...page.images].filter(one => !one.complete || !one.naturalWidth).length,
    flat: [...page.querySelectorAll("svg, img")].filter(one => box(one).height < 20).length,
  }
}
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")]
    .map(frame => measure(frame.contentDocument, frame.contentWindow))
  document.body.dataset.found = JSON.stringify(found)
})
</script>"""


@pytest.mark.slow
@browser
@pytest.mark.parametrize("dark", [False, True])
def test_browser_shows_all_pictures_and_needs_no_sideways_scrolling(html, tmp_path, dark):
    scheme = "dark" if dark else "light"
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0;color-scheme:{scheme}"'
        f' srcdoc="{escape(html)}"></iframe>'
        for width in (1280, 390)
    )
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light'
        f' dark"><body>{frames}{MEASURE}</body>'
    )
    dom = Page(chromium(frame, tmp_path / "profile", dark)[0])
    found = json.loads(dom.all("body")[0]["data-found"])
    assert [one["width"] for one in found] == [1280, 390]
    for one in found:
        assert one["scroll"] <= one["width"], one["outside"]
        assert one["outside"] == []
        assert one["images"] > 30
        assert one["broken"] == one["flat"] == 0
        assert one["dark"] is dark
        assert one["contrast"] > 10
        assert (one["paper"] < 0.1) is dark


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ((), "lstm over 4 slices"),
        (("train.regions=organs",), "lstm over 4 slices of each region"),
        (
            ("train.regions=organs", "train.abdomen_slices=6"),
            "lstm over 4 slices of each region, 6 of the abdomen",
        ),
    ],
)
def test_the_page_says_how_many_slices_of_what_a_classifier_sees(copy, keys, text):
    config = load_config("smoke", [*keys])
    used = {name: resolved(getattr(config, name)) for name in ("model", "train")}
    name = f"{layout.CLASSIFIERS}/{layout.fold_folder(0)}"
    write_manifest(copy, name, {"held_out_score": 0.5}, config=used)
    told = next(iter(re.findall(r"test_efficientnet from [^<]*", page_of(copy))))
    assert told == f"test_efficientnet from {config.train.init}, {text}"
