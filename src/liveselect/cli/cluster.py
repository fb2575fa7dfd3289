"""``liveselect cluster``: sort the blocks of a finished pool into clusters."""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from liveselect.cli.output import say

if TYPE_CHECKING:
    from liveselect.datamodules.clusters.cluster import Clusters

DESCRIPTION = """\
Sort the blocks of a finished pool into clusters of similar text, kept beside the pool. Training groups its candidates
by them with SelectionDataModule(groups="clusters"); Quad and UCBSelector pull them as the arms of a bandit.
An interrupted command continues when it is repeated; the same pool and options always give the same clusters.
"""

EXAMPLES = """\
embeddings
  hashed              n-grams of tokens, hashed, and their leading directions: no model, no download (the default)
  encoder:NAME        an encoder of sentence-transformers or Hugging Face, such as encoder:BAAI/bge-small-en-v1.5
  static:NAME         static word vectors of model2vec, such as static:minishlab/potion-base-8M
  vectors:FILE.npy    one vector for each block of the pool, (rows, D); POOL/clusters/vectors.npy is one

examples
  liveselect cluster pool --clusters 1000
  liveselect cluster pool --clusters 100 --embed vectors:pool/clusters/vectors.npy --name coarse
  torchrun --nproc-per-node 8 --no-python liveselect cluster pool --embed encoder:BAAI/bge-large-en-v1.5
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    result = argparse.ArgumentParser(
        prog="liveselect cluster",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("pool", type=Path, metavar="POOL", help="folder made by `liveselect prepare`")
    add("--clusters", type=int, metavar="K", help="number of clusters (default: grows as the square root of the pool)")
    add("--embed", default="hashed", metavar="E", help="how blocks become vectors; see below (default: %(default)s)")
    add("--dimensions", type=int, default=128, metavar="D", help="of the hashed embedding (default: %(default)s)")
    reach = "cosine distance up to which clusters are listed as neighbours (default: %(default)s)"
    add("--reach", type=float, default=0.2, metavar="H", help=reach)
    add("--epochs", type=int, default=2, metavar="N", help="passes of k-means over the pool (default: %(default)s)")
    add("--engine", choices=("sklearn", "faiss"), default="sklearn", help="library for k-means (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of all random draws (default: %(default)s)")
    add("--name", default="clusters", metavar="NAME", help="folder inside the pool (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace clusters that were made in another way")
    add("--quiet", action="store_true", help="show no progress")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    arguments = parser().parse_args(argv)
    try:
        with_ranks = _join_ranks()
        clusters = _cluster(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("\nliveselect cluster: interrupted; the same command continues from here\n")
        return 130
    if not arguments.quiet and (not with_ranks or os.environ["RANK"] == "0"):
        say(summary(clusters))
    return 0


def _cluster(arguments: argparse.Namespace) -> "Clusters":
    from liveselect.datamodules.clusters.cluster import Clustering, cluster_pool, default_clusters
    from liveselect.datamodules.pools.tokens import TokenStore

    store = TokenStore(arguments.pool)
    clustering = Clustering(
        clusters=default_clusters(store.rows) if arguments.clusters is None else arguments.clusters,
        embed=arguments.embed,
        dimensions=arguments.dimensions,
        reach=arguments.reach,
        epochs=arguments.epochs,
        engine=arguments.engine,
        seed=arguments.seed,
    )
    return cluster_pool(store, clustering, name=arguments.name, overwrite=arguments.overwrite, quiet=arguments.quiet)


def _join_ranks() -> bool:
    """Join the other processes if torchrun started this one; return whether it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return False
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=7))  # the others wait while one rank clusters
    return True


def summary(clusters: "Clusters") -> str:
    """Return the number, sizes and names of the clusters as text."""
    sizes = clusters.manifest["sizes"]
    lines = [
        f"{clusters.path}",
        f"  {len(clusters)} clusters of {sum(sizes)} blocks: {sizes[0]} in the largest, {sizes[len(sizes) // 2]} in "
        f"the median, {sizes[-1]} in the smallest",
    ]
    shown = list(zip(clusters.names, sizes, strict=True))
    lines += [f"  {size:>8}  {name}" for name, size in shown[:8]]
    lines += [f"  ... {len(shown) - 8} more"] if len(shown) > 8 else []
    return "\n".join(lines)
