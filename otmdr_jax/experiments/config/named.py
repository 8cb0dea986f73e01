"""Named configurations: the papers' experiments and their released commands."""

from typing import Any

from otmdr_jax import bnn
from otmdr_jax.baselines import presets as baselines
from otmdr_jax.core import presets
from otmdr_jax.experiments.config.options import TrainConfig
from otmdr_jax.experiments.options import hint


def preset(name: str, num_particles: int = 1) -> TrainConfig:
    """A named configuration.

    Args:
      name: "demo" (digits), or a paper's experiment: "paper-cifar10",
        "paper-cifar100", "released-cifar10", "released-cifar100",
        "released-mode1.1-cifar10", "released-mode1.1-cifar100",
        "released-ensemble-cifar10", "released-ensemble-cifar100" (five ResNet-10),
        "sam-cifar10", "sam-cifar100", "bsam-cifar10", "bsam-cifar100" (the released
        commands of bSAM: ResNet-18); of Bayesian ResNet-10 (Table 4; give
        `model="resnet_18"` for the other column) "paper-bnn-cifar10",
        "released-bnn-cifar10", "sgvb-cifar10", and the same with "cifar100"; of its
        Table 3 (ResNet-10) "deep-ensemble-cifar10", "sam-ensemble-cifar10",
        "otmdr-ensemble-cifar10", "snapshot-cifar10", "fge-cifar10", "swa-cifar10",
        "swag-cifar10", "dst-cifar10", "edst-cifar10", and the same with "cifar100".
      num_particles: K, for those of OT-MDR: see :func:`otmdr_jax.preset`.

    Returns:
      A :class:`TrainConfig`.

    Raises:
      ValueError: An unknown name.

    Example:
      >>> from otmdr_jax import config
      >>> config.preset("released-cifar10").model.name  # what its "WRN-28-10" really is
      'wide_resnet_34_10'
      >>> config.preset("paper-cifar100").method.rho
      (0.1, 0.2)

    Reference: Nguyen et al., 2023, appendix B.1, and their released code.
    """
    if name not in PRESETS:
        known = ", ".join(map(repr, PRESETS))
        near = hint(name, PRESETS)
        raise ValueError(f"preset must be one of {known}; got {name!r}.{near}")
    if name == "demo":
        # One device: the batch need not suit the machine; there is little to divide.
        return TrainConfig(
            label_noise=0.2, train_examples=720, epochs=28, eval_every=2, mesh="data=1"
        )
    version, data = name.rsplit("-", 1)
    if version in _BAYESIAN:
        return _bayesian_preset(version, data, num_particles)
    if version == "bsam":
        return _bsam_preset(data)
    if version in baselines.PRESETS:
        return _baseline_preset(version, data, num_particles)
    common: dict[str, Any] = dict(data=data, epochs=200, model="wide_resnet_28_10")
    if version == "sam":
        # The radii of Foret et al., which the paper takes over (section 5.1).
        rho = (0.05,) if data == "cifar10" else (0.1,)
        return TrainConfig(method="sam", rho=rho, **common)
    options = presets.preset(name, num_particles)
    if version.startswith("released"):
        common |= dict(
            model="wide_resnet_34_10", label_smoothing=0.1, smoothing="others"
        )
        common["sum_particles"] = version in ("released", "released-ensemble")
    if version == "released-ensemble":
        # The first of the paper's Table 3, on one loss of the mean probability.
        common |= dict(model="resnet_10", members="5", ensemble="joint")
    return TrainConfig(method="otmdr", **common, **options)


def _bsam_preset(data: str) -> TrainConfig:
    """What the README of Moellenhoff & Khan's code runs, and how it evaluates that."""
    return TrainConfig(
        data=data,
        method="bsam",
        model="resnet_18",
        epochs=180,
        batch_size=200,
        num_subbatches=8,
        rho=(0.01,),
        learning_rate=0.5,
        warmup_epochs=5,
        # A prior precision of 10, divided by four times the training set.
        weight_decay=10 / 200_000,
        data_factor=4.0,
        num_samples=32,
    )


def _bayesian_preset(version: str, data: str, num_particles: int) -> TrainConfig:
    """Appendix B.3: Adam at 1e-3, a plateau schedule, 100 epochs, no weight decay."""
    common: dict[str, Any] = dict(
        data=data,
        model="resnet_10",
        epochs=100,
        optimizer="adam",
        learning_rate=1e-3,
        schedule="plateau",
        plateau_patience=11,  # PyTorch's default, which it calls 10
        weight_decay=0.0,
        # Adam's 1e-8 beside the gradient of the sum over 50,000 examples.
        adam_eps=1e-8 / 50_000,
    )
    options = bnn.preset(
        "released" if "released" in version else "paper", num_particles
    )
    prior = {name: options[name] for name in ("prior_std", "kl_weight")}
    if version == "sgvb":
        return TrainConfig(method="sgvb", **common, **prior)
    if version == "released-bnn":
        common |= dict(
            batch_size=1024, activation="softplus", posterior_init="released"
        )
        common["sum_particles"] = num_particles > 1
    options["posterior_norm"] = options.pop("norm")
    return TrainConfig(method="otmdr-bnn", **common, **options)


def _baseline_preset(version: str, data: str, num_particles: int) -> TrainConfig:
    """A competitor's settings, with the paper's radii where there are any."""
    options = baselines.preset(version)
    if version == "sam-ensemble":
        options["rho"] = (0.05,) if data == "cifar10" else (0.1,)
    elif version == "otmdr-ensemble":
        options |= presets.preset(f"paper-{data}", num_particles)
    return TrainConfig(data=data, **options)


_BAYESIAN = ("paper-bnn", "released-bnn", "sgvb")

PRESETS = (
    "demo",
    *(name for name in presets.PRESETS if "-" in name),
    "sam-cifar10",
    "sam-cifar100",
    "bsam-cifar10",
    "bsam-cifar100",
    *(
        f"{version}-{data}"
        for version in (*_BAYESIAN, *baselines.PRESETS)
        for data in ("cifar10", "cifar100")
    ),
)
