"""The groups of a pool's rows: its sources, a column of the dataset, or the clusters kept beside it."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from liveselect.datamodules.pools.pool_files import JsonObject
from liveselect.datamodules.pools.tokens import TokenStore
from liveselect.datamodules.rows import hugging_face
from liveselect.datamodules.rows.content import CHUNK_ROWS
from liveselect.datamodules.rows.draws import MapStyle, candidate_seeds, fetch, private_draws
from liveselect.datamodules.rows.rows import Rows
from liveselect.pool import CandidatePool, GroupGeometry

FORMAT, VERSION = "liveselect-clusters", 1
MANIFEST = "clusters.json"


class Clusters:
    """The clusters of a pool, opened for reading.

    Args:
        store: the pool.
        name: folder inside the pool.

    Raises:
        FileNotFoundError: the pool was not clustered.
        ValueError: the clusters were made from other content.
    """

    def __init__(self, store: TokenStore, name: str = "clusters") -> None:
        self.path = store.path / name
        if not (self.path / MANIFEST).is_file():
            raise FileNotFoundError(
                f"expected the clusters of the pool at {self.path}, found none: run `liveselect cluster {store.path}"
                + ("`" if name == "clusters" else f" --name {name}`")
                + ", or leave groups out to group by source"
            )
        self.manifest: JsonObject = json.loads((self.path / MANIFEST).read_bytes())
        if self.manifest.get("format") != FORMAT or self.manifest.get("version") != VERSION:
            raise ValueError(f"{self.path} does not hold clusters of this version: cluster the pool again")
        if self.manifest["pool"] != store.fingerprint:
            raise ValueError(
                f"the clusters {self.path} were made from the pool {self.manifest['pool']}, and this is "
                f"{store.fingerprint}: cluster it again (--overwrite)"
            )
        self.names: tuple[str, ...] = tuple(self.manifest["names"])

    @property
    def cost(self) -> dict[str, dict[str, float]]:
        """The ``seconds`` by phase that making them took; empty where they were not recorded."""
        found: dict[str, float] = self.manifest.get("seconds", {})
        return {"seconds": dict(found)} if found else {}

    def __len__(self) -> int:
        return len(self.names)

    def read(self, name: str) -> np.ndarray:
        """Return one of the arrays, by its file name without the ending."""
        return np.load(self.path / f"{name}.npy", mmap_mode="r")

    def geometry(self) -> GroupGeometry:
        """Return the pairs of near clusters, and how typical each candidate is of its own cluster."""
        from scipy.sparse import load_npz

        near = load_npz(self.path / "near.npz")
        return GroupGeometry(
            starts=torch.from_numpy(near.indptr.astype(np.int64)),
            columns=torch.from_numpy(near.indices.astype(np.int64)),
            distances=torch.from_numpy(near.data.astype(np.float32)),
            typical=torch.from_numpy(np.array(self.read("typical")[:, 0])),
            offsets=torch.from_numpy(np.array(self.read("offsets"))),
            reach=self.manifest["settings"]["reach"],
        )

    def pool(self, fingerprint: str) -> CandidatePool:
        """Return the candidates of the pool, with the clusters as their groups."""
        groups = torch.from_numpy(np.array(self.read("assignment")))
        return CandidatePool(len(groups), fingerprint, groups, self.names, self.geometry())


def open_pool(rows: Rows, groups: str | None) -> CandidatePool:
    """Return the candidates of ``rows``, grouped by a column of their dataset, or by clusters or sources of a pool.

    A column of a dataset is part of the fingerprint: the state of a bandit, for example, is wrong for other groups.
    """
    if rows.store is not None:
        if groups is not None:
            return Clusters(rows.store, groups).pool(rows.fingerprint)
        names = rows.store.group_names
        codes = rows.store.groups if len(names) > 1 else None
        return CandidatePool(len(rows), rows.fingerprint, codes, names)
    if groups is None:
        return CandidatePool(len(rows), rows.fingerprint)
    values = np.asarray([str(value) for value in _column(rows.source, groups)])
    found, inverse = np.unique(values, return_inverse=True)
    groups_of = inverse.astype("<i4")
    digest = hashlib.blake2b(repr((rows.fingerprint, found.tolist())).encode(), digest_size=16)
    digest.update(groups_of.tobytes())
    codes = torch.from_numpy(groups_of.astype(np.int32))
    return CandidatePool(len(rows), digest.hexdigest(), codes, found.tolist())


def cost_of_groups(rows: Rows, groups: str | None) -> Mapping[str, Mapping[str, float]]:
    """Return the ``seconds`` by phase that making the groups took, where they are clusters of a pool; else nothing."""
    return Clusters(rows.store, groups).cost if rows.store is not None and groups is not None else {}


def _column(dataset: MapStyle, name: str) -> Sequence[object]:
    """Return one value per row of a dataset."""
    if (column := hugging_face.column(dataset, name)) is not None:
        return column
    values: list[object] = []
    for start in range(0, len(dataset), CHUNK_ROWS):
        ids = range(start, min(start + CHUNK_ROWS, len(dataset)))
        with private_draws() as seed:
            rows = fetch(dataset, ids, candidate_seeds(ids), seed)
        for row in rows:
            if not isinstance(row, Mapping) or name not in row:
                columns = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
                raise ValueError(f"groups={name!r} is no column of the dataset; its rows have {columns}")
            value = row[name]
            values.append(value.item() if isinstance(value, (Tensor, np.generic)) and value.ndim == 0 else value)
    return values
