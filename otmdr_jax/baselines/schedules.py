"""Learning rates of methods that collect members, and the steps at which they do.

Steps are counted as in Optax: a schedule's argument is the number of steps taken
before, 0 for the first. Papers count iterations from 1; their i is `step + 1`. Members
are collected after a step, so `ends` count the steps taken; the last is `total`.
"""

import math

import jax.numpy as jnp
import optax

from otmdr_jax.core.checks import check_count

# The shape that Garipov, Izmailov and Maddox train with before they collect (their
# train.py): constant to a half, then linear to its end at nine tenths.
FLAT_UNTIL, LINEAR_UNTIL = 0.5, 0.9
# The end of FGE's pre-training, as a share of the peak.
PRETRAINING_END = 0.01
# EDST's refinement: a tenth of the peak, then a hundredth (main_EDST.py).
REFINEMENT = (0.1, 0.01)


def cyclic_cosine(peak: float, total: int, cycles: int) -> optax.Schedule:
    r"""Snapshot ensembles' cosine that starts anew in each of M cycles.

    .. math:: \alpha(t) = \frac{\alpha_0}2 \left(\cos\left(\frac{\pi\,
        \mathrm{mod}(t - 1, \lceil T/M \rceil)}{\lceil T/M \rceil}\right) + 1\right)

    Args:
      peak: alpha_0, the rate at the start of every cycle.
      total: T, the number of steps of the run.
      cycles: M, the number of cycles.

    Example:
      >>> rate = cyclic_cosine(0.2, total=10, cycles=2)
      >>> [round(float(rate(step)), 3) for step in (0, 4, 5)]
      [0.2, 0.019, 0.2]

    Reference: Huang et al., `Snapshot Ensembles <https://arxiv.org/abs/1704.00109>`_,
    ICLR 2017, Eq. 2.
    """
    period = math.ceil(total / cycles)

    def rate(step):
        return peak / 2 * (jnp.cos(jnp.pi * jnp.mod(step, period) / period) + 1)

    return rate


def snapshot_ends(total: int, cycles: int) -> tuple[int, ...]:
    """The ends of the cycles of :func:`cyclic_cosine`; the last may be shorter.

    Raises:
      ValueError: The run is too short for M cycles of ceil(T/M) steps.

    Example:
      >>> snapshot_ends(10, 3)
      (4, 8, 10)
    """
    period = math.ceil(total / cycles)
    ends = (*range(period, total, period), total)
    if len(ends) < cycles:
        raise ValueError(
            f"cycles={cycles} of {period} steps each do not fit into a run of {total} "
            f"steps: use at most {len(ends)}, or a longer run."
        )
    return ends


def fge(
    peak: float, total: int, start: int, period: int, high: float, low: float
) -> optax.Schedule:
    r"""FGE's rate: pre-training, then triangles between two rates.

    .. math:: \alpha(i) = \begin{cases}
        (1 - 2 t(i)) \alpha_1 + 2 t(i) \alpha_2 & 0 < t(i) \le \frac12 \\
        (2 - 2 t(i)) \alpha_2 + (2 t(i) - 1) \alpha_1 & \frac12 < t(i) \le 1
        \end{cases}, \qquad t(i) = \frac{\mathrm{mod}(i - 1, c) + 1}c

    Args:
      peak: The highest rate of pre-training, which follows the authors' shape for a run
        of `total` steps and is cut off at `start`.
      total: The number of steps of the run.
      start: The number of steps of pre-training; i counts from there.
      period: c, the number of steps of a cycle; even, so that the lowest rate is met.
      high: alpha_1, at the ends of a cycle.
      low: alpha_2, in the middle of a cycle.

    Raises:
      ValueError: The period is odd.

    Reference: Garipov et al., `Loss Surfaces, Mode Connectivity, and Fast Ensembling of
    DNNs <https://arxiv.org/abs/1802.10026>`_, NeurIPS 2018, section 5; train.py and
    fge.py of their code.
    """
    _check_even(period)
    before = flat_then_linear(peak, PRETRAINING_END * peak, total)

    def rate(step):
        t = (jnp.mod(step - start, period) + 1) / period
        falling = (1 - 2 * t) * high + 2 * t * low
        rising = (2 - 2 * t) * low + (2 * t - 1) * high
        cyclic = jnp.where(t <= 0.5, falling, rising)
        return jnp.where(step < start, before(step), cyclic)

    return rate


def fge_ends(total: int, start: int, period: int) -> tuple[int, ...]:
    """The steps at which :func:`fge` has just used its lowest rate.

    Raises:
      ValueError: There is none, or the period is odd.

    Example:
      >>> fge_ends(total=16, start=8, period=4)
      (10, 14)
    """
    _check_even(period)
    ends = tuple(range(start + period // 2, total + 1, period))
    if not ends:
        raise ValueError(
            f"no cycle of {period} steps reaches its middle between step {start}, "
            f"where they start, and {total}: start earlier (collect_start), shorten "
            "the cycle (cycle_epochs), or train longer."
        )
    return ends


def _check_even(period):
    check_count("period", period)
    if period % 2:
        raise ValueError(
            f"period must be even, so that a step has the lowest rate, got {period}."
        )


def averaging_ends(total: int, start: int, every: int) -> tuple[int, ...]:
    """The steps whose weights are averaged: `start`, and every `every` steps after it.

    Raises:
      ValueError: There are fewer than two.

    Example:
      >>> averaging_ends(total=10, start=4, every=3)
      (4, 7, 10)
    """
    ends = tuple(range(start, total + 1, every))
    if len(ends) < 2:
        raise ValueError(
            f"an average needs the weights of two steps at least: from step {start} to "
            f"{total}, every {every}, there are {len(ends)}. Start earlier "
            "(collect_start), collect more often (collect_every), or train longer."
        )
    return ends


def flat_then_linear(peak: float, final: float, total: int) -> optax.Schedule:
    """Constant to half of `total`, then linear to `final` at nine tenths, constant.

    With `total` the steps of pre-training it is the rate of SWA and SWAG, which average
    weights at `final`.

    Example:
      >>> rate = flat_then_linear(1.0, 0.2, 10)
      >>> [round(float(rate(step)), 2) for step in (0, 5, 7, 9, 20)]
      [1.0, 1.0, 0.6, 0.2, 0.2]

    Reference: Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
    Generalization <https://arxiv.org/abs/1803.05407>`_, UAI 2018; train.py of their
    code. Maddox et al., 2019, take it over.
    """

    def rate(step):
        along = (step / total - FLAT_UNTIL) / (LINEAR_UNTIL - FLAT_UNTIL)
        return peak + (final - peak) * jnp.clip(along, 0.0, 1.0)

    return rate


def edst(peak: float, ends: tuple[int, ...], start: int) -> optax.Schedule:
    """EDST's rate: constant while it explores; then two rates in each refinement.

    A tenth of the peak in its first half, a hundredth in its second.

    Args:
      peak: The rate of the exploration phase.
      ends: The ends of the refinement phases, from :func:`edst_ends`.
      start: The number of steps of the exploration phase.

    Reference: Liu et al., `Deep Ensembling with No Overhead for either Training or
    Testing <https://arxiv.org/abs/2106.14568>`_, ICLR 2022; main_EDST.py of their code.
    """
    starts = (start, *ends[:-1])
    bounds, rates = [], [peak]
    for first, last in zip(starts, ends, strict=True):
        bounds += [first, (first + last) // 2]
        rates += [peak * factor for factor in REFINEMENT]

    def rate(step):
        return jnp.asarray(rates)[jnp.sum(step >= jnp.asarray(bounds))]

    return rate


def edst_ends(total: int, start: int, tickets: int) -> tuple[int, ...]:
    """The ends of EDST's refinement phases, which are equally long up to a step.

    Raises:
      ValueError: A phase would have fewer than two steps, one for each rate.

    Example:
      >>> edst_ends(total=450, start=150, tickets=3)
      (250, 350, 450)
    """
    rest = total - start
    if rest < 2 * tickets:
        raise ValueError(
            f"{tickets} tickets need two steps each, and exploration leaves {rest} of "
            f"{total}: shorten it (exploration), or train longer."
        )
    return tuple(start + round(rest * (i + 1) / tickets) for i in range(tickets))
