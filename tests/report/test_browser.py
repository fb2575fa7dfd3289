"""The report in a real browser: nothing complains, all can be clicked, on a desk and a phone, by day and by night."""

import json

import numpy as np
import pytest
import torch
from browser import Browser, find_browser
from report.ledgers import ledger_of

from liveselect.ledger import Alarm, Example
from liveselect.report import Run, build_page

pytestmark = pytest.mark.skipif(find_browser() is None, reason="there is no browser on this machine")


def story(folder) -> list[Run]:
    """Runs with everything that a report can show."""
    pool = folder / "pool"
    (pool / "clusters").mkdir(parents=True)
    np.save(pool / "clusters/centroids.npy", torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).numpy())
    (pool / "clusters/clusters.json").write_text(json.dumps({"names": ["prose", "code", "c", "d", "e", "f"]}))
    config = f"data:\n  init_args:\n    pool: {pool}\n    groups: clusters\n"
    ledger = ledger_of("RegressionSelector", [6.0, 4.25, 2.125], round_seconds=10.0)
    ledger.finished = False
    for record in ledger.rounds:
        record.metrics.update({"drift/rank_correlation": 0.5, "drift/mixture": 0.1, "drift/overlap": 0.0})
        record.examples.extend(
            Example(
                900 + i, "code", 2.0, i % 2 == 0, f"{'apple' if i % 2 else 'pear'} of-{record.round} " + "long" * 300
            )
            for i in range(4)
        )
    evil = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'></pre></article>"
    ledger.rounds[0].examples.append(Example(999, evil, 1.0, True, evil))
    ledger.rounds[0].groups[evil] = {"available": 1, "measured": 0, "chosen": 1}
    ledger.rounds[0].notes.append(evil)
    ledger.rounds[1].alarms.append(Alarm(1, 10, "takeover", "'code' fills 97% of the plan"))
    return [Run("random", ledger_of("UniformSelector", [6.0, 5.0, 4.5])), Run("mates", ledger, config)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    page = folder / "report.html"
    page.write_text(build_page(story(folder)), encoding="utf-8")
    browser = Browser(folder / "profile")
    yield browser, page
    browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_nothing_complains_nothing_is_asked_for_and_nothing_runs_out_of_the_window(opened, scheme, width):
    browser, page = opened
    browser.open(page, width=width, scheme=scheme)
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("document.querySelectorAll('summary').forEach(each => each.click())")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("window.hacked") is None  # texts, names and notes of the story try to run scripts
    assert browser.complaints == []


def test_every_link_leads_to_its_section(opened):
    browser, page = opened
    browser.open(page)
    places = browser.run("[...document.querySelectorAll('nav a')].map(each => each.getAttribute('href'))")
    assert len(places) >= 8
    for place in places:
        browser.run(f"document.querySelector('nav a[href=\"{place}\"]').click()")
        assert browser.run("location.hash") == place
        top = browser.run(f"document.querySelector('{place}').getBoundingClientRect().top")
        bottom = browser.run("scrollY + innerHeight >= document.documentElement.scrollHeight - 2")
        assert abs(top) < 30 or bottom
    assert browser.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_background(opened, scheme):
    browser, page = opened
    browser.open(page, scheme=scheme)
    luminance = """selector => {
      const style = getComputedStyle(document.querySelector(selector));
      const of = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(x => x / 255)
        .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126*r + 0.7152*g + 0.0722*b; };
      const back = getComputedStyle(document.body).backgroundColor;
      const [a, b] = [of(style.color), of(back)].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); }"""
    for selector in ("h1", "p", ".note", "summary", ".caveats li", ".search label"):
        assert browser.run(f"({luminance})({selector!r})") >= 4.5, selector


def test_search_shows_what_holds_the_words_and_unfolds_its_rounds(opened):
    browser, page = opened
    browser.open(page)
    script = """words => { const input = document.querySelector('.search input'); input.value = words;
      input.dispatchEvent(new Event('input'));
      const seen = [...document.querySelectorAll('article.chosen, article.rejected')].filter(x => x.offsetParent);
      return [seen.map(x => x.textContent), document.querySelector('.search output').textContent]; }"""
    before, _ = browser.run(f"({script})('')")
    shown, told = browser.run(f"({script})('OF-2 Apple')")
    assert len(shown) == 2
    assert all("apple of-2" in text for text in shown)
    assert told == "0 chosen, 2 rejected"
    shown, told = browser.run(f"({script})('pear')")
    assert len(shown) == 6
    assert told == "6 chosen, 0 rejected"
    assert browser.run(f"({script})('nowhere at all')")[0] == []
    assert browser.run(f"({script})('')")[0] == before
    assert browser.complaints == []


def test_the_story_is_told_in_order(opened):
    browser, page = opened
    browser.open(page)
    titles = browser.run("[...document.querySelectorAll('h2')].map(each => each.textContent)")
    assert titles == [
        "Loss",
        "Where the cost went",
        "Alarms",
        "What mates chose",
        "Where mates looked",
        "How the preferences of mates moved",
        "Notes and warnings",
        "Settings",
    ]
    assert "97% of the plan" in browser.run("document.querySelector('#alarms').innerText")
    assert "was stopped, or is still running" in browser.run("document.querySelector('.caveats').innerText")


def test_pictures_can_be_taken(opened, tmp_path):
    browser, page = opened
    browser.open(page, width=360, scheme="dark")
    browser.picture(tmp_path / "dark.png")
    assert (tmp_path / "dark.png").read_bytes().startswith(b"\x89PNG")
