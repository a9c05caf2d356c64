"""Kernels: functions in the subset of Python that numba compiles.

`nogil` lets forks run in parallel threads, `error_model="numpy"` drops zero-division checks. Fast-math stays off:
results must not depend on how a loop was vectorised.

Kernels only look into arrays that Python owns for the length of the call. `_nrt=False` leaves out numba's reference
counting of every view they take, which cost a third of the time; in exchange a kernel cannot allocate (numba says so
when it is compiled). The option is numba's own, for code such as this, though not part of its documented interface:
were it gone, leaving it out changes nothing but the speed.

A kernel has no machine code of its own: it is compiled into each library whose kernels call it (`libraries.py`). Two
kinds of kernels can be called from outside: `entry` from Python, `linked` from the kernels of other libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar, cast

from numba.core import types, typing
from numba.core.registry import CPUDispatcher

from kavier_twin.simulation.compiler import libraries, signatures, unit
from kavier_twin.simulation.compiler.libraries import Library

Function = TypeVar("Function", bound=Callable[..., Any])

_OPTIONS: Final = {"nopython": True, "nogil": True, "error_model": "numpy", "_nrt": False}


class Kernel(CPUDispatcher):
    """A compiled function. Its types are those of the first call in a library: see `one_type`."""

    library: Library | None = None
    signature: typing.Signature | None = None  # of one that can be called from outside

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__(function, targetoptions={**_OPTIONS, **options}, pipeline_class=unit.Pipeline)

    @property
    def symbol(self) -> str:
        """A name for what it is compiled to."""
        return f"{self.py_func.__module__}.{self.py_func.__qualname__}"

    def get_call_template(self, args: Sequence[types.Type], kws: Any) -> tuple[Any, Any, tuple[types.Type, ...], Any]:
        """For numba: the types of a call from the kernel that is being compiled."""
        parameters, args = self.fold_argument_types(args, kws)
        called = unit.current().signature_of(self, tuple(map(one_type, args)))
        name = self.py_func.__name__
        return typing.make_concrete_template(name, name, [called]), parameters, called.args, {}

    def get_overload(self, args: Sequence[types.Type]) -> object:
        """For numba: what stands for the function that a call with these types calls."""
        return unit.current().callee(self, tuple(args))

    def _compile_for_args(self, *args: Any, **kws: Any) -> Any:
        """For numba: what to call from Python with arguments whose types were not seen yet."""
        given = tuple(map(self.typeof_pyval, args))
        if self.library is None:  # no entry, but called as one, as tests do: in a library of its own, for this process
            self.signature = typing.signature(None, *given)
            libraries.install(unit.compile_unit(self.symbol, [self]), [self])
            self.signature = None
            return self.overloads[given].entry_point
        self.library.load()
        self._can_compile = False  # from now on what does not fit is refused
        (wanted,) = self.overloads
        if not all(map(self._fits, given, wanted)):
            self._explain_matching_error(*args)
        return self.overloads[wanted].entry_point

    def _fits(self, given: types.Type, wanted: types.Type) -> bool:
        return self.typingctx.can_convert(given, wanted) is not None

    def _explain_matching_error(self, *args: Any, **kws: Any) -> None:
        """For numba: say which argument does not fit."""
        (wanted,) = self.overloads
        for name, given, type_ in zip(self.__code__.co_varnames, map(self.typeof_pyval, args), wanted, strict=False):
            if not self._fits(given, type_):
                raise TypeError(f"{self.symbol} takes no {name} of type {_short(given)}: it is to be {_short(type_)}")
        raise TypeError(f"{self.symbol} takes {len(wanted)} arguments")


def one_type(argument: types.Type) -> types.Type:
    """The type with which a kernel is compiled for an argument: constants and narrow integers are 64-bit numbers.

    Else it would be compiled once for each combination that occurs.
    """
    if isinstance(argument, types.Literal):
        argument = argument.literal_type
    if isinstance(argument, types.Integer) and argument.signed:
        return types.int64
    return argument


def _short(kind: types.Type) -> str:
    text = str(kind)
    return text if len(text) < 200 else f"{text[:200]} ..."


def kernel(function: Callable[..., Any]) -> Kernel:
    """A kernel that other kernels call."""
    return Kernel(function)


def inlined_kernel(function: Callable[..., Any]) -> Kernel:
    """Written out in its callers: for what returns records, which a compiled function cannot, and for what is small."""
    return Kernel(function, inline="always")


def small_kernel(function: Callable[..., Any]) -> Kernel:
    """Part of its callers' machine code: for the few instructions that touch one block."""
    return Kernel(function, forceinline=True)


def entry(library: Library) -> Callable[[Function], Function]:
    """A kernel that Python calls, with the types of its annotations (`signatures.py`)."""

    def decorate(function: Function) -> Function:
        made = Kernel(function)
        made.library, made.signature = library, signatures.signature_of(function, by_reference=False)
        library.entries.append(made)
        return cast(Function, made)

    return decorate


def linked(library: Library) -> Callable[[Callable[..., Any]], Kernel]:
    """A kernel that is compiled in one library, and that the kernels of others call there.

    Its types are those of its annotations, named tuples being references.
    """

    def decorate(function: Callable[..., Any]) -> Kernel:
        made = Kernel(function)
        made.library, made.signature = library, signatures.signature_of(function, by_reference=True)
        library.exports.append(made)
        return made

    return decorate
