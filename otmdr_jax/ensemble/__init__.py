r"""OT-MDR for a uniform distribution over several models (section 4.2.2, Eqs. 11-12).

Each of the M members climbs on its own, with its own split of the batch, noise and
gradient norm. Members of one architecture are stacked, with a leading axis of M on
every leaf; members of different architectures are a tuple. Their prediction is the mean
of their probabilities, :func:`log_mean_probs`.

    gradient.py     the robust gradient of every member
    dual.py         the dual form, with one budget for all members
    stacking.py     members of one architecture or several; a key for each
    optimizers.py   an Optax transformation for members
    joint.py        all members as one model: the joint variant
"""

from otmdr_jax.ensemble.dual import dual, dual_gradient
from otmdr_jax.ensemble.gradient import robust_gradient, value_and_grad
from otmdr_jax.ensemble.joint import joint_loss, log_mean_probs
from otmdr_jax.ensemble.optimizers import per_member
from otmdr_jax.ensemble.stacking import count_members, is_tuple, member_keys, stack

__all__ = [
    "count_members",
    "dual",
    "dual_gradient",
    "is_tuple",
    "joint_loss",
    "log_mean_probs",
    "member_keys",
    "per_member",
    "robust_gradient",
    "stack",
    "value_and_grad",
]
