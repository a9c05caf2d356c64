"""Asking for memory before it is needed.

A fleet's block tables are far larger than the processor's caches, and a walk through them waits for each block in
turn. Where the addresses are known beforehand, asking for all of them first lets the waits overlap.

`llvm.prefetch` (LLVM Language Reference) reads nothing and changes nothing: an address that is wrong costs time only.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_READ, _KEEP, _DATA = 0, 3, 1


def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Fetch the cache line of `array[index]` (one axis)."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        view = context.make_array(kind)(context, builder, args[0])
        place = context.cast(builder, args[1], signature.args[1], types.intp)
        pointer = cgutils.get_item_pointer(context, builder, kind, view, [place], wraparound=False)
        byte = ir.IntType(8).as_pointer()
        word = ir.IntType(32)
        fetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        )
        builder.call(fetch, [builder.bitcast(pointer, byte), word(_READ), word(_KEEP), word(_DATA)])
        return context.get_dummy_value()

    return types.void(array, index), lower


prefetch: Any = intrinsic(_prefetch)
