"""The data plane: compiled kernels over the arrays of `state.FleetState`. No I/O, no clock, no Python objects."""
