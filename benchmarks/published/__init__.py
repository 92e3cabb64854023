"""Networks in the idioms of published code, each for the release that it was written for; own-written."""

from __future__ import annotations

from . import (
    dense,
    detection,
    frameworks,
    metaformers,
    neurons_of_releases,
    own_neurons,
    qkformer,
    resnets,
    reversible,
    sequences,
    snntorch_loops,
    transformers,
)
from .family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for room in (
        resnets, transformers, qkformer, metaformers, own_neurons, neurons_of_releases, dense, detection,
        sequences, snntorch_loops, reversible, frameworks,
    )
    for family in room.FAMILIES
}  # fmt: skip

__all__ = ["FAMILIES", "Family"]
