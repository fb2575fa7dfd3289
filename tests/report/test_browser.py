"""The report in a real browser: nothing complains, all can be clicked, on a desk and a phone, by day and by night."""

import json
import re
from dataclasses import replace

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


def bandit(folder) -> list[Run]:
    """A run whose arms have rewards, beside one that measured nothing and one on ready scores."""
    arms = ledger_of("UCBSelector", [6.0, 5.0, 4.0], round_seconds=3.0)
    for record in arms.rounds:
        for row, reward in zip(record.groups.values(), (1.5, -0.5), strict=True):
            row |= {"reward": reward, "bonus": 0.25, "pulls": 4.0}
    scored = ledger_of("ScoredSelector", [6.0, 5.5, 5.0])
    scored.rounds[:] = [replace(record, measured=[], influence=[]) for record in scored.rounds]
    names = ("random", "quad", "prior")
    return [
        Run(name, ledger)
        for name, ledger in zip(names, (ledger_of("UniformSelector", [6.0, 5.0, 4.5]), arms, scored), strict=True)
    ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield found
    found.close()


@pytest.fixture(scope="module", params=[story, bandit], ids=["regression", "bandit"])
def any_page(request, browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    page = folder / "report.html"
    page.write_text(build_page(request.param(folder)), encoding="utf-8")
    return browser, page


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("opened")
    page = folder / "report.html"
    page.write_text(build_page(story(folder)), encoding="utf-8")
    return browser, page


CHART = "document.querySelector('.plot.large')"
READY = f"!!{CHART}.querySelector('.main-svg')"
"""Whether the chart of the losses is drawn: charts are when they come into view."""


def see_everything(browser):
    """Scroll through the page, and return the number of charts in view at some time that were not drawn."""
    for place in range(0, browser.run("document.documentElement.scrollHeight"), 600):
        browser.run(f"scrollTo(0, {place})")
        browser.run("new Promise(done => setTimeout(done, 60))")
    visible = "[...document.querySelectorAll('.plot')].filter(each => each.offsetParent)"
    return browser.run(f"{visible}.filter(each => !each.querySelector('.main-svg')).length")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_nothing_complains_nothing_is_asked_for_and_nothing_runs_out_of_the_window(any_page, scheme, width):
    browser, page = any_page
    browser.open(page, width=width, scheme=scheme)
    assert see_everything(browser) == 0
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("document.querySelectorAll('summary').forEach(each => each.click())")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("window.hacked") is None  # texts, names and notes of the story try to run scripts
    assert browser.complaints == []


def test_the_pointer_is_answered_with_the_values_below_it(any_page):
    browser, page = any_page
    browser.open(page)
    browser.wait(READY)
    browser.point(".plot.large", 0.5, 0.5)
    shown = browser.wait(f"[...{CHART}.querySelectorAll('.hoverlayer text')].map(each => each.textContent).join('\\n')")
    assert "random" in shown
    assert re.search(r"\b[4-6]\.?\d*\b", shown)


def test_a_part_that_is_dragged_over_is_enlarged_and_two_clicks_bring_the_whole_back(opened):
    browser, page = opened
    browser.open(page)
    browser.wait(READY)
    ends = f"{CHART}._fullLayout.xaxis.range.map(Number)"
    whole = browser.run(ends)
    browser.drag(".plot.large .nsewdrag", (0.2, 0.8), (0.6, 0.2))
    zoomed = browser.wait(f"(() => {{ const x = {ends}; return x[1] - x[0] < {0.6 * (whole[1] - whole[0])} && x; }})()")
    assert whole[0] < zoomed[0] < zoomed[1] < whole[1]
    x, y = browser.point(".plot.large .nsewdrag")
    for count in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)
    browser.wait(f"Math.abs({ends}[0] - {whole[0]}) < 1e-6")


def test_the_axis_the_scales_and_the_metric_of_the_losses_are_switched(opened):
    browser, page = opened
    browser.open(page)
    browser.wait(READY)
    data = f"{CHART}.data.map(each => [each.name, each.x.at(-1), each.y.at(-1)])"
    assert browser.run(data) == [["random", 30, 4.5], ["mates", 30, 2.125]]
    click = "document.querySelector('.chart-tools [%s]').click()"
    browser.run(click % 'value="flops"')
    assert browser.run(data) == [["random", 3000, 4.5], ["mates", 6000, 2.125]]
    assert "total FLOPs" in browser.run(f"{CHART}.getAttribute('aria-label')")
    browser.run(click % 'value="seconds"')
    assert browser.run(data)[0] == ["random", 30, 4.5]
    assert browser.run(f"{CHART}.layout.xaxis.title.text") == "seconds, selection included"
    browser.run(click % 'name="log-x"')
    browser.run(click % 'name="log-y"')
    assert browser.run(f"[{CHART}._fullLayout.xaxis.type, {CHART}._fullLayout.yaxis.type]") == ["log", "log"]
    browser.run(
        "(() => { const it = document.querySelector('.chart-tools select'); it.value = 'train_loss'; "
        "it.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    assert browser.run(data) == [["random", 30, 5.5], ["mates", 60, 3.125]]
    assert browser.complaints == []


def test_the_button_changes_the_colours_of_page_and_charts(any_page):
    browser, page = any_page
    browser.open(page, scheme="light")
    browser.wait(READY)
    colours = (
        f"[getComputedStyle(document.body).backgroundColor, {CHART}.data[0].line.color, {CHART}.layout.font.color]"
    )
    light = browser.run(colours)
    browser.run("document.querySelector('.theme').click()")
    dark = browser.run(colours)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    browser.open(page, scheme="dark")
    browser.wait(READY)
    assert browser.run(colours) == dark  # as the system's
    browser.run("document.querySelector('.theme').click()")
    assert browser.run(colours) == light


def test_paper_shows_every_chart_in_light_colours(any_page, tmp_path):
    browser, page = any_page
    browser.open(page, scheme="dark")
    browser.wait(READY)
    browser.run(
        "addEventListener('beforeprint', () => { const all = [...document.querySelectorAll('.plot')]"
        ".filter(each => !each.parentElement.hidden); window.printed = [all.length, all.filter(each => "
        "each.querySelector('.main-svg')).length, getComputedStyle(document.body).backgroundColor]; })"
    )
    browser.printed(tmp_path / "page.pdf")
    charts, drawn, background = browser.run("window.printed")
    assert charts == drawn > 5
    assert background == "rgb(251, 250, 248)"
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
        "Alarms",
        "What mates chose",
        "Where mates looked",
        "How the preferences of mates moved",
        "Where the cost went",
        "Notes and warnings",
        "Settings",
    ]
    assert "97% of the plan" in browser.run("document.querySelector('#alarms').innerText")
    assert "was stopped, or is still running" in browser.run("document.querySelector('.caveats').innerText")


def test_pictures_can_be_taken(opened, tmp_path):
    browser, page = opened
    browser.open(page, width=360, scheme="dark")
    browser.run(f"{CHART}.scrollIntoView()")
    browser.wait(READY)
    browser.picture(tmp_path / "dark.png")
    assert (tmp_path / "dark.png").read_bytes().startswith(b"\x89PNG")
