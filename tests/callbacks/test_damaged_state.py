"""Selection state of a checkpoint that cannot be what a run has written is refused, with a sentence."""

import copy

import pytest
import torch
from small_run import BATCH, SIMPLE, SmallLM, small_data, small_trainer

from liveselect.callbacks import DataSelection
from liveselect.grammar import SelectionWarning
from liveselect.parts import digest_of
from liveselect.selectors import UniformSelector

SETTINGS = {**SIMPLE, "limit_val_batches": 0}


def selection(folder):
    return DataSelection(UniformSelector(), every_n_steps=4, dirpath=folder / "s")


def resume(folder, path, **settings):
    trainer = small_trainer(folder, [selection(folder)], **{**SETTINGS, "max_steps": 10, **settings})
    trainer.fit(SmallLM(), datamodule=small_data(), ckpt_path=path)
    return trainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = small_trainer(folder, [selection(folder)], **SETTINGS, max_steps=6)
    trainer.fit(SmallLM(), datamodule=small_data())
    trainer.save_checkpoint(folder / "x.ckpt")
    return torch.load(folder / "x.ckpt", weights_only=True)


def swap_two(state):
    ids = state["run"]["plan"]["ids"]
    ids[[0, 1]] = ids[[1, 0]]


def as_if_written(change):
    """Change a state as a run could have written it, or one that is put together from two checkpoints."""

    def changed(state):
        change(state)
        state["digest"] = digest_of({key: value for key, value in state.items() if key != "digest"})

    return changed


def move_a_use(state):
    """Take a use from one candidate and give it to another: sums and sizes stay right."""
    uses = state["run"]["pool"]["uses"]
    uses[int(uses.nonzero()[0])] -= 1
    uses[int((uses == 0).nonzero()[-1])] += 1


def leave_out(*path):
    def change(state):
        *outer, last = path
        for key in outer:
            state = state[key]
        del state[last]

    return change


CHANGES = {
    "another order of the plan": (swap_two, "where its ledger has"),
    "an id outside of the pool": (
        lambda state: state["run"]["plan"]["ids"].__setitem__(0, 10**6),
        "ids outside of the pool's 0 to",
    ),
    "settings that are a list": (lambda state: state.update(settings=[1]), "its settings, got a dict that does not"),
    "a negative id": (lambda state: state["run"]["plan"]["ids"].__setitem__(0, -1), "ids outside of the pool"),
    "a cursor behind the plan": (lambda state: state["run"]["plan"].update(cursor=1000), "its cursor at 1000"),
    "a negative cursor": (lambda state: state["run"]["plan"].update(cursor=-4), "its cursor at -4"),
    "a cursor of another step": (
        as_if_written(lambda state: state["run"]["plan"].update(cursor=BATCH)),
        "stands at step 6, at which .* and its plan counts",
    ),
    "a plan of another round": (lambda state: state["run"]["plan"].update(round=0), "of round 0, where its ledger has"),
    "no plan": (lambda state: state["run"].update(plan=None), "no plan and 2 rounds"),
    "uses of a smaller pool": (
        lambda state: state["run"]["pool"].update(uses=state["run"]["pool"]["uses"][:-1]),
        "uses of shape",
    ),
    "one use too many": (
        lambda state: state["run"]["pool"]["uses"].__setitem__(0, 7),
        "uses of candidates and .* choices in its rounds",
    ),
    "negative uses": (lambda state: state["run"]["pool"]["uses"].__setitem__(0, -1), "or negative ones"),
    "uses of other candidates": (move_a_use, "is not what was written"),
    "a condition of another kind": (
        lambda state: state["conditions"].update(batch_size="2"),
        "is not what was written",
    ),
    "a measurement of nothing": (
        lambda state: state["run"]["ledger"]["rounds"][0]["measured"].append(10**6),
        "is not what was written",
    ),
    "no random states": (leave_out("random_states"), r"lacks \['random_states'\]"),
    "no plan at all": (leave_out("run", "plan"), r"lacks \['plan'\]"),
    "more than is known": (lambda state: state.update(future=1), r"holds \['future'\], which this version does not"),
    "more in the run": (
        lambda state: state["run"].update(future=1),
        r"holds \['future'\], which this version does not",
    ),
    "an empty ledger": (lambda state: state["run"].update(ledger={}), "cannot be read .KeyError"),
    "an empty entry": (lambda state: state.update(overhearing={}), "cannot be read .KeyError"),
    "an example that is cut": (
        lambda state: state["run"]["ledger"]["rounds"][0]["examples"][0].update(marks=[[0, 1]]),
        "is not what was written",
    ),
    "uses as text": (lambda state: state["run"]["pool"].update(uses="none"), "cannot be read .AttributeError"),
    "no random state": (lambda state: state.update(random_states=[]), "holds no random states"),
    "a later version": (lambda state: state.update(version=3), "state of version 3"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_no_run_has_written_is_refused(tmp_path, checkpoint, name):
    change, message = CHANGES[name]
    state = copy.deepcopy(checkpoint)
    change(state["callbacks"]["DataSelection"])
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, tmp_path / "x.ckpt")


def test_the_checkpoint_itself_is_resumed_and_another_size_of_steps_is_reported(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "x.ckpt")
    assert resume(tmp_path, tmp_path / "x.ckpt").global_step == 10
    with pytest.warns(SelectionWarning, match=f"resumed with {2 * BATCH} examples .* was written with {BATCH}:"):
        trainer = resume(tmp_path, tmp_path / "x.ckpt", accumulate_grad_batches=2, max_steps=7)
    trainer.save_checkpoint(tmp_path / "mixed.ckpt")  # inside the round whose steps had two sizes
    assert resume(tmp_path, tmp_path / "mixed.ckpt", accumulate_grad_batches=2, max_steps=9).global_step == 9
