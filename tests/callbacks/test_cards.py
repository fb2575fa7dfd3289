"""The method cards: what they call the default is the default."""

import inspect
import re

import pytest

from liveselect.callbacks import MATES, PDS, LivePDS, Quad
from liveselect.influence import PMPInfluence
from liveselect.regressors import EncoderRegressor

NAMED = {("LivePDS", "estimator"), ("LivePDS", "regressor"), ("MATES", "regressor")}  # described in words


def knobs(preset) -> dict[str, list[str]]:
    """The rows of the card: argument -> published, default here, meaning."""
    lines = inspect.getdoc(preset).splitlines()
    bars = [index for index, line in enumerate(lines) if re.fullmatch(r"=+(  =+)+", line)]
    starts = [found.start() for found in re.finditer("=+", lines[bars[0]])]
    cut = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    rows = [[line[part].strip() for part in cut] for line in lines[bars[1] + 1 : bars[2]]]
    assert [lines[bars[0] + 1][part].strip() for part in cut] == ["argument", "published", "default here", "meaning"]
    return {name: cells for name, *cells in rows if name}


@pytest.mark.parametrize("preset", [MATES, Quad, PDS, LivePDS])
def test_the_card_names_the_defaults_that_differ_and_only_those(preset):
    defaults = {name: each.default for name, each in inspect.signature(preset).parameters.items()}
    for name, (published, here, _) in knobs(preset).items():
        if (preset.__name__, name) in NAMED:
            continue
        default = str(defaults[name])
        if here:
            assert here == default, name
            assert published != default, name
        else:
            assert published.replace(",", "").split(" ")[0] == default, name


def test_the_parts_that_the_cards_name_are_those_that_are_built():
    assert isinstance(MATES().selector.regressor, EncoderRegressor)
    pds = LivePDS()
    assert isinstance(pds.estimator, PMPInfluence)
    assert pds.estimator.dynamics == "live"
    assert inspect.signature(EncoderRegressor).parameters["encoder"].default == "bert-base-uncased"
