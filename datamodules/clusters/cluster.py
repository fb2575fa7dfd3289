"""Clusters of a pool: made from its blocks, kept beside it, opened as the groups of its candidates.

``POOL/clusters/`` holds ``clusters.json`` (settings, names, sizes, the pool's fingerprint, seconds and FLOPs that it
took, and size and hashes of the other files),
``assignment.npy`` (rows,) int32, ``offsets.npy`` (rows,) float32 distances to the own centroid, ``centroids.npy``
(K, D), ``near.npz`` the cosine distances of near centroids as a sparse matrix, ``typical.npy`` (K, 8) the ids nearest
to each centroid, and ``vectors.npy`` (rows, D) float16, from which other clusterings are made without a new embedding.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from liveselect import distributed
from liveselect.cost import Cost, CostMeter, added
from liveselect.datamodules.clusters.embedding import Embedder, make_embedder
from liveselect.datamodules.clusters.kmeans import (
    Engine,
    check_fit,
    fit_centroids,
    kmeans_flops,
    near_pairs,
    nearest,
    unit,
)
from liveselect.datamodules.clusters.naming import cluster_names
from liveselect.datamodules.pools.display import PrepareDisplay
from liveselect.datamodules.pools.integrity import entry_of
from liveselect.datamodules.pools.pool_files import PARTIAL, sync_file, sync_folder, write_durably
from liveselect.datamodules.pools.tokenizers import load_tokenizer
from liveselect.datamodules.pools.tokens import TokenStore
from liveselect.datamodules.rows.groups import FORMAT, MANIFEST, VERSION, Clusters
from liveselect.seeding import derive_seed

PROGRESS = "progress"
TYPICAL_IDS = 8  # of each cluster: enough to name it and to show what it holds
ROWS_PER_CHUNK = 4096  # rows embedded or assigned at once

Decode = Callable[[torch.Tensor], list[str]]
Settings = dict[str, object]


@dataclass(frozen=True)
class Clustering:
    """How a pool is clustered.

    Attributes:
        clusters: K, how many clusters to look for; empty ones are dropped.
        embed: ``hashed``, ``encoder:NAME``, ``static:NAME`` or ``vectors:FILE.npy``.
        dimensions: D of the hashed embedding.
        reach: cosine distance up to which clusters are listed as near each other.
        epochs: passes of k-means over all rows.
        engine: ``sklearn`` or ``faiss``.
        seed: seed of all random draws.
    """

    clusters: int
    embed: str = "hashed"
    dimensions: int = 128
    reach: float = 0.2
    epochs: int = 2
    engine: Engine = "sklearn"
    seed: int = 0


def cluster_pool(
    pool: str | Path | TokenStore,
    clustering: Clustering,
    *,
    name: str = "clusters",
    overwrite: bool = False,
    quiet: bool = False,
    embedder: Embedder | None = None,
) -> Clusters:
    """Cluster the blocks of a pool and keep the result beside it; return clusters made with the same settings before.

    Everything is streamed: memory is bounded by a sample, the centroids and a few bytes a row. An interrupted call
    continues to embed where it stopped. Under ``torchrun`` every rank embeds its share of the rows.

    Args:
        pool: a finished pool.
        clustering: the settings.
        name: folder inside the pool.
        overwrite: replace clusters made with other settings.
        quiet: show nothing.
        embedder: used in place of the one that ``clustering.embed`` names.

    Raises:
        ValueError: the folder holds clusters made with other settings, or the settings do not fit the pool.
        ImportError: an optional library is missing.
    """
    store = pool if isinstance(pool, TokenStore) else TokenStore(pool)
    store.verify()
    _check(store, clustering, name)
    settings: Settings = {**vars(clustering), "pool": store.fingerprint}
    path = store.path / name
    if (path / MANIFEST).exists() and not overwrite:
        before = Clusters(store, name).manifest["settings"]
        differ = sorted(key for key in settings if before.get(key) != settings[key])
        if not differ:
            return Clusters(store, name)
        raise ValueError(
            f"{path} holds clusters made with other {', '.join(differ)}: pass --overwrite, or --name to keep both"
        )
    display = PrepareDisplay(quiet=quiet or distributed.rank() > 0)
    partial = path.with_name(path.name + PARTIAL)
    partial.mkdir(exist_ok=True)
    began = time.perf_counter()
    decode = _decoder(store)
    embedder = embedder or make_embedder(clustering.embed, store.rows, decode, clustering.dimensions, clustering.seed)
    before, spent = _embed(store, embedder, partial, clustering, display)
    of_kmeans = kmeans_flops(store.rows, clustering.clusters, embedder.dimensions, clustering.epochs, clustering.engine)
    cost: Cost = {"seconds": {"embed": before + time.perf_counter() - began}}
    cost["flops"] = {"embed": sum(spent["flops"].values()), "cluster": of_kmeans}
    cost["uncounted"] = {**dict.fromkeys(embedder.uncounted, 1.0), **spent["uncounted"]}
    if distributed.rank() == 0:
        _build(store, clustering, settings, partial, display, decode, cost)
        _put_in_place(partial, path)
    distributed.gather_objects("clustered")  # the other ranks wait
    return Clusters(store, name)


def _check(store: TokenStore, clustering: Clustering, name: str) -> None:
    """Raise errors that would otherwise come after the embedding; refuse to replace a folder of something else."""
    check_fit(store.rows, clustering.clusters, clustering.engine)
    if clustering.dimensions != Clustering.dimensions and ":" in clustering.embed:
        raise ValueError(
            f"dimensions={clustering.dimensions} has no effect on {clustering.embed}, which has its own: leave it out"
        )
    if clustering.epochs < 1:
        raise ValueError(f"expected at least one pass over the pool (epochs), got {clustering.epochs}")
    if not 0.0 <= clustering.reach <= 2.0:
        raise ValueError(f"expected a reach in 0..2, a cosine distance, got {clustering.reach}")
    path = store.path / name
    if Path(name).name != name or (path.exists() and not (path / MANIFEST).is_file()):
        raise ValueError(
            f"expected the name of a folder of clusters inside the pool, new or made before, got {name!r}: "
            + (f"{path} holds something else" if Path(name).name == name else "a name has no slashes")
        )


def default_clusters(rows: int) -> int:
    """Return a number of clusters for a pool: few enough that a run can pull each of them several times."""
    return max(2, min(1000, round((rows / 2) ** 0.5)))


# ---- embedding -----------------------------------------------------------------------------------------------------


def _embed(
    store: TokenStore, embedder: Embedder, folder: Path, clustering: Clustering, display: PrepareDisplay
) -> tuple[float, Cost]:
    """Write ``vectors.npy``, each rank its share, continuing an interrupted call.

    Returns the seconds of the interrupted call, and ``flops`` and ``uncounted`` of all ranks and both calls.
    """
    began, meter = time.perf_counter(), CostMeter()
    embedder.fit(_sample(store, embedder.sample_tokens, clustering.seed))
    file, shape = folder / "vectors.npy", (store.rows, embedder.dimensions)
    mine = distributed.shard(store.rows)
    progress = folder / f"{PROGRESS}-{distributed.rank()}-of-{distributed.world_size()}.json"
    wanted: Settings = {"pool": store.fingerprint, "embed": clustering.embed, "seed": clustering.seed}
    wanted |= {"dimensions": clustering.dimensions, "shape": list(shape)}
    is_there = _fits(file, shape)
    start, before, earlier = (_rows_done(progress, wanted) if is_there else None) or (mine.start, 0.0, {})
    distributed.gather_objects("looked")
    if distributed.rank() == 0 and not is_there:
        _reserve(file, shape)
    distributed.gather_objects("made")
    vectors = np.load(file, mmap_mode="r+")
    with display.phase(f"embedding {store.rows} blocks", _bytes(store, mine.stop - mine.start)):
        for first in range(start, mine.stop, ROWS_PER_CHUNK):
            ids = np.arange(first, min(first + ROWS_PER_CHUNK, mine.stop))
            with meter.forwards(*embedder.networks):
                found = embedder.embed(ids, store.read(torch.from_numpy(ids)))
            _check_finite(ids, found, clustering.embed)
            vectors[ids[0] : ids[-1] + 1] = unit(found)
            vectors.flush()
            stand = {**wanted, "done": int(ids[-1]) + 1, "seconds": before + time.perf_counter() - began}
            stand["cost"] = _networks_cost(earlier, meter)
            write_durably(progress, json.dumps(stand).encode())
            done = int(ids[-1]) + 1 - mine.start
            display.update(_bytes(store, done), done * store.block_size)
    total: Cost = {"flops": {}, "uncounted": {}}
    for of_rank in distributed.gather_objects(_networks_cost(earlier, meter)):
        total = added(total, of_rank)
    return before, total


def _networks_cost(earlier: Cost, meter: CostMeter) -> Cost:
    return added(earlier, {kind: spent for kind, spent in meter.spent().items() if kind != "seconds"})


def _reserve(file: Path, shape: tuple[int, int]) -> None:
    """Make the file of vectors with all its space on disk: a write to a map of a full disk would kill the process."""
    open_memmap(file, mode="w+", dtype=np.float16, shape=shape).flush()
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def _check_finite(ids: np.ndarray, vectors: np.ndarray, embed: str) -> None:
    (wrong,) = np.nonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"expected vectors of finite numbers, got NaN or infinity from {embed} for {len(wrong)} of the blocks "
            f"{ids[0]}..{ids[-1]}, block {ids[wrong[0]]} first: mend or replace these vectors, or take another "
            "embedding; the same command continues from there"
        )


def _rows_done(progress: Path, wanted: Settings) -> tuple[int, float, Cost] | None:
    """Return the row to continue with, and seconds and other cost of the interrupted call; None without one."""
    try:
        found = json.loads(progress.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    done, seconds, cost = found.pop("done", 0), found.pop("seconds", 0.0), found.pop("cost", {})
    return (done, seconds, cost) if found == wanted else None


def _fits(file: Path, shape: tuple[int, int]) -> bool:
    try:
        return np.load(file, mmap_mode="r").shape == shape
    except (FileNotFoundError, ValueError):
        return False


def _sample(store: TokenStore, tokens: int, seed: int) -> torch.Tensor:
    """Return random blocks of about ``tokens`` tokens in all; at least two of them where the pool has two."""
    rows = min(store.rows, max(2, tokens // store.block_size))
    draws = np.random.default_rng(derive_seed(seed, 0, "sample to fit an embedding on"))
    return store.read(torch.from_numpy(draws.choice(store.rows, rows, replace=False)))


def _bytes(store: TokenStore, rows: int) -> int:
    return rows * store.block_size * np.dtype(store.manifest["dtype"]).itemsize


def _decoder(store: TokenStore) -> Decode | None:
    if store.tokenizer_path is None:
        return None
    tokenizer = load_tokenizer(store.tokenizer_path)
    return lambda blocks: tokenizer.batch_decode(blocks.tolist(), skip_special_tokens=True)


# ---- clustering ----------------------------------------------------------------------------------------------------


def _build(
    store: TokenStore,
    clustering: Clustering,
    settings: Settings,
    folder: Path,
    display: PrepareDisplay,
    decode: Decode | None,
    cost: Cost,
) -> None:
    """Write all files but the vectors into ``folder``; the manifest gets the ``cost`` so far, and these seconds."""
    began = time.perf_counter()
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    seed = derive_seed(clustering.seed, 0, "k-means") % 2**32  # what scikit-learn accepts
    used = 0

    def advance(rows: int) -> None:
        nonlocal used
        used += rows
        display.update(_bytes(store, used), used * store.block_size)

    with display.phase(f"finding {clustering.clusters} clusters", _bytes(store, clustering.epochs * store.rows)):
        centroids = fit_centroids(vectors, clustering.clusters, seed, clustering.epochs, clustering.engine, advance)
    assignment, offsets = _assign(vectors, centroids)
    assignment, centroids, sizes = _largest_first(assignment, centroids)
    typical = _typical(assignment, offsets, len(centroids))
    from scipy.sparse import save_npz

    arrays = {"assignment": assignment, "offsets": offsets, "centroids": centroids, "typical": typical}
    for key, array in arrays.items():
        np.save(folder / f"{key}.npy", array)
    save_npz(folder / "near.npz", near_pairs(centroids, clustering.reach))
    for file in folder.glob("*.np?"):
        sync_file(file)
    names = cluster_names(typical, (lambda ids: decode(store.read(torch.from_numpy(ids)))) if decode else None)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "pool": store.fingerprint,
        "settings": settings,
        "sizes": sizes.tolist(),
        "names": names,
        "files": {file.name: entry_of(file) for file in sorted(folder.glob("*.np?"))},
        **cost,
        "seconds": {**cost["seconds"], "cluster": time.perf_counter() - began},
    }
    write_durably(folder / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1).encode())


def _assign(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest centroid of each row ``(rows,)`` int32 and the distance to it ``(rows,)`` float32."""
    assignment = np.empty(len(vectors), np.int32)
    offsets = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), ROWS_PER_CHUNK):
        part = slice(start, start + ROWS_PER_CHUNK)
        assignment[part], offsets[part] = nearest(np.asarray(vectors[part], dtype=np.float32), centroids)
    return assignment, offsets


def _largest_first(assignment: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return assignment, centroids and sizes with the largest cluster first and without empty ones."""
    sizes = np.bincount(assignment, minlength=len(centroids))
    order = np.argsort(-sizes, kind="stable")[: int((sizes > 0).sum())]
    code = np.zeros(len(centroids), np.int32)
    code[order] = np.arange(len(order))
    return code[assignment], centroids[order], sizes[order]


def _typical(assignment: np.ndarray, offsets: np.ndarray, clusters: int) -> np.ndarray:
    """Return the ids nearest to each centroid, nearest first, ``(K, 8)`` int64; the last repeats in small clusters."""
    order = np.lexsort((offsets, assignment))
    starts = np.searchsorted(assignment[order], np.arange(clusters))
    ends = np.append(starts[1:], len(order))
    places = np.minimum(starts[:, None] + np.arange(TYPICAL_IDS), ends[:, None] - 1)
    return order[places]


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename the finished folder, and remove clusters that it replaces."""
    for file in partial.glob(f"{PROGRESS}-*"):
        file.unlink()
    replaced = path.with_name(path.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.replace(replaced)
    partial.replace(path)
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)
