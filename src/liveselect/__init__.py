"""Live, model-aware data selection for language model pretraining in PyTorch Lightning.

Importing this package imports nothing heavy; take what you need from ``liveselect.callbacks``,
``liveselect.datamodules``, ``liveselect.influence``, ``liveselect.regressors`` and ``liveselect.selectors``.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("liveselect")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
