"""Cases for the axis rules of conversion: one for every op that has a rule, and traps in which a rule could be wrong."""

from . import elementwise, lookups, products, shapes
from .case import Case, Sizes, part, sliced

CASES = {**elementwise.CASES, **products.CASES, **shapes.CASES, **lookups.CASES}
assert len(CASES) == sum(len(family.CASES) for family in (elementwise, products, shapes, lookups))

__all__ = ["CASES", "Case", "Sizes", "part", "sliced"]
