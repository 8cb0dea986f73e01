"""Methods that train the means and scales of a posterior: SGVB and OT-MDR's BNN."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import optax

from otmdr_jax import bnn
from otmdr_jax.core.checks import check_count, check_word
from otmdr_jax.experiments.methods import training
from otmdr_jax.experiments.methods.base import Run, no_joint_loss
from otmdr_jax.experiments.methods.otmdr import Budgeted, Particles
from otmdr_jax.experiments.methods.point import Point
from otmdr_jax.experiments.methods.sampled import Sampled
from otmdr_jax.experiments.options import (
    NotNegative,
    OnlyWith,
    Positive,
    Radii,
)

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Posterior(Sampled):
    """What methods have whose posterior is trained by its gradients.

    Attributes:
      function: :func:`otmdr_jax.bnn.robust_gradient`, or one with its call.
    """

    function: ClassVar[Any]
    is_posterior = True
    only_with: ClassVar[tuple[OnlyWith, ...]] = (
        OnlyWith("posterior_std", "posterior_init", ("model",)),
    )

    posterior_std: Positive = bnn.SIGMA
    """Standard deviation that every weight starts with: softplus(-5), released code."""
    posterior_init: Literal["model", "released"] = "model"
    """Means that start as the model's own initial weights, or means and scales that are
    drawn as the released code draws them (0.1 and softplus(-5) or so)."""
    prior: Literal["normal", "mixture", "fitted"] = "normal"
    """Prior of the weights: normal, Blundell's scale mixture (1 and e^-6, half each),
    or normals that are fitted to each array (empirical Bayes)."""
    prior_std: Positive = bnn.PRIOR_STD
    """Standard deviation of the normal prior; 0.1 in the OT-MDR authors' code."""
    kl_weight: NotNegative = 1.0
    """Weight of KL / N beside the mean log-likelihood: 1 is the evidence bound, less a
    cold posterior; 5e-6 in the released code."""
    kl_schedule: Literal["constant", "blundell", "warmup"] = "constant"
    """Its course: constant; high in the first batches of an epoch, of the same mean
    (Blundell et al., 2015); or growing from 0 over kl_warmup_epochs."""
    kl_warmup_epochs: NotNegative = 0.0
    """Epochs over which kl_schedule warmup grows."""

    @classmethod
    def make(
        cls,
        model,
        optimizer,
        loss,
        *,
        sigma: float = bnn.SIGMA,
        init: str = "model",
        kl_weight: Any = 1.0,
        num_samples: int = bnn.NUM_SAMPLES,
        mean_only: bool = False,
        sum_particles: bool = False,
        **options,
    ):
        """See :class:`MethodOptions`.

        Args:
          model: The network.
          optimizer: The optimizer of means and scales.
          loss: The mean negative log-likelihood.
          sigma: Standard deviation to start from.
          init: "model" (means are the model's own initial weights) or "released" (means
            and scales drawn as the released code draws them; sigma is not looked at).
          kl_weight: A number, or a schedule of the step.
          num_samples: Samples in a prediction.
          mean_only: Predict with the mean of the posterior instead.
          sum_particles: Add the particles' gradients up.
          **options: Of :func:`otmdr_jax.bnn.robust_gradient` or, for SGVB, of
            :func:`otmdr_jax.bnn.sgvb_gradient`.
        """
        check_word("init", init, ("model", "released"))
        if not mean_only:
            check_count("num_samples", num_samples)
        optimizer = optax.with_extra_args_support(optimizer)
        scheduled = callable(kl_weight)
        times = options.get("num_particles", 1) if sum_particles else 1

        def start(key, params):
            return bnn.init(params, sigma) if init == "model" else bnn.draw(params, key)

        def rule(loss_fn):
            number: Any = 1.0 if scheduled else kl_weight
            first, compute = cls.remembering(
                loss_fn, has_aux=True, kl_weight=number, **options
            )

            def update(state, batch, scaled):
                found, memory = compute(
                    state.memory,
                    state.params,
                    batch,
                    state.model_state,
                    key=jax.random.split(state.key)[1],
                    kl_weight=kl_weight(state.step) if scheduled else None,
                    **scaled,
                )
                grads = found.grads
                if times > 1:
                    grads = jax.tree.map(lambda g: times * g, grads)
                updates, opt_state = optimizer.update(
                    grads, state.opt_state, state.params, value=found.value
                )
                terms = {"likelihood_term": found.nll, "kl": found.kl}
                terms |= cls.logged(memory)
                return training.Update(
                    updates, opt_state, memory, found.aux, found.diagnostics, terms
                )

            def predict(log_probs_fn, state, key):
                return bnn.predict(
                    log_probs_fn,
                    state.params,
                    key=key,
                    num_samples=num_samples,
                    mean_only=mean_only,
                )

            return training.Rule(
                start,
                lambda q: (optimizer.init(q), first()),
                update,
                predict,
                lambda state: state.params,
                cls.share,
            )

        return training.build(model, loss, rule, options.get("axis_name"))

    @classmethod
    def remembering(cls, loss_fn: Any, **options: Any) -> tuple[Any, Any]:
        """() -> a memory, and the gradient: (memory, q, batch, ...) -> (found, memory).

        Args:
          loss_fn: The loss of one model.
          **options: Of the function.
        """
        compute = cls.function(loss_fn, **options)
        return lambda: None, lambda memory, *args, **own: (compute(*args, **own), None)

    def options(self, run: Run) -> dict[str, Any]:
        priors = {
            "normal": bnn.Normal(self.prior_std),
            "mixture": bnn.ScaleMixture(),
            "fitted": bnn.FittedNormal(),
        }
        return {
            **super().options(run),
            **self.of_samples,
            "num_data": run.num_train,
            "sigma": self.posterior_std,
            "init": self.posterior_init,
            "prior": priors[self.prior],
            "kl_weight": self._kl_weight(run),
        }

    def _kl_weight(self, run):
        if self.kl_schedule == "blundell":
            return bnn.blundell(run.steps_per_epoch, self.kl_weight)
        if self.kl_schedule == "constant":
            return self.kl_weight
        steps = round(self.kl_warmup_epochs * run.steps_per_epoch)
        if not 1 <= steps < run.total_steps:
            raise ValueError(
                f"kl_warmup_epochs={self.kl_warmup_epochs} is {steps} steps of a run "
                f"of {run.total_steps}: it must be at least one and less than all."
            )
        return bnn.warmup(steps, self.kl_weight)

    def check(self, config: Any) -> None:
        super().check(config)
        no_joint_loss(self, config, "members with a posterior each are trained with")
        if self.posterior_init == "released" and config.model.init_from:
            raise ValueError(
                "posterior_init='released' draws the means, so that the weights of "
                "init_from would not be where training starts: leave it out."
            )
        if self.prior != "normal" and self.prior_std != bnn.PRIOR_STD:
            raise ValueError(
                f"prior_std={self.prior_std} is that of the normal prior; the "
                f"{self.prior} prior has none."
            )
        if self.kl_schedule != "warmup" and self.kl_warmup_epochs != 0:
            raise ValueError("kl_warmup_epochs needs --kl-schedule warmup.")
        if self.kl_schedule == "warmup" and not self.kl_warmup_epochs:
            raise ValueError(
                "kl_schedule='warmup' needs kl_warmup_epochs, over which the weight "
                "grows."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgvb(Posterior, Point):
    """SGVB (Bayes by backprop): the plain gradient of the evidence bound."""

    name = "sgvb"
    function = staticmethod(bnn.sgvb_gradient)
    gradients = 1.0

    estimator: Literal["weights", "local", "flipout"] = "weights"
    """Noise of sgvb: one sample of the weights a batch, or noise of each example's own
    (local reparameterisation, Flipout)."""

    def options(self, run: Run) -> dict[str, Any]:
        return {**super().options(run), "estimator": self.estimator}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtmdrBnn(Posterior, Particles):
    """OT-MDR over a posterior (section 4.2.3)."""

    name = "otmdr-bnn"
    function = staticmethod(bnn.robust_gradient)

    only_with = (*Posterior.only_with, *Particles.only_with)

    rho: Radii = bnn.PAPER_RHO
    posterior_norm: Literal["per_leaf", "global", "joint"] = "per_leaf"
    """Gradient norm of otmdr-bnn: for each array (the paper), over all means, or over
    means and scales (released code)."""
    sigma_gradient: Literal["center", "center_first", "particle"] = "center"
    """Where otmdr-bnn takes the gradient of scales: at the center (the paper), there
    but on the first part of the batch alone, or at the particle (released code)."""
    weight_noise: Literal["once", "each_step"] = "once"
    """How often a step of otmdr-bnn draws the weights' noise: once (the paper), or at
    each ascent step (released code)."""

    def options(self, run: Run) -> dict[str, Any]:
        return {
            **super().options(run),
            "norm": self.posterior_norm,
            "sigma_gradient": self.sigma_gradient,
            "weight_noise": self.weight_noise,
        }

    def check(self, config: Any) -> None:
        super().check(config)
        ball = self.project or self.sampler == "langevin"
        if ball and self.posterior_norm == "per_leaf":
            raise ValueError(
                "project and sampler='langevin' need one ball of all means: give "
                "posterior_norm='global', which is 'per_leaf' by default."
            )

    @property
    def gradients(self) -> float:
        """Those of the means, and of the scales at the center."""
        count = super().gradients
        if self.sigma_gradient == "center":
            # The first part's gradient at the center is there already.
            count += 1.0 - 1.0 / self.num_parts
        return count


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtmdrDualBnn(Posterior, Budgeted):
    """The dual form over a posterior: draws share the budget of --rho."""

    name = "otmdr-dual-bnn"

    @classmethod
    def remembering(cls, loss_fn, **options):
        return tuple(bnn.dual_gradient(loss_fn, **options))
