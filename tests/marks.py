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


def one_axis_at_a_time(**axes):
    """Parameters of a test: the first value of each axis, then each other one alone.

    Values that act by themselves are seen as well as by their product, and sooner.
    """
    base = tuple(values[0] for values in axes.values())
    cases = [base]
    for place, values in enumerate(axes.values()):
        cases += [(*base[:place], value, *base[place + 1 :]) for value in values[1:]]
    return pytest.mark.parametrize(tuple(axes), cases)
