"""The data plane: pools on disk, and the datamodule that serves them.

Names are imported at their first use: the worker processes of ``liveselect prepare`` need a few modules of this package
and must not wait for Lightning.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liveselect.datamodules.loader import PlanLoader
    from liveselect.datamodules.pools.token_files import TokenFiles
    from liveselect.datamodules.pools.tokens import TokenStore, write_store
    from liveselect.datamodules.reference import ReferenceSet
    from liveselect.datamodules.selection import SelectionDataModule
    from liveselect.datamodules.settings import ServingSettings
    from liveselect.datamodules.wrapping import WrappingDataModule

_HOMES = {
    "PlanLoader": "loader",
    "ReferenceSet": "reference",
    "SelectionDataModule": "selection",
    "ServingSettings": "settings",
    "TokenFiles": "pools.token_files",
    "TokenStore": "pools.tokens",
    "WrappingDataModule": "wrapping",
    "write_store": "pools.tokens",
}

__all__ = [
    "PlanLoader",
    "ReferenceSet",
    "SelectionDataModule",
    "ServingSettings",
    "TokenFiles",
    "TokenStore",
    "WrappingDataModule",
    "write_store",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"liveselect.datamodules.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
