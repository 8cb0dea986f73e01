"""Which parameters of a test `make test` runs, where `make test-all` runs all."""

import pytest


def slow_but(fast, values):
    """The values, of which those that are not in `fast` are marked slow.

    A tuple is of as many names.
    """
    fast, found = list(fast), []
    for value in values:
        one = value if isinstance(value, tuple) else (value,)
        marks = () if value in fast else pytest.mark.slow
        found.append(pytest.param(*one, marks=marks))
    return found
