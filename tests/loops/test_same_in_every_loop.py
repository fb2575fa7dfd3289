"""The same tiny model is trained by four loops: they choose, measure and end alike, and each resumes to the bit."""

import pytest
from four_loops import LOOPS
from small_run import POOL, rows

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {
        (name, cut): train(tmp_path_factory.mktemp("run"), cut)
        for name, train in LOOPS.items()
        for cut in (False, True)
    }


def in_ids(name: str, ids: list) -> list:
    """Return the ids of batches; of Hugging Face, whose batches hold none, those of their tokens."""
    if name != "Hugging Face":
        return ids
    known = {tuple(row["input_ids"].tolist()): index for index, row in enumerate(rows(POOL, seed=1))}
    return [[known[tuple(row)] for row in batch] for batch in ids]


@pytest.mark.parametrize("name", [name for name in LOOPS if name != "Lightning"])
def test_a_loop_trains_on_the_same_ids_with_the_same_influence_as_lightning(runs, name):
    own, lightning = runs[name, False], runs["Lightning", False]
    assert in_ids(name, own["ids"]) == lightning["ids"]
    assert own["measured"] == lightning["measured"]
    assert any(own["measured"])
    assert own["influence"] == lightning["influence"]
    assert own["weights"] == lightning["weights"]


@pytest.mark.parametrize("name", LOOPS)
def test_a_run_that_is_resumed_inside_a_round_ends_with_the_same_bits(runs, name):
    assert runs[name, True] == runs[name, False]
