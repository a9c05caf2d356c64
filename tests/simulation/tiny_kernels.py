"""Two small libraries of kernels, to see how libraries are compiled, kept and loaded."""

import numpy as np
import numpy.typing as npt

from kavier_twin.simulation.compiler.kernel import entry, kernel, linked
from kavier_twin.simulation.compiler.libraries import Library

FIRST = Library("first", __name__)
SECOND = Library("second", __name__, on_demand=True)


@kernel
def _twice(number):
    return 2 * number


@linked(SECOND)
def half(number: int) -> int:
    return number // 2


@entry(FIRST)
def double(numbers: npt.NDArray[np.int64]) -> int:
    """Double all in place. Returns their sum."""
    total = 0
    for at in range(numbers.size):
        numbers[at] = _twice(numbers[at])
        total += numbers[at]
    return total


@entry(FIRST)
def halve(number: int) -> int:
    """Half of it, which the second library knows."""
    return half(number)
