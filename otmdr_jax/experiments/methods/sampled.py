"""The common part of methods that predict with samples."""

import dataclasses
from typing import Any, Literal

from otmdr_jax import bnn
from otmdr_jax.experiments.methods.base import MethodOptions
from otmdr_jax.experiments.options import Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled(MethodOptions):
    """The options of methods that predict with samples."""

    num_samples: Count = bnn.NUM_SAMPLES
    """Samples of the posterior in a prediction; 30 in the OT-MDR authors' code. Of swag
    those of its Gaussian; 30 in Maddox et al., 2019. Of mc-dropout those of masks."""
    prediction: Literal["samples", "mean"] = "samples"
    """Predict with samples of the posterior or Gaussian, or with its mean alone; of
    mc-dropout with the network without dropout."""

    @property
    def of_samples(self) -> dict[str, Any]:
        """The two as the options of functions."""
        mean_only = self.prediction == "mean"
        return {"num_samples": self.num_samples, "mean_only": mean_only}

    def check(self, config: Any) -> None:
        super().check(config)
        if self.prediction == "mean" and self.num_samples != bnn.NUM_SAMPLES:
            raise ValueError(
                f"num_samples={self.num_samples} with prediction='mean', which has no "
                "samples: leave one of them out."
            )
