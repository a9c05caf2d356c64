"""Passing the state of a fleet from kernel to kernel by reference.

numba passes a tuple by value: every array of it is nine machine words or so, and `FleetState` holds two dozen arrays.
Each call of a kernel would write some two hundred words onto the stack, which cost more than what most kernels do, and
functions of so many arguments are slow to compile. A kernel that Python calls therefore begins with
`state = by_reference(state)`. What it calls gets one pointer to the tuple, whose fields read the same.

The type, its model and its attributes follow numba's documentation ("Low-level extension API").
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model


class Reference(types.Type):
    """A pointer to a named tuple that lives in a caller's frame."""

    def __init__(self, target: Any) -> None:
        self.target = target
        super().__init__(name=f"Reference({target.instance_class.__name__})")

    @property
    def key(self) -> Any:
        """The tuple's name does not tell its types, but what is compiled is named after it: the shorter the better."""
        return self.target


@register_model(Reference)
class _ReferenceModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Reference) -> None:
        super().__init__(dmm, fe_type, ir.IntType(8).as_pointer())


@infer_getattr
class _Fields(AttributeTemplate):
    key = Reference

    def generic_resolve(self, reference: Any, field: str) -> Any:
        names = reference.target.fields
        return reference.target.types[names.index(field)] if field in names else None


@lower_getattr_generic(Reference)
def _load_field(context: Any, builder: Any, reference: Reference, value: Any, field: str) -> Any:
    target = reference.target
    pointer = builder.bitcast(value, context.get_value_type(target).as_pointer())
    place = target.fields.index(field)
    return builder.load(cgutils.gep_inbounds(builder, pointer, 0, place))


def _by_reference(typing_context: Any, state: Any) -> Any:
    """A reference to a named tuple of the calling kernel; a reference is itself."""
    if isinstance(state, Reference):
        return state(state), lambda context, builder, signature, args: args[0]
    if not isinstance(state, types.BaseNamedTuple):
        return None

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = cgutils.alloca_once_value(builder, args[0])
        return builder.bitcast(place, ir.IntType(8).as_pointer())

    return Reference(state)(state), lower


by_reference: Any = intrinsic(_by_reference)
