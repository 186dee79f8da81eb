"""docs/api.md says what the docstrings say."""

from tests.api_page import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.api_page`"
