"""What a plan is made of: precisions, inventory, policy, budget. Nothing here knows torch."""

from optimizer.plan.choices import Choices
from optimizer.plan.container import container_bytes
from optimizer.plan.inventory import Inventory, Layer, Other, Place, glob
from optimizer.plan.palette import Palette
from optimizer.plan.plan import (
    Budget,
    Plan,
    assemble,
    digest,
    identity,
    parse_size,
    plane_bytes,
    stored_bytes,
)
from optimizer.plan.policy import Policy, Rule, allowed
from optimizer.plan.precision import (
    BY_ROW,
    FLOATS,
    GGML,
    REFERENCE_BITS,
    TRITS_PER_BYTE,
    UNTOUCHED,
    WIDTH,
    Precision,
    packed_bytes,
)
from optimizer.plan.refinement import Pair, Refinement

__all__ = [
    "BY_ROW",
    "FLOATS",
    "GGML",
    "REFERENCE_BITS",
    "TRITS_PER_BYTE",
    "UNTOUCHED",
    "WIDTH",
    "Budget",
    "Choices",
    "Inventory",
    "Layer",
    "Other",
    "Pair",
    "Palette",
    "Place",
    "Plan",
    "Policy",
    "Precision",
    "Refinement",
    "Rule",
    "allowed",
    "assemble",
    "container_bytes",
    "digest",
    "glob",
    "identity",
    "packed_bytes",
    "parse_size",
    "plane_bytes",
    "stored_bytes",
]
