"""Operators amid a module's code, where no hook reaches: at `F.relu(x)`, at sums, at every call.

The owner's class is swapped for a subclass whose `forward` is written anew from its source, with
every call of the wanted names routed through the operators that the owner holds:

    x = self.relu(self.bn1(x))    x = _meansparse_method("relu", walk, self, "relu", self.bn1(x))
    x += identity                 x = _meansparse_sum("add", walk, iadd, x, identity)
    x = self.helper(x)            x = _meansparse_bind(walk, the_helper_anew, self)(x)

The walk, made anew in each forward, counts how often the code has come to each name. Turn 1 of
`relu` asks the owner for its child `meansparse_in__relu_1` and, if there is one, gives it the input
first. Loops and helper methods need nothing of their own, threads share nothing, and the compiler
sees constants.

The subclass is found by its base and the names alone: `deepcopy` and `pickle` store those.

`classes` swaps classes, `writer` writes functions anew, `runtime` is what those call.
"""

from lightning_meansparse.rewrite.classes import base_of, check_call, route_
from lightning_meansparse.rewrite.runtime import (
    PREFIX,
    acts_in_place,
    call_of,
    child_of,
    clamps_in_place,
)

__all__ = [
    "PREFIX",
    "acts_in_place",
    "base_of",
    "call_of",
    "check_call",
    "child_of",
    "clamps_in_place",
    "route_",
]
