"""The page: self-contained, safe, complete."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs
from report.ledgers import ledger_of

from liveselect.ledger import Alarm, Ledger
from liveselect.report import Run, page, verdict, words, write_report

EVIL = "<script>alert('x')</script><img src=x onerror=y> & \x00\x1b[31m \u202eback $\\frac$ ]]> </pre></main>"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Reader(HTMLParser):
    """Collects elements, their attributes and the text, and checks that elements close in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def build_page(*arguments):
    """The page without the library that draws its charts, which is the same in all pages."""
    whole, library = page.build_page(*arguments), get_plotlyjs()
    assert whole.count(library) == 1
    assert len(whole) < 6_000_000
    return whole.replace(library, "")


def figures_in(built):
    return json.loads(re.search(r'id="figures">(.*?)</script>', built, flags=re.DOTALL)[1])


def two_runs(text="some words"):
    return [
        Run("random", ledger_of("UniformSelector", [6.0, 5.0, 4.5], text=text)),
        Run("mates", ledger_of("RegressionSelector", [6.0, 4.25, 2.125], round_seconds=10.0, text=text)),
    ]


@pytest.mark.parametrize("runs", [two_runs(), two_runs()[:1], two_runs()[1:], two_runs(EVIL)])
def test_the_page_is_well_formed_and_refers_to_nothing_outside_itself(runs):
    page = build_page(runs)
    reader = Reader(page)
    assert reader.open == []
    for tag, attributes in reader.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "action"}:
                assert value.startswith("#")
    scripts = [attributes for tag, attributes in reader.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "figures"}, {}, {}]  # all of them in the page
    css = "".join(re.findall(r"<style.*?</style>", page, flags=re.DOTALL))
    assert "@import" not in css
    assert re.findall(r"url\((?!#)", page) == []


def test_inner_references_of_pictures_point_into_the_page():
    reader = Reader(build_page(two_runs()))
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    wanted = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", build_page(two_runs())))
    for pair in wanted:
        assert ids.count(pair[0] or pair[1]) >= 1


def test_text_of_the_pool_stays_text():
    page = build_page(two_runs(EVIL))
    shown = "".join(Reader(page).text)
    assert "<script>alert('x')</script><img src=x onerror=y> & " in shown
    assert not set(page) & {"\x00", "\x1b", "\u202e"}
    assert "\u2400\u241b[31m" in shown  # visible signs in their place


def test_names_and_notes_and_settings_are_escaped_too():
    runs = [Run("<b>run</b>", ledger_of("<i>Selector</i>", [2.0]))]
    runs[0].ledger.about["<u>key</u>"] = "<u>value</u>"
    runs[0].ledger.rounds[0].notes.append("<u>note</u>")
    runs[0].ledger.rounds[0].groups["<u>group</u>"] = {"available": 1, "measured": 0, "chosen": 1}
    runs[0].ledger.rounds[0].metrics["<u>metric</u>"] = 1.0
    runs[0].ledger.evaluations[0].metrics["<u>loss</u>"] = 1.0
    page = build_page(runs)
    assert not re.search(r"<[bui]>(?!</b>)\w+</[ui]>", page)
    assert "<u>" not in page
    assert "<i>" not in page
    assert build_page(runs, "<u>loss</u>").count("<u>") == 0


def test_every_number_of_every_round_and_evaluation_is_in_the_page():
    runs = two_runs()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", build_page(runs))
    for record in runs[1].ledger.rounds:
        row = [record.round, record.step, record.selector, record.candidates, len(record.measured), record.chosen]
        shown = [str(value) if isinstance(value, str) else words.number(value) for value in row]
        shown += [words.duration(record.total_seconds), words.flops(record.total_flops)]
        ordered = sorted(record.metrics.items(), key=lambda item: "spearman" not in item[0])
        assert contains(cells, [*shown, words.number(ordered[0][1], 3)])
        assert contains(cells, [words.number(record.round), *(words.number(value) for _, value in ordered)])
    for run in runs:
        for entry in run.ledger.evaluations:
            assert contains(cells, [run.name, str(entry.step)])
            assert all(words.number(value) in cells for value in entry.metrics.values())


def contains(cells, row):
    return any(cells[start : start + len(row)] == row for start in range(len(cells)))


def test_shares_of_sources_are_the_ledger_s():
    cells = re.findall(r"<td[^>]*>(.*?)</td>", build_page(two_runs()))
    assert contains(cells, ["prose", "75%", "25%", words.percent(11 / 40), words.percent(12 / 40)])
    assert contains(cells, ["code", "25%", "75%", words.percent(29 / 40), words.percent(28 / 40)])


def test_of_very_many_sources_the_recorded_ones_keep_their_share_of_the_whole():
    runs = two_runs()
    for record in runs[1].ledger.rounds:
        del record.groups["code"]  # what was not touched is not recorded
        record.groups["other"] = {"available": 1, "measured": 0, "chosen": 0, "reward": 0.125}
    cells = re.findall(r"<td[^>]*>(.*?)</td>", build_page(runs))
    assert contains(cells, ["prose", "75%", "25%", words.percent(11 / 40), words.percent(12 / 40)])
    assert contains(cells, ["prose", "–", "other", "0.125"])  # what else the selector knows


def test_the_cost_of_all_phases_adds_up_to_the_total():
    page = build_page(two_runs())
    section = page[page.index('id="cost"') : page.index('id="settings"')]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", section)
    assert contains(cells, ["training", "30 s", "50%"])
    assert contains(cells, ["choose", "30 s", "50%"])
    assert contains(cells, ["total", "1 min 00 s"])
    widths = [
        [float(width) for width in re.findall(r"width: ([\d.]+)%", bar)]
        for bar in re.findall(r'<div class="stack".*?</div>', section)
    ]
    assert widths == [[50.0], [50.0, 50.0]]  # random trained for 30 s and chose in no time


def test_small_phases_are_told_together_and_each_for_itself():
    runs = two_runs()
    seconds = {"choose": 30.0, "b": 0.2, "c": 0.1, "d": 0.05}
    runs[1].ledger.rounds[:] = [replace(runs[1].ledger.rounds[0], seconds=seconds)]
    page = build_page(runs)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page[page.index('id="cost"') : page.index('id="settings"')])
    assert contains(
        cells, ["choose", "30 s", "50%", "1 kFLOP", "3 phases below 1.0%", words.duration(0.2 + 0.1 + 0.05), "0.6%"]
    )
    assert contains(cells, ["b", "0.2 s", "0.3%", "–", "c", "0.1 s", "0.2%"])


def test_links_at_the_top_lead_to_every_section():
    page = build_page(two_runs())
    reader = Reader(page)
    sections = [attributes["id"] for tag, attributes in reader.elements if tag == "section"]
    links = [attributes["href"] for tag, attributes in reader.elements if tag == "a"]
    assert links == [f"#{name}" for name in sections]
    assert len(set(links)) == len(links) >= 5


def test_numbers_that_stand_out_are_those_of_the_comparison():
    runs = two_runs()
    tiles = re.findall(r"<dt>(.*?)</dt><dd class=\"(\w*)\">(.*?)</dd><dd>(.*?)</dd>", build_page(runs))
    by_step, by_time = (verdict.compare(*runs, "val_loss", axis) for axis in ("step", "seconds"))
    assert tiles[0] == ("val_loss after 30 steps", "lower", words.loss(by_step.other), "random 4.500")
    assert tiles[1][:3] == ("val_loss at equal time", by_time.outcome, words.loss(by_time.other))
    assert ("time for selection", "", "50%", "of 1 min 00 s") in tiles
    assert not any(tile[0] == "alarms" for tile in tiles)
    three = [*runs, replace(two_runs()[1], name="other")]
    names = re.findall(r"<dt>(.*?)</dt><dd class", build_page(three))
    assert names == ["mates at equal time", "other at equal time"]
    three[1].ledger.rounds[1].alarms.append(Alarm(1, 10, "flip", "turned"))
    assert re.findall(r"<dt>(.*?)</dt><dd class", build_page(three))[-1] == "alarms"


def test_the_only_source_of_a_pool_is_not_named():
    run = Run("mates", ledger_of("RegressionSelector", [6.0, 5.0]))
    for record in run.ledger.rounds:
        record.groups.pop("code")
        record.metrics["drift/mixture"] = 0.0
        record.examples[:] = [replace(example, group="prose") for example in record.examples]
    page = build_page([run])
    assert "has a single source" in page
    assert "prose" not in page
    assert "Mixture" not in page


@pytest.mark.parametrize("value", [5.0, 0.0, -1e-7, 1e9])
def test_a_flat_line_has_an_axis_with_room(value):
    page = build_page([Run("flat", ledger_of("UniformSelector", [value] * 4))])
    assert "val_loss against training steps" in page


def test_a_very_long_run_makes_a_page_of_bounded_size():
    def page(rounds):
        ledger = ledger_of("RegressionSelector", [9.0] * 40)
        record = ledger.rounds[1]
        record.notes.append("the same note")
        record.alarms.append(Alarm(1, 10, "flip", "turned"))
        ledger.rounds[:] = [replace(record, round=index, step=index) for index in range(rounds)]
        ledger.evaluations[:] = [replace(ledger.evaluations[0], step=index) for index in range(rounds)]
        return build_page([Run("long", ledger)])

    short, long = page(1500), page(3000)
    assert len(long) < 1.05 * len(short)
    assert "200 of 3\u202f000, evenly spread" in long
    assert "long: the same note (rounds 0, 1, 2, 3, 4 and 2995 more)" in long


def test_an_empty_ledger_makes_a_page_that_says_so():
    shown = "".join(Reader(build_page([Run("empty", Ledger())])).text)
    assert "No evaluation was recorded yet" in shown
    assert "No round was recorded" in shown


def test_values_that_are_not_finite_do_not_stop_the_report():
    runs = two_runs()
    record = runs[1].ledger.rounds[0]
    record.influence[:] = [math.nan, math.inf, -math.inf]
    record.metrics["regressor/spearman"] = math.nan
    runs[1].ledger.evaluate(40, {"val_loss": math.nan})
    runs[0].ledger.evaluate(40, {"val_loss": math.inf})
    assert "not a number" in "".join(Reader(build_page(runs)).text)


def test_many_rounds_and_sources_are_all_in_the_table_and_some_are_drawn():
    ledger = ledger_of("RegressionSelector", [9.0 - index / 10 for index in range(30)])
    for record in ledger.rounds:
        record.groups.update({f"s{k}": {"available": k + 1, "measured": 0, "chosen": 1} for k in range(60)})
    page = build_page([Run("long", ledger)])
    # two metrics of the losses on three axes; two histograms of 12 rounds; 12 sources; how one number moved
    assert page.count("data-chart=") == len(figures_in(page)) == 2 * 3 + 2 * 12 + 12 + 1
    assert "12 of 30 such rounds are shown" in page
    assert "and 22 more" in page


def test_the_same_ledgers_give_the_same_page():
    assert build_page(two_runs()) == build_page(two_runs())


def colours_in(value):
    if isinstance(value, dict):
        for name, each in value.items():
            yield from [each] if name == "color" and isinstance(each, str) else colours_in(each)
    elif isinstance(value, list):
        yield from (found for each in value for found in colours_in(each))


def test_charts_take_their_colours_from_the_page():
    page = build_page(two_runs())
    colours = set(colours_in(figures_in(page)))
    assert len(colours) >= 3
    for colour in colours:
        name = re.fullmatch(r"var\((--[\w-]+)\)", colour)[1]
        assert page.count(f"{name}:") == 3  # light, dark by the system, dark by the button


def test_the_chart_of_the_losses_has_every_evaluation_on_every_axis():
    runs = two_runs()
    page = build_page(runs)
    choices = re.search(r'data-choices="(.*?)"', page, flags=re.DOTALL)[1].split("\n")
    assert choices == [
        f"{name}\t{axis}" for name in ("val_loss", "train_loss") for axis in ("step", "seconds", "flops")
    ]
    for choice, figure in zip(choices, figures_in(page), strict=False):
        metric, axis = choice.split("\t")
        for run, trace in zip(runs, figure["data"], strict=True):
            assert trace["name"] == run.name
            points = list(zip(trace["x"], trace["y"], strict=True))
            assert points == [pytest.approx(point) for point in run.curve(metric, axis)]


def test_times_that_cannot_be_compared_are_no_choice_of_the_chart():
    runs = two_runs()
    runs[1].ledger.training_seconds *= 3
    page = build_page(runs)
    assert "\tseconds" not in re.search(r'data-choices="(.*?)"', page, flags=re.DOTALL)[1]
    assert "did not train equally fast" in page


def test_the_page_opens_with_what_the_runs_are():
    runs = two_runs()
    about = {"started": "2026-11-30T23:05:09+00:00", "model": "CausalLM", "model.parameters": 1_250_000, "ranks": 8}
    about |= {"device": "cuda", "device.name": "NVIDIA H200", "precision": "bf16-mixed", "versions.torch": "2.13.0"}
    for run in runs:
        run.ledger.about |= about | {"global_batch": 512, "max_steps": 40}
        run.ledger.training_tokens = 30 * 512 * 1024
    runs[1].ledger.finished = False
    runs[1].ledger.about["ratio"] = 0.4
    page = build_page(runs)
    top = page[: page.index("<section")]
    for text in (
        "30 November 2026, 23:05 UTC",
        "CausalLM, 1.25M parameters",
        "30 of 40 steps, 512 sequences a step, 15.7M tokens",
        "8 × NVIDIA H200, bf16-mixed",
        "torch 2.13.0",
        "mates: 1 min 00 s so far",
        "random: 30 s",
    ):
        assert text in top, text
    assert contains(re.findall(r"<td[^>]*>(.*?)</td>", top), ["ratio", "–", "0.4"])
    assert "2026-11-30T23:05:09" not in page  # when it began is no setting


def test_a_run_under_way_says_what_there_is():
    random, mates = two_runs()
    mates.ledger.finished = False
    mates.ledger.evaluations.clear()
    mates.ledger.about["max_steps"] = 400
    page = build_page([random, mates])
    shown = "".join(Reader(page).text)
    assert "mates is at step 20 of 400: there is nothing to compare yet." in shown
    assert "never" not in shown
    assert "alarms" not in shown


def test_what_made_a_text_score_is_marked_and_other_text_is_as_it_is():
    runs = two_runs("good <b> bad & plain")
    for record in runs[1].ledger.rounds:
        record.examples[0].marks.extend([(0, 4, 2.0), (9, 12, -1.0), (15, 20, 1e-9), (90, 95, 1.0)])
    page = build_page(runs)
    strong, weak = ('style="--strength: 1.00">good</mark>', 'style="--strength: 0.50">bad</mark>')
    assert f'<mark class="up" {strong} &lt;b&gt; <mark class="down" {weak} &amp; plain</pre>' in page
    assert "raised it" in page
    assert "<mark" not in build_page(two_runs())


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no run evaluated 'accuracy'; evaluated were train_loss, val_loss"):
        build_page(two_runs(), "accuracy")
    with pytest.raises(ValueError, match="at least one run"):
        build_page([])


def test_the_configuration_beside_a_run_is_shown_as_text(tmp_path: Path):
    ledger_of("UniformSelector", [3.0]).write(tmp_path / "run" / "selection" / "ledger.jsonl")
    (tmp_path / "run" / "config.yaml").write_text("trainer:\n  max_steps: 3  # <b>\n")
    page = write_report([tmp_path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "trainer:\n  max_steps: 3  # &lt;b&gt;\n" in page


def test_the_report_is_written_where_it_was_asked_for(tmp_path: Path):
    ledger_of("UniformSelector", [3.0]).write(tmp_path / "run" / "ledger.jsonl")
    out = write_report([tmp_path], tmp_path / "pages" / "report.html")
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
