"""The cost of a training step, in gradients of a whole batch.

Seconds depend on the machine; the number of gradients depends on the method alone. A
pass over a part of the batch counts as that part.
"""

from otmdr_jax.experiments.config import TrainConfig


def gradient_evaluations(config: TrainConfig) -> float:
    """Counts the gradients of a whole batch that one step of all members takes.

    Args:
      config: A run's options.

    Returns:
      The sum over the members. A member trained on the plain gradient takes 1, also
      where the method collects members or prunes weights. SAM takes one more for each
      ascent step, which sees the whole batch. OT-MDR takes 2 for each particle, because
      its ascent steps share the batch.

    Example:
      >>> from otmdr_jax.experiments.config import TrainConfig
      >>> [gradient_evaluations(TrainConfig(method=m)) for m in ("sgd", "sam", "otmdr")]
      [1.0, 2.0, 2.0]
      >>> gradient_evaluations(TrainConfig(num_particles=2, members="3"))
      12.0
    """
    each = config.method.gradients
    return float(len(config.model.member_names) * each)
