"""The page of a bundle: what it shows, read in a real browser, at a desk and on a phone, in light, dark and print."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusionblocks.converter.cli import main
from diffusionblocks.converter.train_options import BlockLog, TrainOptions
from diffusionblocks.converter.training_run import record_of
from diffusionblocks.export.chart import LEFT, RIGHT, WIDTH, Band, Chart, Line, number
from diffusionblocks.export.report import Report, gather
from diffusionblocks.export.report_page import add_page, page, write_page
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime.files import sha256_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NASTY = "</td></script><script>fetch('http://127.0.0.1:9/')</script><img src=x onerror=alert(1)>\"'&"
SECTIONS = (
    *("trunk", "noise", "other", "information", "loss", "validation", "steps", "memory"),
    *("parity", "held-out", "bench", "provenance", "files"),
)
CHARTS = ("noise", "other", "information", "loss", "validation", "steps", "memory")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chosen = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chosen
        chosen.close()


def scores(accuracy: float) -> dict[str, float]:
    return {"accuracy": accuracy, "cross_entropy": 1 - accuracy}


def whole_report(folder: Path, name: str = "a small network", units: tuple[str, ...] = ()) -> Report:
    """Of a trained bundle, with everything that a page can show."""
    manifest = manifests.read(folder)
    steps = list(range(1, 41))
    logs = [
        BlockLog(
            b,
            TrainOptions(steps=40),
            step=steps,
            loss=[2 / (1 + step / 9) + 0.1 * b for step in steps],
            validation=[
                {"updates": 20 * k, "alone": scores(0.4 + 0.1 * k), "chain": scores(0.5 + 0.1 * k)} for k in (1, 2)
            ],
        )
        for b in range(len(manifest.blocks))
    ]
    training = record_of(logs)
    training["held_out"] = {"results": [{"mode": "exact", "rows": 360, "accuracy": 0.96}]}
    training["command"] = "dbconvert train model.dblocks --data train.npz"
    blocks = tuple(dataclasses.replace(b, units=units or b.units) for b in manifest.blocks)
    manifest = dataclasses.replace(manifest, source={**manifest.source, "name": name}, training=training, blocks=blocks)
    checks = [{"name": "exact", "ok": True, "detail": "largest difference 1e-7"}]
    bench = {
        "rows": [
            {"row": "block", "batch": 1, "seconds": 0.011, "ratio": 1.1, "peak_bytes": 90 << 20},
            {"row": "eager", "batch": 1, "missing": "torch is not installed"},
        ]
    }
    return gather(folder, manifest, checks, bench)


@pytest.fixture
def shown(bundles, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    write_page(whole_report(bundles["frozen"][1]), path)
    return path


def opened(browser: Any, path: Path, width: int, **kinds: Any) -> tuple[Any, list[str]]:
    """The page, and what it said on the console, asked for, or raised."""
    tab = browser.new_page(viewport={"width": width, "height": 800}, **kinds)
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.on("request", lambda request: said.append(request.url))
    tab.goto(path.as_uri())
    return tab, [line for line in said if line != path.as_uri()]


@pytest.mark.parametrize("width", [1280, 360])
def test_it_renders_in_a_browser(browser: Any, shown: Path, width: int) -> None:
    tab, said = opened(browser, shown, width)
    assert said == []
    assert [tab.locator(f"#{name}").count() for name in SECTIONS] == [1] * len(SECTIONS)
    for name in CHARTS:
        box = tab.locator(f"#{name} svg").bounding_box()
        assert box["width"] > 250
        assert box["height"] > 120
        drawn = tab.locator(f"#{name} svg .line, #{name} svg .mark").evaluate_all(
            "lines => lines.map(line => [line.getBoundingClientRect().width + line.getBoundingClientRect().height, getComputedStyle(line).stroke + getComputedStyle(line).fill])"
        )
        assert drawn, name
        assert all(size > 1 for size, _ in drawn), name
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    letters = tab.locator("svg .tick").evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
    assert min(letters) > 9  # pixels, so that they can be read
    tab.close()


def test_letters_of_a_chart_lie_inside_it_and_apart(browser: Any, shown: Path) -> None:
    tab, _ = opened(browser, shown, 360)
    for name in CHARTS:
        frame = tab.locator(f"#{name} svg").bounding_box()
        boxes = tab.locator(f"#{name} svg text").evaluate_all(
            "all => all.map(one => { const b = one.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom, one.textContent]; })"
        )
        for left, top, right, bottom, text in boxes:
            assert left >= frame["x"] - 1, (name, text)
            assert right <= frame["x"] + frame["width"] + 1, (name, text)
            assert top >= frame["y"] - 1, (name, text)
            assert bottom <= frame["y"] + frame["height"] + 1, (name, text)
        ticks = [b for b in boxes if re.fullmatch(r"[\d.,e-]+", b[4])]
        for i, a in enumerate(ticks):
            for b in ticks[i + 1 :]:
                apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 2 or b[3] <= a[1] + 2
                assert apart, (name, a, b)
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark(browser: Any, shown: Path, scheme: str) -> None:
    tab, _ = opened(browser, shown, 800, color_scheme=scheme)
    page_colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(page_colour) > 0.5) == (scheme == "light")
    for where in ("body", ".note", "dt", "td", "#loss .tick"):
        style = "getComputedStyle(document.querySelector(where))"
        colour = tab.evaluate(f"where => where.includes('tick') ? {style}.fill : {style}.color", where)
        a, b = sorted((luminance(colour), luminance(page_colour)))
        assert (b + 0.05) / (a + 0.05) >= 4.5, where  # WCAG 2.1, 1.4.3
    tab.close()


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2.1)."""
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_it_prints(browser: Any, shown: Path) -> None:
    tab, _ = opened(browser, shown, 800, color_scheme="dark")
    assert tab.pdf()[:5] == b"%PDF-"
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tab.close()


def test_names_of_a_model_are_text(browser: Any, bundles, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_page(whole_report(bundles["frozen"][1], NASTY, (NASTY, NASTY)), path)
    tab, said = opened(browser, path, 360)
    assert said == []
    assert tab.locator("script, img").count() == 0
    assert tab.inner_text("h1") == NASTY
    assert NASTY in tab.inner_text("#trunk")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.close()


def test_a_page_loads_and_runs_nothing(shown: Path) -> None:
    text = shown.read_text("utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"<script|<link|<iframe|\bsrc=|url\(|@import", text)
    assert not re.search(r'href="(?!#)', text)


def test_what_is_missing_is_said(trained_mlp, tmp_path: Path) -> None:
    from diffusionblocks.converter import convert
    from diffusionblocks.export import export_bundle

    folder = export_bundle(convert(trained_mlp, input_shape=(64,), num_blocks=2), tmp_path / "plain")
    said = {f.name: f for f in gather(folder, manifests.read(folder)).figures}
    assert said["loss"].chart is None
    assert "not trained" in said["loss"].note
    assert "--validate-every" in said["validation"].note
    text = (folder / "report.html").read_text("utf-8")  # written with the bundle
    assert "Not verified" in text
    assert "<h1>plain</h1>" in text  # and not the name the folder had while it was written
    assert manifests.read(folder).files["block_00.bin"].sha256 in text


def test_both_partitions_are_shown(bundles) -> None:
    found = {f.name: f for f in whole_report(bundles["frozen"][1]).figures}
    taken, other = found["noise"].chart, found["other"].chart
    assert taken is not None
    assert other is not None
    assert "equal-information" in taken.title
    assert "equal-probability" in other.title
    edges = manifests.read(bundles["frozen"][1]).edges
    assert [(b.start, b.end) for b in taken.bands] == list(pairwise(edges))
    assert [b.start for b in other.bands] != [b.start for b in taken.bands]


def test_a_density_integrates_to_about_one(bundles) -> None:
    chart = next(f.chart for f in whole_report(bundles["frozen"][1]).figures if f.name == "noise")
    assert chart is not None
    for line in chart.lines:
        x, y = np.log([p[0] for p in line.points]), np.array([p[1] for p in line.points])
        assert np.trapezoid(y, x) == pytest.approx(1, abs=0.15)


def test_a_bundle_that_cannot_be_shown_is_whole_without_a_page(
    bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kinds: Any) -> Report:
        raise ValueError("nothing to draw")

    folder = shutil.copytree(bundles["frozen"][1], tmp_path / "b")
    (folder / "report.html").unlink()
    monkeypatch.setattr("diffusionblocks.export.report_page.gather", fails)
    add_page(folder)
    assert not (folder / "report.html").exists()
    monkeypatch.undo()
    add_page(folder)
    assert (folder / "report.html").is_file()


class TestChart:
    def test_numbers_are_short(self) -> None:
        assert [number(v) for v in (0, 1e-5, 0.25, 1234.5, 2.5e7)] == ["0", "1e-5", "0.25", "1,234", "2.5e7"]

    @pytest.mark.parametrize(("low", "high"), [(0.002, 80), (0.3, 0.9), (0.98, 1.02), (5, 5), (1e-6, 1e9)])
    def test_ticks_of_a_logarithmic_axis(self, low: float, high: float) -> None:
        drawn = Chart("t", "d", "x", "y", (Line("a", [(low, 1), (high, 2)]),), log_x=True).svg("c")
        ticks = [
            (float(x), said) for x, said in re.findall(r'x="([\d.]+)" y="\d+" text-anchor="middle">([^<]+)', drawn)
        ]
        ticks = [(x, float(said.replace(",", ""))) for x, said in ticks if said != "x"]
        assert len(ticks) >= 2
        assert [t for t, _ in ticks] == sorted(t for t, _ in ticks)
        assert all(LEFT - 1 <= x <= WIDTH - RIGHT + 1 for x, _ in ticks)

    def test_one_point_is_a_dot(self) -> None:
        drawn = Chart("t", "d", "x", "y", (Line("a", [(1.0, 2.0)]),)).svg("c")
        assert "<circle" in drawn
        assert "<polyline" not in drawn

    def test_what_is_no_number_is_left_out(self) -> None:
        drawn = Chart("t", "d", "x", "y", (Line("a", [(0, 1), (1, float("nan")), (2, 3)]),)).svg("c")
        assert "nan" not in drawn
        assert drawn.count(",") == 2

    def test_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="nothing to draw"):
            Chart("t", "d", "x", "y", (Line("a", []),)).svg("c")

    def test_a_narrow_band_has_a_short_name(self) -> None:
        bands = (Band("block 0", 0, 100, 0), Band("block 1", 100, 105, 1), Band("block 2", 105, 105.1, 2))
        drawn = Chart("t", "d", "x", "y", bands=bands).svg("c")
        assert re.findall(r'text-anchor="middle">(block 0|1|block 1|block 2|2)<', drawn)[:2] == ["block 0", "1"]


def command(*args: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(args)
    return int(done.value.code or 0)


class TestCommand:
    def test_it_verifies_and_writes(self, bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "page.html"
        assert command("report", str(bundles["frozen"][1]), "--out", str(out), "--json") == 0
        said = json.loads(capsys.readouterr().out)
        assert said["page"] == str(out)
        assert all(check["ok"] for check in said["checks"])
        assert said["checks"][0]["name"] in out.read_text("utf-8")
        assert not list(tmp_path.glob("*.partial"))

    def test_a_check_that_fails_is_on_the_page(self, bundles, tmp_path: Path) -> None:
        folder = shutil.copytree(bundles["frozen"][1], tmp_path / "b")
        with np.load(folder / "probe.npz") as probe:
            changed = {k: v + 1 if k.startswith("exact.") else v for k, v in probe.items()}
        np.savez(folder / "probe.npz", **changed)
        data = json.loads((folder / "manifest.json").read_text())
        data["files"]["probe.npz"] = {
            "sha256": sha256_of(folder / "probe.npz"),
            "bytes": (folder / "probe.npz").stat().st_size,
        }
        (folder / "manifest.json").write_text(json.dumps(data))
        assert command("report", str(folder)) == 1
        assert "FAILED" in (folder / "report.html").read_text("utf-8")

    def test_a_damaged_bundle_keeps_its_page(self, bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = shutil.copytree(bundles["frozen"][1], tmp_path / "b")
        data = bytearray((folder / "block_01.bin").read_bytes())
        data[5] ^= 1
        (folder / "block_01.bin").write_bytes(data)
        before = (folder / "report.html").read_bytes()
        assert command("report", str(folder)) == 2
        assert "block_01.bin" in capsys.readouterr().err
        assert (folder / "report.html").read_bytes() == before

    @pytest.mark.parametrize(
        "training",
        [
            {"blocks": [{"block": 0, "step": [1], "loss": "high"}]},
            {"blocks": 7},
            {"held_out": {"results": [{"mode": "exact", "x": "y", "rows": 1}]}},
        ],
    )
    def test_a_training_that_is_recorded_otherwise(
        self, bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str], training: Any
    ) -> None:
        folder = shutil.copytree(bundles["frozen"][1], tmp_path / "b")
        data = json.loads((folder / "manifest.json").read_text())
        data["training"] = training
        (folder / "manifest.json").write_text(json.dumps(data))
        assert command("report", str(folder), "--out", str(tmp_path / "p.html")) == 2
        said = capsys.readouterr().err
        assert "another way" in said
        assert "Export the bundle again" in said
        assert not (tmp_path / "p.html").exists()

    def test_no_bundle(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert command("report", str(tmp_path / "none")) == 2
        assert "none" in capsys.readouterr().err

    def test_a_page_that_cannot_be_written(self, bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert command("report", str(bundles["frozen"][1]), "--out", str(tmp_path / "no" / "p.html")) == 2
        assert "--out" in capsys.readouterr().err

    def test_the_command_that_made_a_bundle_is_kept_without_folders(self, program_file: Path, tmp_path: Path) -> None:
        out = tmp_path / "secret" / "b.dblocks"
        assert command("-q", str(program_file), "--out", str(out), "-B", "2") == 0
        said = manifests.read(out).source["command"]
        assert said == f"dbconvert -q {program_file.name} --out b.dblocks -B 2"
        assert said in page(gather(out, manifests.read(out))).replace("&#39;", "'")
        assert "secret" not in (out / "report.html").read_text("utf-8")
