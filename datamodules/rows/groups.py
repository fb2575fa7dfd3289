"""The groups of a pool's rows: its sources, a column of the dataset, or the clusters kept beside it."""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from liveselect.cost import Cost
from liveselect.datamodules.pools.integrity import check_content
from liveselect.datamodules.pools.pool_files import JsonObject
from liveselect.datamodules.pools.token_files import TokenFiles
from liveselect.datamodules.pools.tokens import TokenStore
from liveselect.datamodules.rows import hugging_face
from liveselect.datamodules.rows.content import CHUNK_ROWS
from liveselect.datamodules.rows.draws import MapStyle, candidate_seeds, fetch, private_draws
from liveselect.datamodules.rows.rows import Rows
from liveselect.pool import CandidatePool, GroupGeometry, Grouping

FORMAT, VERSION = "liveselect-clusters", 1
MANIFEST = "clusters.json"
GROUP_FILES = ("assignment.npy", "offsets.npy", "typical.npy", "near.npz")  # what a run uses of them
REMEDY = "cluster the pool again (--overwrite)"


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
        self.path, self._store = store.path / name, store
        if not (self.path / MANIFEST).is_file():
            raise FileNotFoundError(
                f"expected the clusters of the pool at {self.path}, found none: run `liveselect cluster {store.path}"
                + ("`" if name == "clusters" else f" --name {name}`")
                + ", or leave groups out to group by source"
            )
        self.manifest = _read_manifest(self.path / MANIFEST)
        if self.manifest["pool"] != store.fingerprint:
            raise ValueError(
                f"the clusters {self.path} were made from the pool {self.manifest['pool']}, and this is "
                f"{store.fingerprint}: {REMEDY}"
            )
        self.names: tuple[str, ...] = tuple(self.manifest["names"])
        self._shapes = {
            "assignment": ("i", 1, store.rows),
            "offsets": ("f", 1, store.rows),
            "vectors": ("f", 2, store.rows),
            "centroids": ("f", 2, len(self.names)),
            "typical": ("i", 2, len(self.names)),
        }

    @property
    def cost(self) -> Cost:
        """What making them took, by kind and phase; empty where it was not recorded."""
        return {kind: dict(self.manifest[kind]) for kind in ("seconds", "flops", "uncounted") if kind in self.manifest}

    def __len__(self) -> int:
        return len(self.names)

    def read(self, name: str) -> np.ndarray:
        """Return one of the arrays, by its file name without the ending; raise ValueError for a damaged file."""
        path = self.path / f"{name}.npy"
        kind, dimensions, length = self._shapes[name]
        with _naming(path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.dtype.kind != kind or array.ndim != dimensions or len(array) != length:
                raise ValueError(f"it holds {array.dtype} of shape {array.shape}")
            return array

    def geometry(self) -> GroupGeometry:
        """Return the pairs of near clusters, and how typical each candidate is of its own cluster."""
        from scipy.sparse import load_npz

        with _naming(self.path / "near.npz"):
            near = load_npz(self.path / "near.npz")
            if near.shape != (len(self), len(self)):
                raise ValueError(f"it holds a matrix of shape {near.shape}")
        typical = np.array(self.read("typical")[:, 0])
        with _naming(self.path / "typical.npy"):
            if typical.min() < 0 or typical.max() >= self._shapes["assignment"][2]:
                raise ValueError("it names candidates that are not in the pool")
        return GroupGeometry(
            starts=torch.from_numpy(near.indptr.astype(np.int64)),
            columns=torch.from_numpy(near.indices.astype(np.int64)),
            distances=torch.from_numpy(near.data.astype(np.float32)),
            typical=torch.from_numpy(typical),
            offsets=torch.from_numpy(np.array(self.read("offsets"))),
            reach=self.manifest["settings"]["reach"],
        )

    def pool(self, fingerprint: str) -> CandidatePool:
        """Return the candidates of the pool, with the clusters as their groups, and the sources beside them.

        Raises:
            ValueError: a file does not hold what was written, or what clusters of the pool can be.
        """
        listed = {name: entry for name, entry in self.manifest.get("files", {}).items() if name in GROUP_FILES}
        check_content(self.path, listed, REMEDY)
        groups = np.array(self.read("assignment"))
        with _naming(self.path / "assignment.npy"):  # of clusters that were made before hashes were kept, too
            if groups.min() < 0 or groups.max() >= len(self):
                raise ValueError(f"it names clusters beyond the {len(self)} that there are")
            if np.bincount(groups, minlength=len(self)).tolist() != self.manifest["sizes"]:
                raise ValueError(f"the sizes of its clusters are not those in {MANIFEST}")
        geometry = self.geometry()
        digest = hashlib.blake2b(json.dumps([self.names, geometry.reach]).encode(), digest_size=16)
        for array in (groups, *(value.numpy() for value in vars(geometry).values() if isinstance(value, Tensor))):
            digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        codes = torch.from_numpy(groups)
        store = self._store
        return CandidatePool(
            len(groups),
            fingerprint,
            codes,
            self.names,
            geometry,
            digest.hexdigest(),
            lambda: Grouping(store.groups, store.group_names),
            store.documents_of_rows,
        )


def _read_manifest(file: Path) -> JsonObject:
    with _naming(file):
        manifest: JsonObject = json.loads(file.read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError("it holds no JSON object")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ValueError(f"{file.parent} does not hold clusters of this version: cluster the pool again")
    with _naming(file):
        names, sizes = list(manifest["names"]), [int(size) for size in manifest["sizes"]]
        float(manifest["settings"]["reach"])
        if not names or len(names) != len(sizes) or not isinstance(manifest["pool"], str):
            raise ValueError(f"it has {len(names)} names for {len(sizes)} clusters")
    return manifest


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in the error of one that is damaged."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): {REMEDY}") from error


def check_if_listed(file: Path) -> None:
    """Raise ValueError when a file lies beside clusters whose manifest says that it holds something else."""
    manifest = file.parent / MANIFEST
    listed = _read_manifest(manifest).get("files", {}) if manifest.is_file() else {}
    check_content(file.parent, {name: entry for name, entry in listed.items() if name == file.name}, REMEDY)


def open_pool(rows: Rows, groups: str | None) -> CandidatePool:
    """Return the candidates of ``rows``, grouped by a column of their dataset, or by clusters or sources of a pool.

    A column of a dataset is part of the fingerprint: the state of a bandit, for example, is wrong for other groups.
    """
    if rows.store is not None:
        names = rows.store.group_names
        if groups is not None:
            return Clusters(rows.store, groups).pool(rows.fingerprint)
        codes = rows.store.groups if len(names) > 1 else None
        return CandidatePool(len(rows), rows.fingerprint, codes, names, documents_of=rows.store.documents_of_rows)
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
    """Return what making the groups took, by kind and phase, where they are clusters of a pool; else nothing."""
    return Clusters(rows.store, groups).cost if rows.store is not None and groups is not None else {}


def _column(dataset: MapStyle, name: str) -> Sequence[object]:
    """Return one value per row of a dataset."""
    if isinstance(dataset, TokenFiles):
        if name != "file":
            raise ValueError(f"groups={name!r} is nothing that token files have: pass groups='file', or leave it out")
        return dataset.file_names()
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
