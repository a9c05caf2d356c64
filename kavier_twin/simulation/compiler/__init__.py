"""How kernels become machine code: numba compiles them in libraries, which are kept in a cache between processes."""
