"""The page of a sweep in a browser: nothing overflows, and every spot tells its figures."""

import pytest
from tests.report.sweeps import DEMO, write_sweep
from tests.review.conftest import browser  # noqa: F401

from narrowly.report import verdicts


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    arms = {name: DEMO[name] for name in ("undefended", "kl", "interleave")}
    write_sweep(folder, tasks=("persona",), arms=arms, seeds=(0, 1))
    return verdicts(folder, folder / "report").folder / "report/report.html"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 1000, 390])
def test_it_fits_and_tells(browser, page_file, width):  # noqa: F811
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(page_file.as_uri())
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    spots = page.locator(".spot")
    assert spots.count() >= 5
    for place in range(spots.count()):
        spot, tip = spots.nth(place), spots.nth(place).locator(".tip")
        assert not tip.is_visible()
        spot.focus()
        box = tip.bounding_box()
        assert tip.is_visible() and box["x"] >= 0 and box["x"] + box["width"] <= width
        assert page.evaluate(fits)
        spot.evaluate("element => element.blur()")
    spots.first.hover()
    assert spots.first.locator(".tip").is_visible()
    page.close()
