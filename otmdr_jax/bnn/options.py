"""The options of gradients of a posterior: see `core/options.py`."""

from typing import Annotated, Any, Literal, TypedDict

import jax

from otmdr_jax.core.options import (
    ParticleOptions,
    PartOptions,
    PassOptions,
    SamplerChoice,
    SamplerOptions,
    ShapeOptions,
)

# Nguyen et al., 2023, appendix B.3, for all experiments with Bayesian networks.
PAPER_RHO = (0.005, 0.01)


class ObjectiveOptions(TypedDict, total=False):
    """Of the objective, the negative ELBO per example."""

    num_data: Annotated[
        float | None, None, "N, the number of examples in the training set; required."
    ]
    prior_std: Annotated[
        float | None,
        None,
        "Standard deviation of a normal prior, 0.1 by default (released code).",
    ]
    prior: Annotated[
        Any, None, "Another prior in its place: see :mod:`otmdr_jax.bnn.priors`."
    ]
    kl_weight: Annotated[
        jax.typing.ArrayLike,
        1.0,
        """What KL / N is multiplied by: 1 is the ELBO. A number or a traced scalar;
        schedules are called outside and handed to `grad_fn`.""",
    ]


class MeansOptions(TypedDict, total=False):
    """Of the climb of the means."""

    rho: Annotated[
        Any,
        PAPER_RHO,
        "Radii, one for each ascent step, (0.005, 0.01) by default (appendix B.3).",
    ]
    norm: Annotated[
        Literal["per_leaf", "global", "joint"],
        "per_leaf",
        """"per_leaf" (the paper: each layer's means have a norm), "global" (one over
        all means) or "joint" (one over the gradients of means and their raw scales;
        the released code). What `mask` leaves out does not count.""",
    ]
    sigma_gradient: Annotated[
        Literal["center", "center_first", "particle"],
        "center",
        """"center" (the paper: at mu + sigma kappa, on all of the batch),
        "center_first" (there, but on the first part of the batch alone, which saves a
        pass), or "particle" (in the last pass; the released code).""",
    ]
    weight_noise: Annotated[
        Literal["once", "each_step"],
        "once",
        """kappa drawn "once" a step (the paper), or at "each_step" of ascent, the last
        one kept for the last pass (the released code). The same on all devices and
        sub-batches in any case.""",
    ]
    mask: Annotated[
        Any,
        None,
        """Which means may be perturbed: a pytree of bools of the model's structure, or
        a function of its parameters to one.""",
    ]


class MeanFieldOptions(
    ObjectiveOptions,
    MeansOptions,
    ParticleOptions,
    SamplerChoice,
    SamplerOptions,
    ShapeOptions,
    PartOptions,
    PassOptions,
    total=False,
):
    """Of the robust gradient of a posterior."""


class SgvbOptions(ObjectiveOptions, PassOptions, total=False):
    """Of SGVB."""

    estimator: Annotated[
        Literal["weights", "local", "flipout"],
        "weights",
        """"weights" (one sample of the weights for the batch), "local" or "flipout"
        (noise of its own for each example: gradients of lower variance, two products
        for one; see :mod:`otmdr_jax.bnn.local_reparam`).""",
    ]
