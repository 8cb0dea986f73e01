"""What a training step costs, in gradients of a whole batch.

Seconds belong to a machine; the number of gradients is what a method asks for. A pass
over a part of the batch counts as that part.
"""

from otmdr_jax.experiments import methods
from otmdr_jax.experiments.config import TrainConfig


def gradient_evaluations(config: TrainConfig) -> float:
    """Gradients of a batch of the whole size that a step takes, members together.

    Args:
      config: A run's options.

    Returns:
      1 for the plain gradient, and for what collects members or is sparse on it; one
      more for each ascent step of SAM, which sees all of the batch; of OT-MDR, whose
      ascent steps share the batch, 2 for each particle.

    Raises:
      ValueError: A method without a count.

    Example:
      >>> from otmdr_jax.experiments.config import TrainConfig
      >>> [gradient_evaluations(TrainConfig(method=m)) for m in ("sgd", "sam", "otmdr")]
      [1.0, 2.0, 2.0]
      >>> gradient_evaluations(TrainConfig(num_particles=2, members="3"))
      12.0
    """
    return float(len(config.member_names) * _of_one(config))


def _of_one(config: TrainConfig) -> float:
    name = config.gradient_method  # what collects members rides on another method
    own = methods.METHODS[name]
    rho = config.rho or (own or {}).get("rho", ())
    if name in ("sgd", "sgvb"):
        return 1.0
    if name == "ivon":
        return float(config.mc_samples)
    if name == "looksam":  # every so many steps one more
        return 1.0 + 1.0 / config.look_every
    if name in ("sam", "asam", "gsam", "fisher-sam", "bsam"):
        return 1.0 + len(rho)
    if name not in ("otmdr", "otmdr-bnn"):
        raise ValueError(f"{__name__} has no count for {config.method}: add it there.")
    shared = config.split == "shared"
    a_particle = 1.0 + (len(rho) if shared else 1.0)
    count = config.num_particles * a_particle
    if config.method == "otmdr-bnn" and config.sigma_gradient == "center":
        # The first part's gradient at the center is there already; not the others'.
        count += 0.0 if shared else 1.0 - 1.0 / len(rho)
    return count
