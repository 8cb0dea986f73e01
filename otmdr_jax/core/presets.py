"""Named versions of the method: the paper's settings and the released code's.

They part in several places (docs/paper-versus-code.md); a name picks one side of all
of them. A preset is a dictionary of options for `value_and_grad` and `otmdr`.
"""

from typing import Any

# Radii: section 5.1. Noise of standard deviation 0.01: appendix B.1 ("in most of our
# experiments"; Eq. 9 has a variance of rho). The released code's flag for noise is
# parsed and never used.
_RHO = {"cifar10": (0.05, 0.1), "cifar100": (0.1, 0.2)}
_NAMES = ("paper", "released", "released-mode1.1", "released-ensemble")

# Names in the order in which they are listed to users.
PRESETS = ("sam", "asam", *(f"{name}-{data}" for name in _NAMES for data in _RHO))


def preset(name: str, num_particles: int = 1) -> dict[str, Any]:
    """The options of a named version of the method.

    Args:
      name: "paper-cifar10", "paper-cifar100", "released-cifar10",
        "released-cifar100" (mode 1 of the released code, in all its published
        commands), "released-mode1.1-cifar10", "released-mode1.1-cifar100",
        "released-ensemble-cifar10", "released-ensemble-cifar100" (the released code's
        joint variant: mode 1 with :func:`otmdr_jax.ensemble.joint_loss`), "sam" (Foret
        et al., 2021) or "asam" (Kwon et al., 2021).
      num_particles: K. The released code cuts the batch in loader order for K = 1 and
        at random for more. Its mode 1 adds up the K gradients where the paper averages
        them: chain `optax.scale(K)` after the transformation for that.

    Returns:
      A new dictionary of options for :func:`otmdr_jax.value_and_grad` and
      :func:`otmdr_jax.otmdr`.

    Raises:
      ValueError: An unknown name.

    Example:
      >>> import otmdr_jax
      >>> otmdr_jax.preset("paper-cifar10")["rho"]
      (0.05, 0.1)
      >>> otmdr_jax.preset("released-cifar100")["merge"]
      'sum'

    Reference:
      Nguyen et al., 2023, section 5.1, appendix B.1 and the code that they released.
    """
    if name not in PRESETS:
        raise ValueError(
            f"preset must be one of {', '.join(map(repr, PRESETS))}; got {name!r}."
        )
    if name == "sam":
        return {"rho": (0.05,), "split": "shared"}
    if name == "asam":
        return {"rho": (0.5,), "split": "shared", "adaptive": True}
    version, data = name.rsplit("-", 1)
    options = {"rho": _RHO[data], "num_particles": num_particles}
    if version == "paper":
        return {**options, "noise_std": 0.01, "split": "random"}
    single = num_particles == 1
    return {
        **options,
        "noise_std": 0.0,
        "split": "ordered" if single else "random",
        # Mode 1.1 halves the merged direction for one particle only.
        "merge": "mean" if version.endswith("1.1") and single else "sum",
    }
