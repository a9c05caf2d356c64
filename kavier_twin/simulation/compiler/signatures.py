"""The types with which a kernel is compiled, read from the annotations of its parameters.

`int`, `float` and `bool` are 64-bit integers, doubles and booleans. An array is `NDArray` of its scalar type and has
one axis, unless `Annotated` names the axes; a record or an array of records is `Annotated` with the record's dtype. All
arrays are C-contiguous and writable. A named tuple is that of its fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
from numba.core import types
from numba.core.typing import Signature
from numba.np.numpy_support import from_dtype

from kavier_twin.simulation.compiler.reference import Reference

_PLAIN: dict[Any, types.Type] = {
    int: types.int64,
    float: types.float64,
    bool: types.boolean,
    np.uint64: types.uint64,
    type(None): types.none,
}


def signature_of(function: Callable[..., Any], *, by_reference: bool) -> Signature:
    """The signature that the function's annotations say. Named tuples are passed as references or by value."""
    hints = get_type_hints(function, include_extras=True)
    returned = _type_of(hints.pop("return"), by_reference=by_reference)
    return returned(*(_type_of(hint, by_reference=by_reference) for hint in hints.values()))


def named_tuples_of(function: Callable[..., Any]) -> list[type]:
    """The classes of named tuples in the function's parameters."""
    return [hint for hint in get_type_hints(function).values() if hasattr(hint, "_fields")]


def _type_of(hint: Any, *, by_reference: bool) -> types.Type:
    if hint in _PLAIN:
        return _PLAIN[hint]
    if hasattr(hint, "_fields"):
        fields = get_type_hints(hint, include_extras=True)
        target = types.NamedTuple([_type_of(fields[name], by_reference=False) for name in hint._fields], hint)
        return Reference(target) if by_reference else target
    if get_origin(hint) is tuple:
        return types.Tuple([_type_of(part, by_reference=False) for part in get_args(hint)])
    dtype: Any = None
    axes = 1
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        for note in notes:
            if isinstance(note, np.dtype):
                dtype = note
            else:
                axes = len(note.split(","))
    if hint is Any:
        return from_dtype(dtype)
    if dtype is None:
        dtype = np.dtype(get_args(get_args(hint)[1])[0])
    return types.Array(from_dtype(dtype), axes, "C")
