#!/bin/sh
# The kernels were compiled with the image, which is read-only, and numba wants to write where it reads: so it gets a
# folder of links. Where /tmp cannot be written either, kernels are compiled anew.
mkdir -p "$NUMBA_CACHE_DIR" 2>/dev/null && cp -rsn --no-preserve=mode /opt/kernels/. "$NUMBA_CACHE_DIR"
exec kavier-twin "$@"
