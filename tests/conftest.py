"""One thread in every process of the tests, no deadlines, and which worker runs what when there are several."""

import gc
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, and of this one, because torch is imported later
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder is looked up nowhere, and fails at once

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # models are tiny, and more threads would only wait for each other

ROOT = Path(__file__).parents[1]

settings.register_profile("any machine", deadline=None)  # how fast an example runs says more of the machine's load
settings.load_profile("any machine")


SHARING = {
    str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py") if 'scope="module"' in path.read_text()
}
"""Files whose tests share what takes long to make."""


def pytest_collection_modifyitems(items):
    """Begin with what takes longest."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a file that shares something on one worker, and give single ones to whichever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return file if file in SHARING else nodeid

    # not --dist loadgroup: xdist 3.8 names groups in an attribute that pytest 9.2 does not read
    return ByFile(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_finish(session):
    """Let what is imported by now stay: libraries collect garbage in every run, and would walk over all of it."""
    gc.collect()
    gc.freeze()
