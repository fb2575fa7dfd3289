"""What counts as a part: everything of the library, whatever inherits from the grammar, and nothing else."""

import inspect
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeSource, random_source

from liveselect import influence, regressors, selectors
from liveselect.callbacks import DataSelection
from liveselect.grammar import Around, InfluenceEstimator, InfluenceRegressor, Selector
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence, PMPInfluence
from liveselect.parts import check_part, check_source, save_part
from liveselect.pool import CandidatePool
from liveselect.regressors import EncoderRegressor, HashedRidgeRegressor, TokenTableRegressor
from liveselect.rounds import SelectionRun
from liveselect.selectors import (
    CappedSelector,
    MixtureSelector,
    PortfolioSelector,
    PriorSelector,
    RegressionSelector,
    ReplaySelector,
    ScoredSelector,
    StratifiedSelector,
    UCBSelector,
    UniformSelector,
)

ARGUMENTS = {Selector: "selector", InfluenceEstimator: "estimator", InfluenceRegressor: "regressor"}


class Chooser(Selector):
    """The least selector."""

    def select(self, round, budget):
        return round.candidates[:budget]


class Measurer(InfluenceEstimator):
    """The least estimator."""

    def score(self, model, batch):
        return batch["id"].float()


class Predictor(InfluenceRegressor):
    """The least regressor."""

    def fit(self, round, ids, influence):
        return {}

    def predict(self, round, batch):
        return batch["id"].float()


LEAST = {Selector: Chooser, InfluenceEstimator: Measurer, InfluenceRegressor: Predictor}


def regression():
    return RegressionSelector(HashedRidgeRegressor(), probes=8)


def public(kind):
    """The names that a base class of the grammar declares."""
    return {name for base in kind.__mro__ for name in vars(base) if not name.startswith("_")}


def part_with(kind, **members):
    """The least part of a kind, with these members of its own."""
    return type("Mine", (LEAST[kind],), members)()


def refused(part, kind):
    """The message with which a part is refused."""
    with pytest.raises(TypeError) as caught:
        check_part(part, kind, ARGUMENTS[kind])
    return str(caught.value)


# ---- what is accepted --------------------------------------------------------------------------------------------

LIBRARY = [
    (Selector, UniformSelector()),
    (Selector, ScoredSelector(np.zeros(9))),
    (Selector, ReplaySelector("a run")),
    (Selector, UCBSelector()),
    (Selector, StratifiedSelector()),
    (Selector, MixtureSelector()),
    (Selector, CappedSelector(UCBSelector())),
    (Selector, regression()),
    (Selector, PriorSelector(UCBSelector(), np.zeros(9))),
    (Selector, PortfolioSelector({"one": UniformSelector(), "other": UCBSelector()})),
    (InfluenceEstimator, OneStepInfluence()),
    (InfluenceEstimator, FirstOrderInfluence()),
    (InfluenceEstimator, KFACInfluence()),
    (InfluenceEstimator, PMPInfluence()),
    (InfluenceEstimator, influence.PerplexityInfluence()),
    (InfluenceEstimator, influence.ReducibleLossInfluence()),
    (InfluenceEstimator, influence.LossDropInfluence()),
    (InfluenceEstimator, influence.LESSInfluence()),
    (InfluenceEstimator, influence.NgramRatioInfluence()),
    (InfluenceRegressor, HashedRidgeRegressor()),
    (InfluenceRegressor, EncoderRegressor()),
    (InfluenceRegressor, TokenTableRegressor()),
]


@pytest.mark.parametrize(("kind", "part"), LIBRARY, ids=lambda each: type(each).__name__)
def test_all_parts_of_the_library_are_accepted(kind, part):
    assert check_part(part, kind, ARGUMENTS[kind]) is part


def test_none_of_them_is_forgotten_above():
    exported = {name for module in (influence, regressors, selectors) for name in module.__all__}
    assert {type(part).__name__ for _, part in LIBRARY} == exported - {"NGramPrior"}  # scores, which are no part


@pytest.mark.parametrize("kind", LEAST)
def test_the_least_part_of_each_kind_is_accepted(kind):
    part = LEAST[kind]()
    assert check_part(part, kind, ARGUMENTS[kind]) is part


def test_parts_may_have_names_of_their_own_and_arguments_with_defaults():
    class Mine(Chooser):
        proposes = 0  # a number is no misspelt method
        needs_estimator = True

        def __init__(self):
            self.weights = torch.ones(3)

        @property
        def seen(self):
            return 0

        @property
        def observed(self):
            return 0

        def temperature_in(self, round_index):
            return 1.0

        def measure(self):
            return 0

        def _eligable(self):
            return None

        def propose(self, round, again=False):
            return super().propose(round)

        def observe(self, *arguments, **settings):
            pass

        @staticmethod
        def cost_before_training():
            return {}

    check_part(Mine(), Selector, "selector")


def test_a_part_without_memory_keeps_nothing_and_refuses_what_another_kept():
    part = Chooser()
    assert part.state_dict() == {}
    part.load_state_dict({})
    with pytest.raises(ValueError, match=r"Chooser keeps no state, but the checkpoint holds \['a', 'b'\] for it"):
        part.load_state_dict({"b": 1, "a": 2})


@pytest.mark.parametrize(
    ("kind", "abstract"),
    [(Selector, {"select"}), (InfluenceEstimator, {"score"}), (InfluenceRegressor, {"fit", "predict"})],
)
def test_only_what_a_part_cannot_do_without_is_abstract(kind, abstract):
    assert kind.__abstractmethods__ == abstract
    with pytest.raises(TypeError, match="abstract"):
        kind()


# ---- what is refused ---------------------------------------------------------------------------------------------


class Lookalike:
    """Has every method of every kind, and inherits none."""


for name in set().union(*map(public, LEAST)):
    setattr(Lookalike, name, lambda self, *arguments: None)


@pytest.mark.parametrize("kind", LEAST)
@pytest.mark.parametrize("part", [object(), Lookalike(), Lookalike, "uniform", None])
def test_what_does_not_inherit_from_the_grammar_is_refused(kind, part):
    what = "the class Lookalike" if part is Lookalike else f"an object of {type(part).__name__}"
    message = refused(part, kind)
    assert message == f"expected {ARGUMENTS[kind]} to inherit from liveselect.grammar.{kind.__name__}, got {what}"


@pytest.mark.parametrize("kind", LEAST)
def test_a_class_in_place_of_an_object_is_refused(kind):
    least = LEAST[kind].__name__
    message = refused(LEAST[kind], kind)
    assert message == f"expected {ARGUMENTS[kind]} to be an object, got the class {least}: pass {least}(...)"


@pytest.mark.parametrize(
    ("kind", "part", "other"),
    [
        (Selector, OneStepInfluence(), "InfluenceEstimator"),
        (Selector, HashedRidgeRegressor(), "InfluenceRegressor"),
        (InfluenceEstimator, UniformSelector(), "Selector"),
        (InfluenceEstimator, HashedRidgeRegressor(), "InfluenceRegressor"),
        (InfluenceRegressor, UniformSelector(), "Selector"),
        (InfluenceRegressor, OneStepInfluence(), "InfluenceEstimator"),
    ],
)
def test_a_part_in_the_place_of_another_is_refused_and_named(kind, part, other):
    assert f"{type(part).__name__} is a {other}: is it the wrong argument?" in refused(part, kind)


MISSPELT = {
    Selector: {
        "eligable": "eligible",
        "prepared": "prepare",
        "warm_up": "warmup",
        "observe_token": "observe_tokens",
        "proposes": "propose",
        "observes": "observe",
        "observed": "observe",
        "observe_steps": "observe_step",
        "observe_step_token": "observe_step_tokens",
        "file_s": "files",
        "token_score": "token_scores",
        "checks": "check",
        "cost_before_train": "cost_before_training",
        "state_dicts": "state_dict",
        "load_statedict": "load_state_dict",
        "selects": "select",
        "overheard": "observe_step",
        "overhear": "observe_step",
        "check_pool": "check",
        "distinct_shares": "distinct_share",
        "contestant": "contestants",
        "observe_contests": "observe_contest",
    },
    InfluenceEstimator: {
        "fits": "fit",
        "scores": "score",
        "score_id": "score_ids",
        "score_token": "score_tokens",
        "checks": "check",
        "directions": "direction",
        "fits_ahead": "fit_ahead",
        "small_fits": "small_fit",
        "fited_state": "fitted_state",
        "load_fited_state": "load_fitted_state",
        "released": "release",
        "statedict": "state_dict",
        "load_statedict": "load_state_dict",
    },
    InfluenceRegressor: {
        "fits": "fit",
        "predicts": "predict",
        "fit_token": "fit_tokens",
        "predict_token": "predict_tokens",
        "checks": "check",
        "statedict": "state_dict",
        "load_statedict": "load_state_dict",
    },
}
CASES = [(kind, wrong, right) for kind, names in MISSPELT.items() for wrong, right in names.items()]


@pytest.mark.parametrize(("kind", "wrong", "right"), CASES, ids=lambda each: each if isinstance(each, str) else None)
def test_a_misspelt_method_is_refused_with_the_nearest_name(kind, wrong, right):
    message = refused(part_with(kind, **{wrong: lambda self, *arguments: None}), kind)
    assert message == (
        f"Mine.{wrong} is never used: {kind.__name__} has no {wrong}, the nearest name is {right}. "
        f"Rename it to {right}, or to _{wrong} if it is your own"
    )


@pytest.mark.parametrize("kind", LEAST)
def test_every_optional_method_is_among_those_that_were_misspelt(kind):
    methods = {name for name in public(kind) if inspect.isfunction(getattr(kind, name))}
    assert methods <= set(MISSPELT[kind].values())


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [
        (Selector, "needs_estimators", "needs_estimator"),
        (Selector, "use_groups", "uses_groups"),
        (Selector, "engine_order", "engine_orders"),
        (Selector, "measures", "needs_estimator"),
        (InfluenceEstimator, "fits_last", "fit_lasts"),
        (InfluenceEstimator, "fit_last", "fit_lasts"),
        (InfluenceEstimator, "spreadible", "spreadable"),
        (InfluenceEstimator, "once_a_round", "spreadable"),
        (InfluenceEstimator, "rehearse", "rehearsed"),
        (InfluenceEstimator, "has_directions", "has_direction"),
        (InfluenceRegressor, "rehearse", "rehearsed"),
    ],
)
def test_a_misspelt_flag_is_refused_with_the_nearest_name(kind, wrong, right):
    assert f"the nearest name is {right}." in refused(part_with(kind, **{wrong: True}), kind)


@pytest.mark.parametrize("inherited", [False, True])
def test_what_a_class_of_ones_own_inherits_is_looked_at_too(inherited):
    base = type("Base", (Chooser,), {"eligable": lambda self, pool, budget: None})
    part = (type("Mine", (base,), {}) if inherited else base)()
    assert refused(part, Selector).startswith("Base.eligable is never used")


def test_what_a_mixin_beside_the_grammar_overrides_is_looked_at_too():
    class Narrow:
        def eligible(self, pool):
            return None

    assert "cannot be called as eligible(pool, budget)" in refused(type("Mine", (Narrow, Chooser), {})(), Selector)


class Elsewhere:
    """A class that has nothing to do with selection, with names that are close to those of the grammar."""

    observed: bool = True
    needs_estimators = True

    def eligable(self):
        return 0

    def scores(self):
        return 0

    def state_dict(self):
        return {"elsewhere": 1}


def test_names_of_bases_from_elsewhere_are_not_taken_for_misspellings():
    for kind, least in LEAST.items():
        check_part(type("After", (least, Elsewhere), {})(), kind, ARGUMENTS[kind])
    again = {"eligable": lambda self: 1, "scores": lambda self: 1, "needs_estimators": False, "observed": False}
    check_part(type("Overrides", (Chooser, Elsewhere), again)(), Selector, "selector")
    part = type("Sets", (Chooser, Elsewhere), {})()
    part.observed = part.needs_estimators = False
    check_part(part, Selector, "selector")
    check_part(Plain(type("Inside", (Chooser, Elsewhere), again)()), Selector, "selector")


def test_what_comes_behind_the_grammar_is_not_used_and_what_comes_before_is():
    check_part(type("After", (Chooser, Elsewhere), {})(), Selector, "selector")
    before = type("Before", (Elsewhere, Chooser), {})()
    assert "Before has only one of state_dict and load_state_dict" in refused(before, Selector)


def test_misspellings_beside_bases_from_elsewhere_are_still_refused():
    mine = type("Mine", (Chooser, Elsewhere), {"proposes": lambda self: 0})()
    assert refused(mine, Selector).startswith("Mine.proposes is never used")
    assert refused(Plain(mine), Selector).startswith("Mine.proposes is never used")


def test_a_class_of_another_kind_is_refused_as_what_it_is():
    message = refused(OneStepInfluence, Selector)
    assert message == (
        "expected selector to be an object, got the class OneStepInfluence (OneStepInfluence is a InfluenceEstimator: "
        "is it the wrong argument?): pass OneStepInfluence(...)"
    )
    with pytest.raises(TypeError, match=r"expected a Selector inside Plain, .*: pass Chooser\(\.\.\.\)"):
        Plain(Chooser)


def test_an_estimator_that_says_it_has_a_direction_and_gives_none_is_refused():
    message = refused(part_with(InfluenceEstimator, has_direction=True), InfluenceEstimator)
    assert message == "Mine says has_direction: write direction() too, or leave has_direction out"


# ---- sources -----------------------------------------------------------------------------------------------------


def source_with(**members):
    """A source of random tokens with these members of its own."""
    source = random_source()
    source.__class__ = type("Mine", (FakeSource,), members)
    return source


def refused_source(source, error=TypeError):
    with pytest.raises(error) as caught:
        check_source(source, "source")
    with pytest.raises(error):
        SelectionRun(UniformSelector(), None, UniformSelector(), 0, source)
    return str(caught.value)


def test_a_source_may_have_names_of_its_own_and_yield():
    def reference(self):
        yield {}

    members = {"reference": reference, "tokenizers": 3, "tokenize": lambda self: 0, "before_batches": property(id)}
    check_source(source_with(**members), "source")
    check_source(random_source(), "source")


@pytest.mark.parametrize("source", [object(), [1, 2], Lookalike(), None])
def test_what_is_no_source_is_refused(source):
    assert refused_source(source) == (
        f"expected source to inherit from liveselect.grammar.CandidateSource, got an object of {type(source).__name__}"
    )


def test_a_part_and_a_class_in_the_place_of_a_source_are_named():
    assert "(Chooser is a Selector: is it the wrong argument?)" in refused_source(Chooser())
    assert (
        refused_source(FakeSource) == "expected source to be an object, got the class FakeSource: pass FakeSource(...)"
    )


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("candidate", "candidates"),
        ("references", "reference"),
        ("decodes", "decode"),
        ("follows", "follow"),
        ("check_models", "check_model"),
        ("cost_before_train", "cost_before_training"),
    ],
)
def test_a_misspelt_method_of_a_source_is_refused_with_the_nearest_name(wrong, right):
    message = refused_source(source_with(**{wrong: lambda self, *arguments: None}))
    assert message.startswith(
        f"Mine.{wrong} is never used: CandidateSource has no {wrong}, the nearest name is {right}."
    )


@pytest.mark.parametrize(("wrong", "right"), [("setup_second", "setup_seconds"), ("before_batches", "before_batch")])
def test_a_misspelt_value_of_a_source_is_refused_with_the_nearest_name(wrong, right):
    assert f"the nearest name is {right}." in refused_source(source_with(**{wrong: None}))


def test_a_source_whose_methods_take_other_arguments_is_refused():
    message = refused_source(source_with(follow=lambda self: None))
    assert "cannot be called as follow(plan)" in message
    assert "expected Mine.decode to be a method" in refused_source(source_with(decode=3))


def test_a_source_without_pool_or_batch_size_is_refused():
    source = random_source()
    source.pools = source.__dict__.pop("pool")
    assert refused_source(source) == (
        "expected FakeSource to have pool (the candidates, a CandidatePool), got None: rename pools to pool"
    )
    source = random_source()
    source.batch_size = True
    assert "to have batch_size (rows in the training batch of one rank), got True" in refused_source(source)
    source.batch_size = 0
    assert "batch_size of at least 1, got 0" in refused_source(source, ValueError)


@pytest.mark.parametrize(
    ("kind", "method", "call"),
    [
        (InfluenceEstimator, lambda self, context: {}, "fit(model, round)"),  # liveselect 0.1
        (InfluenceEstimator, lambda self: {}, "fit(model, round)"),
        (InfluenceEstimator, lambda self, context, batch, step: {}, "score(model, batch)"),
        (InfluenceEstimator, lambda self, context, ids: {}, "score_ids(model, round, ids)"),  # liveselect 0.1
        (InfluenceEstimator, lambda self, context: None, "check(model, round)"),  # liveselect 0.1
        (InfluenceEstimator, lambda self, when: None, "release()"),
        (InfluenceRegressor, lambda self, context, influence: {}, "fit(round, ids, influence)"),
        (InfluenceRegressor, lambda self, batch: {}, "predict(round, batch)"),
        (Selector, lambda self, budget: None, "select(round, budget)"),
        (Selector, lambda self: None, "propose(round)"),
        (Selector, lambda self, ids: None, "observe(ids, influence)"),
        (Selector, lambda self, pool: None, "eligible(pool, budget)"),
        (Selector, lambda self, context: None, "check(round, budget)"),  # liveselect 0.1
        (Selector, lambda self, *, ids, influence: None, "observe_step(ids, influence)"),
    ],
)
def test_a_method_that_takes_other_arguments_is_refused(kind, method, call):
    name = call.split("(")[0]
    message = refused(part_with(kind, **{name: method}), kind)
    assert message.startswith(f"Mine.{name}(")
    assert f"cannot be called as {call}: " in message
    assert message.endswith(f"{kind.__name__}.{name} says what it is given")


def test_a_value_in_the_place_of_a_method_is_refused_and_a_method_in_the_place_of_a_flag():
    assert refused(part_with(Selector, eligible=torch.ones(3)), Selector) == (
        "expected Mine.eligible to be a method, as Selector.eligible is, got Tensor"
    )
    message = refused(part_with(InfluenceEstimator, fit_lasts=lambda self: False), InfluenceEstimator)
    assert message.startswith("expected Mine.fit_lasts to be True or False, as InfluenceEstimator.fit_lasts is, got <")
    check_part(part_with(InfluenceEstimator, fit_lasts=property(lambda self: False)), InfluenceEstimator, "estimator")


# ---- selectors around others -------------------------------------------------------------------------------------


class Recording(Selector):
    """Records what it was called with, and answers with something of its own."""

    needs_estimator = True
    uses_groups = True
    learns_tokens = True
    engine_orders = False
    has_share = True
    has_contests = True

    def __init__(self):
        self.calls = []
        self.answers = {}

    def answer(self, name, *arguments):
        self.calls.append((name, arguments))
        return self.answers.setdefault(name, object())


METHODS = {name for name in public(Selector) if inspect.isfunction(getattr(Selector, name))}
FLAGS = public(Selector) - METHODS
for name in METHODS:
    setattr(Recording, name, lambda self, *arguments, name=name: self.answer(name, *arguments))
Recording.__abstractmethods__ = frozenset()


class Plain(Around):
    """Changes nothing."""


def test_a_selector_around_another_delegates_everything():
    inner = Recording()
    outer = Plain(inner)
    for name in sorted(FLAGS):
        assert name in vars(outer)
        assert getattr(outer, name) is getattr(inner, name) is not getattr(Selector, name)
    for name in sorted(METHODS):
        assert name in vars(Around)
        inner.calls.clear()
        if name in ("state_dict", "load_state_dict"):
            continue
        arguments = [object() for _ in list(inspect.signature(getattr(Selector, name)).parameters)[1:]]
        answer = getattr(outer, name)(*arguments)
        assert inner.calls == [(name, tuple(arguments))]
        if inspect.signature(getattr(Selector, name)).return_annotation not in (None, "None"):
            assert answer is inner.answers[name]


class Counts(Selector):
    """Remembers a number."""

    n = 0

    def select(self, round, budget):
        self.n += 1
        return round.candidates[:budget]

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


def test_the_state_of_a_selector_around_another_names_what_is_inside():
    saved, restored = Plain(Counts()), Plain(Counts())
    saved.selector.n = 3
    restored.load_state_dict(saved.state_dict())
    assert restored.selector.n == 3
    with pytest.raises(ValueError, match="the state of Counts inside Plain, this run has UniformSelector there"):
        Plain(UniformSelector()).load_state_dict(saved.state_dict())


def test_what_a_selector_around_another_declares_holds_beside_what_the_inner_one_declares():
    class Measures(Around):
        needs_estimator = uses_groups = True
        engine_orders = False

        def propose(self, round):
            return round.candidates[:3]

    outer = Measures(UniformSelector())
    assert (outer.needs_estimator, outer.uses_groups, outer.engine_orders) == (True, True, False)
    with pytest.raises(ValueError, match="there is no estimator"):
        DataSelection(outer)


def test_what_is_inside_a_selector_around_another_is_checked():
    for wrong in (object(), UniformSelector, None):
        with pytest.raises(TypeError, match="expected a Selector inside Plain"):
            Plain(wrong)

    class Misspelt(UniformSelector):
        def eligable(self, pool, budget): ...

    with pytest.raises(TypeError, match="eligable is never used"):
        DataSelection(Plain(Misspelt()))

    class Forgetful(Around):
        def __init__(self):
            pass

    with pytest.raises(TypeError, match="the selector inside Forgetful"):
        DataSelection(Forgetful())


def test_a_part_that_a_checkpoint_would_hold_in_half_is_refused():
    class Half(UniformSelector):
        def state_dict(self):
            return {"n": 1}

    with pytest.raises(TypeError, match="Half has only one of state_dict and load_state_dict"):
        DataSelection(Half())

    class Lasts(InfluenceEstimator):
        fit_lasts = True

        def score(self, model, batch): ...

    with pytest.raises(TypeError, match="says fit_lasts, but its fit is in no checkpoint"):
        DataSelection(UniformSelector(), Lasts())


@pytest.mark.parametrize(
    "value", [deque([1]), Path("x"), torch.Generator(), {"deep": [set()]}], ids=["deque", "path", "generator", "set"]
)
def test_state_that_no_checkpoint_can_restore_is_refused_with_its_place(value):
    class Keeps(Counts):
        def state_dict(self):
            return {"kept": value}

    with pytest.raises(TypeError, match=r"Keeps.state_dict\(\)\['kept'\].* which no checkpoint can restore"):
        save_part(Keeps())


def test_arguments_in_another_order_and_results_that_come_later_are_refused():
    class Swapped(Selector):
        def select(self, budget, round): ...

    class Later(Selector):
        async def select(self, round, budget): ...

    class Yields(Selector):
        def select(self, round, budget):
            yield round

    with pytest.raises(TypeError, match=r"in this order, got \(budget, round\)"):
        DataSelection(Swapped())
    for part in (Later(), Yields()):
        with pytest.raises(TypeError, match="generator or a coroutine"):
            DataSelection(part)


def test_a_misspelt_flag_of_the_object_itself_is_refused():
    part = UniformSelector()
    part.needs_estimators = True
    with pytest.raises(TypeError, match="needs_estimators is never used"):
        DataSelection(part)


@pytest.mark.filterwarnings("ignore::liveselect.grammar.SelectionWarning")
def test_a_prior_delegates_what_it_does_not_change():
    source = random_source(9)

    class Inner(Recording):
        def eligible(self, pool, budget):
            self.calls.append(("eligible", (pool, budget)))
            return torch.arange(9) < 6

    inner = Inner()
    prior = PriorSelector(inner, torch.arange(9.0))
    pool: CandidatePool = source.pool
    assert prior.eligible(pool, 2).tolist() == 6 * [True] + 3 * [False]
    ids, found = torch.arange(3), torch.ones(3)
    prior.observe(ids, found)
    prior.observe_step(ids, found)
    assert [name for name, _ in inner.calls] == ["eligible", "observe", "observe_step"]
    assert (prior.needs_estimator, prior.uses_groups, prior.engine_orders) == (True, True, False)


@pytest.mark.parametrize("wrap", [lambda each: each, lambda each: PriorSelector(each, np.zeros(10)), Plain])
def test_a_selector_that_measures_is_refused_without_an_estimator_whatever_is_around_it(wrap):
    with pytest.raises(ValueError, match=r"proposes candidates to measure, but there is no estimator: pass one"):
        DataSelection(wrap(regression()))
    DataSelection(wrap(regression()), OneStepInfluence())
    DataSelection(wrap(UniformSelector()))


def test_wherever_parts_are_passed_in_they_are_checked():
    with pytest.raises(TypeError, match=r"selector to inherit from liveselect.grammar.Selector, got an object of"):
        DataSelection(object())
    with pytest.raises(TypeError, match=r"estimator to inherit from liveselect.grammar.InfluenceEstimator, got an"):
        DataSelection(regression(), estimator=object())
    with pytest.raises(TypeError, match="UniformSelector is a Selector: is it the wrong argument"):
        DataSelection(UniformSelector(), UniformSelector())
    with pytest.raises(TypeError, match="expected selector to inherit"):
        PriorSelector(object(), np.zeros(3))
    with pytest.raises(TypeError, match=r"expected regressor to inherit .* \(UniformSelector is a Selector"):
        RegressionSelector(UniformSelector())
