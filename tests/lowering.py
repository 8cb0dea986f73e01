"""Lowering of many small programs, in older versions of JAX as quick as in JAX 0.12."""

import threading

from jax._src.interpreters import mlir

LOWERINGS = 100  # of a context; its interned types and constants grow with each


def share_contexts():
    """Lets the programs of a thread share an MLIR context.

    JAX before 0.12 makes one for each program, and loads some ten dialects into it:
    with 3 milliseconds for each of the suite's programs an eighth of its time.
    JAX 0.12 shares a context of a thread between ten programs itself.
    """
    make = mlir.make_ir_context
    own = threading.local()

    def shared():
        if getattr(own, "left", 0) == 0:
            own.context, own.left = make(), LOWERINGS
        own.left -= 1
        return own.context

    mlir.make_ir_context = shared
