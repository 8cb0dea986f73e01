"""What a training step costs, in gradients of a whole batch.

Seconds belong to a machine; the number of gradients is what a method asks for. A pass
over a part of the batch counts as that part.
"""

from otmdr_jax.experiments.config import TrainConfig


def gradient_evaluations(config: TrainConfig) -> float:
    """Gradients of a batch of the whole size that a step takes, members together.

    Args:
      config: A run's options.

    Returns:
      1 for the plain gradient, and for what collects members or is sparse on it; one
      more for each ascent step of SAM, which sees all of the batch; of OT-MDR, whose
      ascent steps share the batch, 2 for each particle.

    Example:
      >>> from otmdr_jax.experiments.config import TrainConfig
      >>> [gradient_evaluations(TrainConfig(method=m)) for m in ("sgd", "sam", "otmdr")]
      [1.0, 2.0, 2.0]
      >>> gradient_evaluations(TrainConfig(num_particles=2, members="3"))
      12.0
    """
    each = config.method.gradients
    return float(len(config.model.member_names) * each)
