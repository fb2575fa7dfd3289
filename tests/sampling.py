"""Sweeps of which the default run makes a sample: what is shared is made for the tests that run, and for no others."""

from collections.abc import Collection, Sequence

import pytest


def mostly_slow(cases: Sequence, sample: Collection) -> list:
    """Return parameters of which only those in ``sample`` are in the default run."""
    if unknown := set(sample) - set(cases):
        raise ValueError(f"expected the sample among the cases, got {sorted(map(str, unknown))}")
    marked = []
    for values in cases:
        several = values if isinstance(values, tuple) else (values,)
        marked.append(pytest.param(*several, marks=() if values in sample else pytest.mark.slow))
    return marked


def chosen(request: pytest.FixtureRequest, test: str, *names: str) -> set[tuple]:
    """Return the parameters with which a test of the requesting module will run, in the order of ``names``."""
    return {
        tuple(item.callspec.params[name] for name in names)
        for item in request.session.items
        if item.path == request.path and item.originalname == test
    }
