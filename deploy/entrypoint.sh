#!/bin/sh
# The image contains compiled kernels on a read-only file system, but numba needs to write to its cache folder. It gets a
# folder of links. If /tmp is not writable either, the kernels are compiled again.
mkdir -p "$NUMBA_CACHE_DIR" 2>/dev/null && cp -rsn --no-preserve=mode /opt/kernels/. "$NUMBA_CACHE_DIR"
exec kavier-twin "$@"
