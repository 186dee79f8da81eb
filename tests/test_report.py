"""The report: its files, and its page as a person with a browser meets it."""

from __future__ import annotations

import html
import json
import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from eval import report as eval_report
from eval.record import ScoreError
from eval.report import main
from perfusion.cli import run_cli
from tests.scored import made_up

pytest.importorskip("plotly")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    methods: dict[str, list[float | None]] = {"perfusion": [0.2, 0.5, 0.8], "dreambooth": [None]}
    return made_up(tmp_path_factory.mktemp("made"), methods)


@pytest.fixture(scope="module")
def report(scores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report."""
    out = tmp_path_factory.mktemp("report")
    main([f"scores={scores}", f"out={out}", "resamples=40", "title=Two <methods>"])
    return out


def data_of(page: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_everything_is_there(report: Path):
    names = {path.name for path in report.iterdir()}
    assert names == {"index.html", "sheets", "table.md", "table.tex", "front.csv", "front.png", "front.svg"}
    page = (report / "index.html").read_text()
    assert "<title>Two &lt;methods&gt;</title>" in page
    assert all(f'<a href="{name}">' in page for name in names - {"index.html", "sheets"})
    data = data_of(page)
    assert [m["title"] for m in data["methods"]] == ["DreamBooth", "Perfusion"]
    assert [scope for scope, _ in data["scopes"]] == ["", "cat", "dog"]
    assert len(data["rows"]) == 3 * 4 and len(data["sheets"]) == 8 == len(list((report / "sheets").iterdir()))
    assert "a sketch of a <cat*> & </script>" in data["prompts"], "a prompt cannot end the page's script"
    assert (data["x"], data["y"]) == ("clip_t", "clip_i") and data["volumes"][0]["reference"] == [0.0, 0.0]


def test_a_row_leads_to_its_pictures(report: Path, scores: Path):
    data = data_of((report / "index.html").read_text())
    row = next(r for r in data["rows"] if r["scope"] == "dog" and r["label"] == "β 0.5")
    (sheet,) = (data["sheets"][k] for k in row["sheets"])
    assert (sheet["concept"], sheet["columns"], sheet["rows"], sheet["width"]) == ("dog", 4, 1, 16)
    cells = [[cell[:2] for cell in prompt["cells"]] for prompt in sheet["prompts"]]
    assert cells == [[[0, 0], [1, 1]], [[2, 0], [3, 1]]], "each with its place and seed"
    picture = scores.parent / "pictures" / "perfusion-0.5-dog-1.png"
    with Image.open(report / sheet["source"]) as drawn, Image.open(picture) as own:
        cell = drawn.convert("RGB").crop((16, 0, 32, 16)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        mean = own.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert all(abs(a - b) < 12 for a, b in zip(cell, mean, strict=True))
    over = next(r for r in data["rows"] if r["scope"] == "" and r["label"] == "β 0.5")
    assert [data["sheets"][k]["concept"] for k in over["sheets"]] == ["cat", "dog"] and over["images"] == 8


def test_one_file_holds_everything_if_asked(scores: Path, tmp_path: Path):
    main([f"scores={scores}", f"out={tmp_path}", "resamples=10", "embed=true"])
    assert not (tmp_path / "sheets").exists()
    data = data_of((tmp_path / "index.html").read_text())
    assert all(sheet["source"].startswith("data:image/webp;base64,") for sheet in data["sheets"])


def test_sheets_of_former_reports_go(scores: Path, tmp_path: Path):
    (tmp_path / "sheets").mkdir()
    (tmp_path / "sheets" / "0123.webp").write_bytes(b"old")
    (tmp_path / "sheets" / "mine.txt").write_text("stays")
    main([f"scores={scores}", f"out={tmp_path}", "resamples=10"])
    names = {path.name for path in (tmp_path / "sheets").iterdir()}
    assert "0123.webp" not in names and "mine.txt" in names and len(names) == 9


def test_mistakes_are_named(scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    for words, message in (
        (["y=identity"], "nothing has both scores; there are"),
        (["side=2"], "side: found 2, expected at least 8 pixels"),
    ):
        assert run_cli(main, [f"scores={scores}", f"out={tmp_path / 'r'}", *words]) == 2
        assert message in capsys.readouterr().err
    own = made_up(tmp_path / "own", {"perfusion": [0.5]})
    next((tmp_path / "own" / "pictures").iterdir()).unlink()
    with pytest.raises(ScoreError, match=r"\.png: was scored, but cannot be read any more"):
        main([f"scores={own}", f"out={tmp_path / 'r'}"])
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(ScoreError, match=r"needs plotly, the extra report of this package; `make setup` installs it"):
        main([f"scores={scores}", f"out={tmp_path / 'r'}"])


STRANGE = "<b>bold</b>&lt;$x^{$_".replace("/", "\N{FRACTION SLASH}")  # a method's name, and so that of files


def test_labels_are_text_wherever_they_are_shown(tmp_path: Path):
    """Also those that a manifest of somebody else has: in the page, in tables and in figures."""
    scores = made_up(tmp_path / "made", {STRANGE: [0.2, 0.8], "_hidden": [0.5], "$\\frac": [0.5]})
    main([f"scores={scores}", f"out={tmp_path / 'r'}", "resamples=10"])
    assert "<b>" not in (tmp_path / "r" / "index.html").read_text().partition('id="data"')[2].partition("</script>")[0]
    assert "<b>" not in (tmp_path / "r" / "table.md").read_text()
    drawn = (tmp_path / "r" / "front.svg").read_text()
    for name in (STRANGE, "_hidden", "$\\frac"):
        assert html.escape(name, quote=False) in drawn, name


def test_what_plotly_is_given_is_escaped():
    """It takes its texts for markup."""
    script = (Path(eval_report.__file__).parent / "page" / "page.js").read_text()
    draw = script.partition("function draw()")[2].partition("\nfunction ")[0]
    for told in ("name: plain(method.title)", "plain(r.label)", "plain(name(r))", "text: plain(measureOf[m].title)"):
        assert told in draw
    assert not re.search(r"(?<!plain\()(method\.title|r\.label\b|measureOf\[\w\]\.title)", draw)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed here")
def test_markup_in_a_name_is_seen_in_a_browser(tmp_path: Path):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    scores = made_up(tmp_path / "made", {STRANGE: [0.2, 0.8]})
    main([f"scores={scores}", f"out={tmp_path / 'r'}", "resamples=10"])
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto((tmp_path / "r" / "index.html").as_uri())
        page.wait_for_selector("#plot .points path")
        assert page.locator("#plot .legendtext").first.text_content() == STRANGE
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed here")
def test_the_page_in_a_browser(report: Path, capsys: pytest.CaptureFixture):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(120_000)
        asked: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        started = time.perf_counter()
        page.goto((report / "index.html").as_uri())
        page.wait_for_selector("#plot .points path")
        seconds = time.perf_counter() - started

        assert page.locator("#plot .points path").count() == 4, "one mark for each setting"
        assert page.locator("#scores tbody tr").count() == 4 and page.locator("#volumes tbody tr").count() == 2

        chosen = page.locator("#chosen")
        before = chosen.inner_text()
        marks = page.locator("#plot .points path")
        for k in range(marks.count()):  # a click on each point shows its pictures
            box = marks.nth(k).bounding_box()
            page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            page.wait_for_timeout(200)
            if chosen.inner_text() != before:
                break
        assert chosen.inner_text() != before
        assert page.locator("#grids .cell").count() == 8, "two concepts, two prompts, two seeds"
        assert page.locator("#grids .prompt > span").nth(1).inner_text() == "a sketch of a <cat*> & </script>"
        shown = "a => { const i = new Image(); i.src = a; return i.decode().then(() => [i.width, i.height]); }"
        for cell in page.locator("#grids .cell").all():
            style = cell.get_attribute("style") or ""
            found = re.search(r'url\("(.*?)"\)', style)
            assert found and page.evaluate(shown, found[1]) == [64, 16], "the sheet behind the cell is a picture"

        page.locator("#scores tbody tr").first.click()
        assert chosen.inner_text() == "DreamBooth"
        page.select_option("#scope", "dog")
        assert page.locator("#grids .cell").count() == 4
        page.locator("#scores thead th", has_text="CLIP-I").click()
        assert page.locator("#scores thead th[aria-sort]").inner_text().startswith("CLIP-I")
        page.select_option("#x", "clip_i")
        page.wait_for_function("document.querySelector('#plot .xtitle').textContent.startsWith('CLIP-I')")
        page.locator("#plot .legendtoggle").first.click()
        page.wait_for_function("document.querySelectorAll('#plot .points path').length < 4")
        browser.close()
    assert errors == []
    assert asked and all(url.startswith("file:///") for url in asked), "nothing is asked from the network"
    with capsys.disabled():
        print(f" [the report's page opened in {seconds:.2f} s, {len(asked)} files]", end="")
