"""Tables: columns of different kinds as one vector of numbers, and back in the user's units.

A `Table` is described once, from data, and gives what a `Diffusion` needs: `event_shape`, `loc`,
`scale` and `last_step`; `encode` gives rows and mask, `decode` named columns.

    kind                         numbers of it                         measure
    Continuous()                 x                                     dx
    Positive()                   log x                                 dx, by the Jacobian
    Bounded(low, high)           log (x − low)/(high − x)              dx, by the Jacobian
    HeavyTailed(centre, width)   arsinh (x − centre)/width             dx, by the Jacobian
    Rounded(step, low, high)     x, on its grid                        counting
    Count(most)                  x, on 0, 1, …, most                   counting
    Ordered(values)              its place 0, 1, …, K − 1              counting
    Category(values)             0 or 1; one 0/1 number a class        counting
    Hurdle(rest, at)             0 at one value, else 1; the rest's    counting one value, dx
    Constant(value), Empty()     none

A continuous column may have a `step` to which it is rounded, too fine for a grid: with a key
`encode` adds uniform noise as wide, and `decode` rounds.
"""

from probdiff.tables.kinds import (
    Bounded,
    Category,
    Constant,
    Continuous,
    Count,
    Empty,
    HeavyTailed,
    Hurdle,
    Kind,
    Ordered,
    Positive,
    Rounded,
)
from probdiff.tables.reading import read_csv
from probdiff.tables.table import Rows, Table

__all__ = [
    "Bounded", "Category", "Constant", "Continuous", "Count", "Empty", "HeavyTailed", "Hurdle",
    "Kind", "Ordered", "Positive", "Rounded", "Rows", "Table", "read_csv",
]  # fmt: skip
