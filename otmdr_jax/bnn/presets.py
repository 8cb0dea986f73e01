"""Named versions of OT-MDR for Bayesian networks: the paper's and the released code's.

The two differ in several places (docs/paper-versus-code.md).
"""

from typing import Any

from otmdr_jax.bnn.options import PAPER_RHO
from otmdr_jax.core.checks import check_word

PRESETS = ("paper", "released")


def preset(name: str, num_particles: int = 1) -> dict[str, Any]:
    """The options of a named version.

    Args:
      name: "paper" (section 4.2.3 and appendix B) or "released" (the authors' code).
      num_particles: K, the number of particles. The released code cuts the batch in
        loader order for K = 1 and at random for more.

    Returns:
      A new dictionary of all options of :func:`otmdr_jax.bnn.value_and_grad` except
      `num_data`. Both versions have the released code's prior and weight of the
      divergence, since the paper does not name them.

    Raises:
      ValueError: An unknown name.

    Example:
      >>> from otmdr_jax import bnn
      >>> bnn.preset("paper")["sigma_gradient"], bnn.preset("released")["norm"]
      ('center', 'joint')
    """
    check_word("preset", name, PRESETS)
    common: dict[str, Any] = {
        "rho": PAPER_RHO,
        "num_particles": num_particles,
        "noise_std": 0.01,  # appendix B.1; the released code's flag, used here
        "prior_std": 0.1,
        "kl_weight": 5e-6,  # beside the log-likelihood of the whole data set
    }
    if name == "paper":
        return common | {
            "split": "random",
            "norm": "per_leaf",
            "sigma_gradient": "center",
            "weight_noise": "once",
        }
    return common | {
        "split": "ordered" if num_particles == 1 else "random",
        "merge": "sum",
        "norm": "joint",
        "sigma_gradient": "particle",
        "weight_noise": "each_step",
    }
