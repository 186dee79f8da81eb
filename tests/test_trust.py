"""The page on reliability says what the tests recorded, and what failed."""

from __future__ import annotations

from pathlib import Path

from perfusion.provenance import provenance
from tests.trust.__main__ import Found, page

XML = """<testsuites><testsuite><testcase name="a"><properties>{}</properties>{}</testcase></testsuite></testsuites>"""


def found(path: Path, failure: str = "", **counted: object) -> Found:
    entries = [f'<property name="{name.replace("_", " ")}" value="{value}"/>' for name, value in counted.items()]
    path.write_text(XML.format("".join(entries), failure))
    return Found.read(path)


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    kills = found(tmp_path / "a.xml", kills=20, trainings_compared=3, differences=0)
    broken = found(tmp_path / "b.xml", "<failure/>", kills=20, trainings_compared=4, differences=1)
    files = found(tmp_path / "c.xml", files=10_000)
    said = page(
        {
            "tests/trust/test_kills.py::test_kills[lora-1]": kills,
            "tests/trust/test_kills.py::test_kills[custom_diffusion-2]": broken,
            "tests/test_hostile_files.py::test_many": files,
        },
        provenance(),
    )
    assert "| lora | 1 | 20 | 3 | 0 |" in said and "| custom_diffusion | 2 | 20 | 4 | 1 |" in said
    assert "10000 files, 0 wrong answers" in said
    assert "- `tests/trust/test_kills.py::test_kills[custom_diffusion-2]` failed." in said
