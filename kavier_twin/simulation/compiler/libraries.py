"""Libraries of kernels: compiled in processes of their own, kept in a cache, loaded where they are first called.

A process that compiles takes hundreds of megabytes that it never gives back, so the one that needs a library has
another compile it, libraries side by side. What they make is kept in a file named by a digest of all that it follows
from (sources, versions of numba, LLVM and Python, the processor), not by where the sources lie: virtual environments,
an image and a wheel of the same version share it. It lies under `NUMBA_CACHE_DIR` if set, else in the user's cache
folder. Where that cannot be written, a process compiles for itself alone (a shared temporary folder would let others
plant code).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import inspect
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

import llvmlite
import numba
from numba.core.registry import cpu_target

from kavier_twin.simulation import state
from kavier_twin.simulation.compiler import signatures, unit

if TYPE_CHECKING:
    from kavier_twin.simulation.compiler.kernel import Kernel

log = logging.getLogger(__name__)

_SIMULATION: Final = Path(__file__).parents[1]
_POLL_SECONDS: Final = 0.05  # between looks at the processes that compile

_libraries: dict[str, Library] = {}  # by name
_lock = threading.RLock()
_loaded: list[unit.Loaded] = []  # in this process
_exports: dict[str, int] = {}  # by symbol the address of a linked kernel
_slots: dict[str, list[ctypes.c_void_p]] = {}  # by symbol where that is wanted
_compiling: list[str] = []  # names of libraries
_compiled_here: list[str] = []


class Library:
    """Kernels that are compiled together. `module` is imported to define them.

    All libraries of a module are loaded together, but for those `on_demand`: who needs one of these loads it.
    """

    def __init__(self, name: str, module: str, *, on_demand: bool = False) -> None:
        self.name = name
        self.module = module
        self.on_demand = on_demand
        self.entries: list[Kernel] = []
        self.exports: list[Kernel] = []
        self.is_loaded = False
        _libraries[name] = self

    def load(self) -> None:
        """See `load`."""
        load(self)

    def compile(self) -> unit.Code:
        """Compile it in this process."""
        import_module(self.module)
        return unit.compile_unit(self.name, self.entries, self.exports)

    @property
    def digest(self) -> str:
        """Of all that its machine code follows from."""
        import_module(self.module)
        kernels = [*self.entries, *self.exports]
        outside = {inspect.getfile(kernel.py_func) for kernel in kernels}
        outside |= {inspect.getfile(kind) for kernel in kernels for kind in signatures.named_tuples_of(kernel.py_func)}
        inside = [*(_SIMULATION / "kernels").rglob("*.py"), *Path(__file__).parent.glob("*.py"), Path(state.__file__)]
        sources = {hashlib.sha256(Path(source).read_bytes()).digest() for source in {*map(str, inside), *outside}}
        versions = numba.__version__, llvmlite.__version__, sys.implementation.cache_tag
        processor = cpu_target.target_context.codegen().magic_tuple()
        return hashlib.sha256(repr((versions, processor, sorted(sources))).encode()).hexdigest()[:16]


def load(*wanted: Library) -> None:
    """Make these libraries callable: from the cache, else compiled first. Returns at once where they are loaded."""
    if all(library.is_loaded for library in wanted):
        return
    with _lock:
        modules = {library.module for library in wanted if not library.on_demand}
        together = [
            one for one in _libraries.values() if one in wanted or (one.module in modules and not one.on_demand)
        ]
        missing = [library for library in together if not library.is_loaded]
        for library, code in _codes(missing):
            install(code, library.entries)
            library.is_loaded = True


def compiling() -> tuple[str, ...]:
    """The libraries that are being compiled for this process now."""
    return tuple(_compiling)


def compiled() -> tuple[str, ...]:
    """Those that were, in order."""
    return tuple(_compiled_here)


def install(code: unit.Code, entries: Iterable[Kernel]) -> None:
    """Load compiled kernels into this process, and connect them with those of other libraries."""
    loaded = unit.Loaded(code)
    _loaded.append(loaded)
    _exports.update(loaded.exports)
    for symbol, slot in loaded.slots.items():
        _slots.setdefault(symbol, []).append(slot)
    for symbol in {*loaded.exports, *loaded.slots} & _exports.keys():
        for slot in _slots.get(symbol, ()):
            slot.value = _exports[symbol]
    for kernel in entries:
        kernel.add_overload(loaded.entries[kernel.symbol])


# --- compiled code between processes ----------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("NUMBA_CACHE_DIR") or os.path.join(user_cache, "kavier-twin"))


def cached_file(library: Library) -> Path:
    """The file that keeps a library's code."""
    return cache_folder() / f"{library.name}-{library.digest}.kernels"


def cached() -> list[unit.Code]:
    """All libraries in the cache, of whatever version."""
    return [code for file in sorted(cache_folder().glob("*.kernels")) if (code := _read(file)) is not None]


def _codes(libraries: Sequence[Library]) -> Generator[tuple[Library, unit.Code], None, None]:
    """Each with its code, as soon as it is there."""
    files = {library: cached_file(library) for library in libraries}
    absent = []
    for library, file in files.items():
        code = _read(file)
        if code is None:
            absent.append(library)
        else:
            yield library, code
    if absent:
        yield from _compiled_beside(absent, files)


def _read(file: Path) -> unit.Code | None:
    try:
        code = pickle.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        log.warning("%s cannot be read (%s: %s); its kernels are compiled again", file, type(error).__name__, error)
        return None
    with contextlib.suppress(OSError):  # it may only be read
        os.utime(file)
    return code if isinstance(code, unit.Code) else None


def _compiled_beside(
    libraries: Sequence[Library], files: Mapping[Library, Path]
) -> Generator[tuple[Library, unit.Code], None, None]:
    """Compile these side by side, each in a process of its own, unless another process did meanwhile."""
    with contextlib.ExitStack() as stack:
        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            for library in sorted(libraries, key=lambda one: one.name):
                stack.enter_context(_alone(files[library]))
        except OSError as error:
            log.warning("compiled kernels cannot be kept in %s (%s)", cache_folder(), error.strerror)
            try:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            except OSError:  # there is no place at all, not even for a moment
                yield from ((library, library.compile()) for library in libraries)
                return
            files = {library: folder / library.name for library in libraries}
        found = {library: code for library in libraries if (code := _read(files[library])) is not None}
        yield from found.items()
        absent = [library for library in libraries if library not in found]
        if not absent:
            return
        names = ", ".join(library.name for library in absent)
        log.info("compiling kernels: %s", names)
        began = time.monotonic()
        _compiling.extend(library.name for library in absent)
        stack.callback(_compiling.clear)
        children = {library: _child(library, files[library]) for library in absent}
        while children:
            ended = [library for library, child in children.items() if child is None or child.poll() is not None]
            for library in ended:
                code = _outcome(library, files[library], children.pop(library))
                _compiling.remove(library.name)
                _compiled_here.append(library.name)
                yield library, code
            time.sleep(0.0 if ended else _POLL_SECONDS)
        log.info("kernels compiled: %s, in %.1f s", names, time.monotonic() - began)


def _child(library: Library, file: Path) -> subprocess.Popen[bytes] | None:
    """A process that compiles the library into the file. It ends with this one, whose end closes its input."""
    command = [sys.executable, "-P", "-m", __package__, library.module, library.name, str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    except OSError as error:
        log.warning("no process can be started to compile kernels in (%s)", error)
        return None


def _outcome(library: Library, file: Path, child: subprocess.Popen[bytes] | None) -> unit.Code:
    if child is not None:
        status = child.wait()
        child.communicate()
        code = _read(file) if status == 0 else None
        if code is not None:
            return code
        log.warning("the process that compiles the kernels %s ended with status %d", library.name, status)
    code = library.compile()
    with contextlib.suppress(OSError):  # it is there for this process
        keep(code, file)
    return code


def keep(code: unit.Code, file: Path) -> None:
    """Write a library's code to its file, whole or not at all."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    unfinished.write_bytes(pickle.dumps(code))
    unfinished.replace(file)


@contextlib.contextmanager
def _alone(file: Path) -> Generator[None, None, None]:
    """Other processes that want to write the same file wait meanwhile."""
    path = file.with_name(f"{file.name}.lock")
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def named(name: str) -> Library:
    """The library of this name, whose module is imported."""
    return _libraries[name]
