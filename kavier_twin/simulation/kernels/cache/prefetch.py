"""Asking for memory ahead of its use.

The caches of a large fleet fill far more memory than a processor's caches hold, and what a request needs of them lies
scattered: a load that must wait for memory costs as much as some hundred instructions, but many can be under way at
once. So loops over blocks first ask for all they will read. What is computed does not depend on it.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj


def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Ask for the memory of `array[index]` (one axis, index in range), and do not wait for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, _ = signature.args
        view = arrayobj.make_array(kind)(context, builder, value=arguments[0])
        item = cgutils.get_item_pointer(context, builder, kind, view, [arguments[1]], wraparound=False)
        byte = ir.IntType(8).as_pointer()
        word = ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        )
        for_reading, keep, data = (ir.Constant(word, number) for number in (0, 3, 1))
        builder.call(function, [builder.bitcast(item, byte), for_reading, keep, data])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


prefetch: Any = intrinsic(_prefetch)
