"""Compiling kernels together: one module of machine code from many functions.

numba makes a library of each function, carries the code of all that a function calls in it, optimises it again for
each caller, and makes wrappers for Python around each. Here all functions of a unit go into one library of numba's
(`CodeLibrary`), which is optimised once, with wrappers for those that Python calls. What only calls within the unit is
internal to it, so that LLVM drops what it has inlined everywhere.

A call to a kernel of another library goes through a slot: a pointer in the unit, filled in when that library is
loaded, so that libraries may call each other and be loaded in any order.
"""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from llvmlite import ir
from numba.core import cgutils, compiler, event, serialize, types, typing
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import PassManager
from numba.core.registry import cpu_target
from numba.core.typed_passes import (
    IRLegalization,
    NativeLowering,
    NoPythonBackend,
    NoPythonSupportedFeatureValidation,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.untyped_passes import (
    FixupArgs,
    GenericRewrites,
    InlineInlinables,
    IRProcessing,
    ReconstructSSA,
    TranslateByteCode,
)

if TYPE_CHECKING:
    from kavier_twin.simulation.compiler.kernel import Kernel

_SLOT: Final = "kavier_twin.slot."


class Pipeline(compiler.CompilerBase):
    """numba's own passes, without those for what kernels do not use: closures, literals, array expressions."""

    def define_pipelines(self) -> list[PassManager]:
        """See numba's documentation on customising the compiler."""
        passes = PassManager("kernel")
        passes.add_pass(TranslateByteCode, "bytecode to numba's IR")
        passes.add_pass(FixupArgs, "arguments")
        passes.add_pass(IRProcessing, "control flow")
        passes.add_pass(GenericRewrites, "constant items")
        passes.add_pass(InlineInlinables, "inlined kernels")
        passes.add_pass(ReconstructSSA, "static single assignment")
        passes.add_pass(NopythonTypeInference, "types")
        passes.add_pass(PreLowerStripPhis, "no phi nodes")
        passes.add_pass(NoPythonSupportedFeatureValidation, "supported")
        passes.add_pass(IRLegalization, "legal")
        passes.add_pass(NativeLowering, "LLVM's IR")
        passes.add_pass(NoPythonBackend, "result")
        passes.finalize()
        return [passes]


class _Library(JITCodeLibrary):
    """numba's library of machine code, optimised as a whole and only once."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def optimise(self, kept: set[str]) -> None:
        """Make machine code; from outside only the functions `kept` can be reached."""
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        for function in self._final_module.functions:
            if not function.is_declaration and function.name not in kept:
                function.linkage = "internal"
        manager, builder = self._codegen._module_pass_manager()
        manager.run(self._final_module, builder)
        self._finalize_final_module()

    @property
    def code(self) -> bytes:
        """The object file."""
        return bytes(self._get_compiled_object())

    def load(self, code: bytes) -> None:
        """Be what another process compiled."""
        self.enable_object_caching()
        self._set_compiled_object(code)
        self._finalize_final_module()

    def get_pointer_to_function(self, name: str) -> int:
        """The address of a function of this library."""
        return int(self._codegen._engine.get_function_address(name))

    def slot(self, name: str) -> ctypes.c_void_p:
        """The memory of one of its slots."""
        return ctypes.c_void_p.from_address(self._codegen._engine.get_global_value_address(name))


class Code(NamedTuple):
    """A library as it is kept."""

    name: str
    code: bytes
    functions: tuple[str, ...]  # symbols of all that was compiled, one for each set of types
    entries: bytes  # pickled, by symbol: numba's descriptor, environment and signature
    exports: Mapping[str, str]  # by symbol the name in the object file
    slots: Mapping[str, str]  # by symbol the name of the pointer


class _Unit:
    """The functions compiled so far."""

    def __init__(self, name: str, own: set[Kernel]) -> None:
        self._own = own
        self._compiled: dict[tuple[Kernel, tuple[types.Type, ...]], Any] = {}
        self._linked: dict[Kernel, object] = {}
        self.library = _Library(cpu_target.target_context.codegen(), name)
        self.library.enable_object_caching()

    def signature_of(self, kernel: Kernel, args: tuple[types.Type, ...]) -> typing.Signature:
        """What a call with these types is, compiled if it is the first."""
        if kernel.signature is not None and kernel not in self._own:
            return kernel.signature
        return self.compile(kernel, args).signature

    def compile(
        self, kernel: Kernel, args: tuple[types.Type, ...], returned: Any = None, *, wrapper: bool = False
    ) -> Any:
        """numba's result for the kernel with these types."""
        found = self._compiled.get((kernel, args))
        if found is None:
            flags = compiler.Flags()
            kernel.targetdescr.options.parse_as_flags(flags, kernel.targetoptions)
            flags.no_compile = flags.no_cfunc_wrapper = True
            flags.no_cpython_wrapper = not wrapper
            found = compiler.compile_extra(
                kernel.typingctx,
                kernel.targetctx,
                kernel.py_func,
                args,
                returned,
                flags,
                {},
                library=self.library,
                pipeline_class=Pipeline,
            )
            # What is not compiled has no entry point, and numba finds functions by that.
            found = found._replace(entry_point=object())
            kernel.targetctx.insert_user_function(found.entry_point, found.fndesc)
            self._compiled[kernel, args] = found
        return found

    def compile_own(self, kernel: Kernel, *, wrapper: bool = False) -> Any:
        """The same for one that can be called from outside, with the types it has there."""
        assert kernel.signature is not None
        return self.compile(kernel, kernel.signature.args, kernel.signature.return_type, wrapper=wrapper)

    def callee(self, kernel: Kernel, args: tuple[types.Type, ...]) -> object:
        """What numba finds the implementation of a call by."""
        if (kernel, args) in self._compiled:
            return self._compiled[kernel, args].entry_point
        if kernel not in self._linked:
            self._linked[kernel] = key = object()
            assert kernel.signature is not None
            kernel.targetctx.insert_func_defn([(_call_through_slot(kernel), key, kernel.signature.args)])
        return self._linked[kernel]

    @property
    def functions(self) -> tuple[str, ...]:
        """What was compiled."""
        return tuple(kernel.symbol for kernel, _ in self._compiled)

    @property
    def slots(self) -> dict[str, str]:
        """The linked kernels that were called."""
        return {kernel.symbol: _SLOT + kernel.symbol for kernel in self._linked}


def _call_through_slot(kernel: Kernel) -> Any:
    """What numba is to write for a call to a kernel of another library."""

    def call(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.call_conv.get_function_type(signature.return_type, signature.args)
        byte = ir.IntType(8).as_pointer()
        name = _SLOT + kernel.symbol
        slot = builder.module.globals.get(name)
        if slot is None:
            slot = ir.GlobalVariable(builder.module, byte, name)
            slot.linkage, slot.initializer = "common", byte(None)
        pointer = builder.load(slot)
        with cgutils.if_unlikely(builder, cgutils.is_null(builder, pointer)):
            missing = f"{kernel.symbol} is called, but its library is not loaded"
            context.call_conv.return_user_exc(builder, RuntimeError, (missing,))
        callee = builder.bitcast(pointer, kind.as_pointer())
        status, result = context.call_conv.call_function(
            builder, callee, signature.return_type, signature.args, arguments
        )
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return result

    return call


# --- compiling and loading ------------------------------------------------------------------------------------------

_under_way: list[_Unit] = []  # guarded by numba's lock


def current() -> _Unit:
    """The unit that is being compiled."""
    if not _under_way:
        raise RuntimeError("a kernel is called by a function that is no kernel")
    return _under_way[-1]


def compile_unit(name: str, entries: Iterable[Kernel], exports: Iterable[Kernel] = ()) -> Code:
    """Compile these kernels, whose signatures are known, and all that they call."""
    entries, exports = tuple(entries), tuple(exports)
    with global_compiler_lock, event.trigger_event("kavier_twin:compile", data={"library": name}):
        unit = _Unit(name, {*entries, *exports})
        _under_way.append(unit)
        try:
            called = {kernel.symbol: unit.compile_own(kernel, wrapper=True) for kernel in entries}
            linked = {kernel.symbol: unit.compile_own(kernel).fndesc.mangled_name for kernel in exports}
        finally:
            _under_way.pop()
        unit.library.optimise({*(made.fndesc.llvm_cpython_wrapper_name for made in called.values()), *linked.values()})
    for made in called.values():
        made.fndesc.typemap = made.fndesc.calltypes = None
    described = {symbol: (made.fndesc, made.environment, made.signature) for symbol, made in called.items()}
    return Code(name, unit.library.code, unit.functions, serialize.dumps(described), linked, unit.slots)


class Loaded:
    """A library in this process."""

    def __init__(self, code: Code) -> None:
        context = cpu_target.target_context
        context.refresh()
        with global_compiler_lock:
            self._library = _Library(context.codegen(), code.name)
            self._library.load(code.code)
            self.entries: dict[str, compiler.CompileResult] = {}
            for symbol, (described, environment, signature) in pickle.loads(code.entries).items():
                self.entries[symbol] = _result(self._library, described, environment, signature)
            self.exports = {
                symbol: self._library.get_pointer_to_function(name) for symbol, name in code.exports.items()
            }
            self.slots = {symbol: self._library.slot(name) for symbol, name in code.slots.items()}


def _result(library: _Library, described: Any, environment: Any, signature: typing.Signature) -> compiler.CompileResult:
    """What numba keeps of a compiled function, as far as a call from Python needs it."""
    context = cpu_target.target_context
    values = dict.fromkeys(compiler.CR_FIELDS)
    values |= {
        "typing_context": context.typing_context,
        "target_context": context,
        "entry_point": context.get_executable(library, described, environment),
        "signature": signature,
        "objectmode": False,
        "fndesc": described,
        "library": library,
        "environment": environment,
    }
    return compiler.CompileResult(**values)
