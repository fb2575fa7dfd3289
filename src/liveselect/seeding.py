"""Random generators derived from names, so that no draw depends on earlier ones."""

import hashlib

import torch


def derive_seed(seed: int, round_index: int, purpose: str) -> int:
    """Return a 63-bit seed for one purpose of one round.

    Equal inputs give equal seeds on every rank, platform and Python version; different purposes are independent.
    """
    digest = hashlib.blake2b(f"{seed}/{round_index}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(seed: int, round_index: int, purpose: str) -> torch.Generator:
    """Return a fresh CPU generator for one purpose of one round.

    A resumed run derives the same generator again, so no generator state needs to be saved.
    """
    return torch.Generator().manual_seed(derive_seed(seed, round_index, purpose))
