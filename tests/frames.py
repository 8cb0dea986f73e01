"""A place for the frames of deep calls, so that tracing asks the system for less."""


def in_one_piece(function, /, *args, **kwargs):
    """What the function returns, its frames and those below it in one piece of memory.

    CPython keeps frames in pieces of 16 KiB: it maps one at each call across the end of
    the last, and unmaps it at the return. Tracing is a deep tree of short calls, and
    this was a tenth of its time. The frame of this function asks for half of a MiB, for
    which CPython maps a whole one, and the calls below it share the rest.
    """
    return function(*args, **kwargs)


_WORDS = 2**16 + 2**10  # of 8 bytes: a piece has a power of two of bytes
in_one_piece.__code__ = in_one_piece.__code__.replace(co_stacksize=_WORDS)
