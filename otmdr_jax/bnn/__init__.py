"""Bayesian networks: OT-MDR and SGVB over a mean-field Gaussian posterior.

Any model can become one: `init` puts a normal distribution over its weights;
`value_and_grad` (OT-MDR on the means, Nguyen et al., 2023, section 4.2.3) or `sgvb`
computes the gradient of the objective; `predict` evaluates samples.

    posterior.py       MeanField: which leaves are stochastic, sigma, samples
    priors.py          normal, scale mixture, fitted normal
    kl_divergence.py   KL, its weight and schedules, the scale of the objective
    gradient.py        the gradients
    dual.py            the dual form on the means
    local_reparam.py   noise for each example: local reparameterisation, Flipout
    presets.py         the paper's version and the released code's
    prediction.py      samples of predictions, epistemic and aleatoric uncertainty
    summary.py         sigma and signal-to-noise of each layer
"""

from otmdr_jax.bnn.dual import dual_gradient
from otmdr_jax.bnn.gradient import (
    BayesGradient,
    robust_gradient,
    sgvb,
    sgvb_gradient,
    value_and_grad,
)
from otmdr_jax.bnn.kl_divergence import blundell, convert_beta, kl, warmup
from otmdr_jax.bnn.options import PAPER_RHO
from otmdr_jax.bnn.posterior import (
    SIGMA,
    MeanField,
    check,
    draw,
    init,
    mean,
    sample,
    signal_to_noise,
    std,
    weights_and_biases,
)
from otmdr_jax.bnn.prediction import NUM_SAMPLES, Uncertainty, predict, uncertainty
from otmdr_jax.bnn.presets import PRESETS, preset
from otmdr_jax.bnn.priors import PRIOR_STD, FittedNormal, Normal, ScaleMixture
from otmdr_jax.bnn.summary import Summary, summarise
from otmdr_jax.ensemble import log_mean_probs

__all__ = [
    "NUM_SAMPLES",
    "PAPER_RHO",
    "PRESETS",
    "PRIOR_STD",
    "SIGMA",
    "BayesGradient",
    "FittedNormal",
    "MeanField",
    "Normal",
    "ScaleMixture",
    "Summary",
    "Uncertainty",
    "blundell",
    "check",
    "convert_beta",
    "draw",
    "dual_gradient",
    "init",
    "kl",
    "log_mean_probs",
    "mean",
    "predict",
    "preset",
    "robust_gradient",
    "sample",
    "sgvb",
    "sgvb_gradient",
    "signal_to_noise",
    "std",
    "summarise",
    "uncertainty",
    "value_and_grad",
    "warmup",
    "weights_and_biases",
]
