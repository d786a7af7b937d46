"""Random sources that are functions of what they are for, so that a resumed or distributed run draws the same."""

from __future__ import annotations

import hashlib

import torch


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by its parts (run seed, purpose, step): the same parts give the same draws anywhere."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
