"""Methods that change how a trained network predicts: MC dropout, Laplace.

They ride on a method of one weight vector, and train as it does.
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from otmdr_jax import baselines, parallel
from otmdr_jax.baselines.mc_dropout import RATE
from otmdr_jax.data import Loader, Split, eval_batches
from otmdr_jax.experiments import patterns
from otmdr_jax.experiments.methods.base import Run
from otmdr_jax.experiments.methods.riding import Riding, summed
from otmdr_jax.experiments.methods.sampled import Sampled
from otmdr_jax.experiments.options import (
    Count,
    Positive,
)

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class McDropout(Sampled, Riding):
    """MC dropout: samples of the masks in a prediction."""

    name = "mc-dropout"
    own = ("num_samples", "mean_only")
    needs_dropout = True

    @classmethod
    def wrapped(cls, method, model, **own):
        return baselines.mc_dropout(method, model, **own)

    def options(self, run: Run) -> dict[str, Any]:
        return {**super().options(run), **self.of_samples}

    def check(self, config: Any) -> None:
        super().check(config)
        if config.model.dropout == 0:
            raise ValueError(
                f"{self.name} needs dropout, got dropout=0: leave it out for "
                f"{RATE}, or name a rate."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laplace(Sampled, Riding):
    """A Laplace approximation: a Gaussian fitted to what was trained."""

    name = "laplace"
    is_fitted = True
    own = ("structure", "num_samples", "prior_precision")

    laplace: Literal["last-layer", "last-layer-kron", "diagonal"] = "last-layer"
    """Of what: all of the last layer's matrix, up to 10,000 parameters; its Kronecker
    factors, for larger ones; or the diagonal of all weights, for which predictions
    follow the network's linearisation."""
    prior_precision: Positive | None = None
    """Precision of its Gaussian prior. Default: that of highest marginal likelihood."""
    laplace_examples: Count | None = None
    """Training images that its curvature is computed from, scaled up to all. Default:
    all."""

    @classmethod
    def make(cls, model, optimizer, loss, **options):
        """See :class:`MethodOptions`."""
        if options.get("num_samples") != 0:
            _check_frozen(options.get("structure", "last-layer"), loss.frozen)
        return super().make(model, optimizer, loss, **options)

    @classmethod
    def wrapped(cls, method, model, **own):
        # Without samples it predicts with the mode, as its base does.
        if own.get("num_samples") == 0:
            return method
        return baselines.laplace(method, model, **own)

    def options(self, run: Run) -> dict[str, Any]:
        return {
            **super().options(run),
            "structure": self.laplace,
            "num_samples": 0 if self.prediction == "mean" else self.num_samples,
            "prior_precision": self.prior_precision,
        }

    def check(self, config: Any) -> None:
        super().check(config)
        if self.prediction != "mean":
            _check_frozen(self.laplace, config.model.freeze or ())
            return
        for name in ("laplace", "prior_precision", "laplace_examples"):
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} with prediction='mean', for "
                    "which nothing is fitted: leave one of them out."
                )

    def seen(self, config: Any, state: PyTree, dataset: Any, programs: Any) -> Any:
        """The curvature that the Gaussian is made from, summed over the training set.

        A forward pass over the training set, without augmentation; of the diagonal a
        backward pass for each class as well.
        """
        if self.prediction == "mean" or self.posteriors(state):
            return None
        examples, devices = dataset.train, parallel.axis_size(programs.mesh, "data")
        count = examples.num_examples
        wanted = min(self.laplace_examples or count, count)
        if isinstance(examples, Loader):
            examples = examples.first(wanted) if wanted < count else examples
        elif wanted < count:
            rows = np.random.default_rng(config.run.seed).permutation(count)[:wanted]
            rows.sort()
            examples = Split(np.asarray(examples.images[rows]), examples.labels[rows])
        size = -(-min(config.run.eval_batch_size, wanted) // devices) * devices
        key = jax.random.key(0)  # nothing is random
        if isinstance(examples, Loader):
            full = np.ones(examples.batch_size, bool)
            read: Any = ((batch.images, full) for batch in examples.epoch(0))
        else:
            read = ((x, mask) for x, _, mask in eval_batches(examples, size))
        total = summed(programs, state, ((batch, key) for batch in read))
        return jax.tree.map(lambda x: x * (count / wanted), total)

    def fitted(self, state: PyTree) -> dict[str, float]:
        """The prior's precision and the effective number of parameters."""
        found = self.posteriors(state)
        names = ("prior_precision", "effective_parameters") if found else ()
        return {
            name: float(
                np.mean(np.hstack([np.asarray(getattr(one, name)) for one in found]))
            )
            for name in names
        }

    def posteriors(self, state: PyTree) -> list[baselines.LaplacePosterior]:
        """The members' Gaussians, stacked as they are; none before it is finalized."""
        each = [state] if hasattr(state, "step") else state
        found = [member.method_state for member in each]
        return [one for one in found if one is not None]


def _check_frozen(structure, frozen):
    """Refuses a Gaussian of weights that stay as they are."""
    last = ("head/kernel", "head/bias")
    if structure == "diagonal" and frozen:
        raise ValueError(
            "laplace='diagonal' is of all weights, and freeze="
            f"{frozen} keeps some of them as they are: use --laplace last-layer."
        )
    if any(patterns.matches(name, frozen) for name in last):
        raise ValueError(
            f"laplace={structure!r} is of the last layer, which freeze={frozen} "
            "keeps as it is: leave one of them out."
        )
