"""The options of gradients: one definition, of which signatures and docstrings come.

An option is a field of a TypedDict: its type, its default, what it does. A public
function names the set that it honours, `**options: Unpack[SamOptions]`;
:func:`otmdr_jax.core.signatures.with_options` shows each of them in its signature and
docstring and refuses whatever else is given. :class:`Options` holds all of the robust
gradient's, checked.
"""

import dataclasses
import math
from typing import Annotated, Any, Literal, TypedDict, get_args

import jax

from otmdr_jax.core.checks import check_count, check_number, is_known
from otmdr_jax.core.signatures import check_words, fields_of

Map = Literal["auto", "vmap", "unroll", "scan"]
PARTICLE_MAPS = MEMBER_MAPS = get_args(Map)


class ParticleOptions(TypedDict, total=False):
    """How many particles climb, on which parts of the batch and along what."""

    num_particles: Annotated[
        int,
        1,
        """K. Cost in gradients of single examples: 2 K |B| for random parts. Otherwise
        the first gradient is that of all particles, and without noise all particles
        are one, so K is 1.""",
    ]
    noise_std: Annotated[
        jax.typing.ArrayLike,
        0.0,
        r"""Standard deviation of :math:`\epsilon` per coordinate, after each ascent
        step. Without noise by default, as in the released code; 0.01 in the paper's
        appendix B.1.""",
    ]
    split: Annotated[
        Literal["random", "ordered", "shared"],
        "random",
        """"random" (each particle cuts B at random into S parts, as the paper),
        "ordered" (consecutive parts, as the released code for K = 1), or "shared"
        (every step sees all of B, as SAM). Sizes differ by at most one.""",
    ]
    merge: Annotated[
        Literal[None, "sum", "mean"],
        None,
        """None (the paper), or the released code's later directions: "sum" of the
        gradients so far, or their "mean", over the norm of the last one. With one
        radius all three are the gradient itself.""",
    ]
    particle_axis_name: Annotated[
        Any,
        None,
        """Name of a device axis that the K particles are spread over, K / devices on
        each; the same K particles as on one device. Averaged together with
        `axis_name`, in one reduction at the end.""",
    ]


class SamplerChoice(TypedDict, total=False):
    """What makes the particles."""

    sampler: Annotated[
        Literal["ascent", "first_order", "langevin"],
        "ascent",
        """"ascent" (the steps of Eq. 9), "first_order" (draws of the worst distribution
        of Theorem 4.2, exact for the loss linearised at the center: one gradient of all
        of B serves all particles), or "langevin" (a Markov chain for the loss itself).
        See :func:`otmdr_jax.sample_particles`.""",
    ]


class SamplerOptions(TypedDict, total=False):
    """How a sampler draws, and how an ascent is kept in its ball."""

    inverse_temperature: Annotated[
        jax.typing.ArrayLike | None,
        None,
        r""":math:`\lambda` of a sampler, per unit of the loss: 0 is uniform in the
        ball, infinity is SAM. What a value does depends on the number of weights; what
        a `tilt` does, does not.""",
    ]
    tilt: Annotated[
        jax.typing.ArrayLike | None,
        None,
        r"""In place of :math:`\lambda`: the wanted mean of the particle's coordinate
        along the gradient, in units of the radius, for the linearised loss. 0 to 1.""",
    ]
    num_steps: Annotated[
        int | None,
        None,
        """Steps of "langevin", which needs it: with `split="shared"` each is MALA's, on
        all of B, and takes a gradient of it; otherwise each sees its own part of B, is
        held in the ball and never rejected.""",
    ]
    step_size: Annotated[
        jax.typing.ArrayLike | None,
        None,
        r"""Standard deviation of a step's noise per coordinate, in units of the radius,
        for "langevin". By default :math:`1/(n + \kappa)` for MALA, with n weights and
        :math:`\kappa = \lambda \rho \|g\|`, and :math:`\sqrt{2 / (S (n + 2))}` for S
        parts.""",
    ]
    project: Annotated[
        bool,
        False,
        """Whether each step of "ascent" is taken back to the ball around the center
        whose radius is the largest of the radii: the ball of the theorem, which two
        steps and noise leave.""",
    ]


class BallOptions(TypedDict, total=False):
    """How far the leaves of the weights move."""

    norm: Annotated[
        Literal["global", "per_leaf", "none"],
        "global",
        r""""global" (one norm over all parameters), "per_leaf", or "none": steps of
        :math:`\rho_s` times the gradient (Andriushchenko & Flammarion, 2022).""",
    ]
    mask: Annotated[
        Any,
        None,
        """A pytree of bools, or a function of the parameters to one: True where a leaf
        may be perturbed. Other leaves do not count in the norm, but are trained.""",
    ]


class ShapeOptions(TypedDict, total=False):
    """What shape the ball has that they move in: one of these at most."""

    adaptive: Annotated[
        bool, False, "Scale element-wise by the absolute weights (ASAM)."
    ]
    fisher: Annotated[
        jax.typing.ArrayLike,
        0.0,
        r""":math:`\eta` of Fisher SAM: the ball is an ellipsoid, see
        :func:`otmdr_jax.baselines.fisher_sam`. 0 is the ball.""",
    ]


class PartOptions(TypedDict, total=False):
    """Which parts of the batch are perturbed on their own (m-sharpness)."""

    num_subbatches: Annotated[
        int,
        1,
        """Consecutive parts of one size that the batch is cut into, each perturbed on
        its own; the results are averaged. A multiple of the devices of `axis_name`, on
        which `sync_perturbation` then plays no part.""",
    ]
    sync_perturbation: Annotated[
        bool,
        True,
        """True makes every ascent direction the one of all devices of `axis_name`;
        False, which needs that axis, lets each device climb on its own part of the
        batch, with a single all-reduce a step.""",
    ]
    particle_map: Annotated[
        Map,
        "auto",
        """How particles, and the parts of `num_subbatches`, are mapped: "unroll",
        "scan", "vmap", or "auto". A matter of speed and memory alone, and of none with
        one particle and one part; see `docs/performance.md`.""",
    ]


class PassOptions(TypedDict, total=False):
    """How a gradient of the loss is taken."""

    has_aux: Annotated[
        bool,
        False,
        """Whether `loss_fn` returns (loss, aux). Leaves of aux whose shape follows the
        batch, as logits do, come back for all examples of this device in their order.
        Other floating leaves are averaged over parts of the batch, particles and
        devices; integers and bools, as counts, are those of the first part alone, and
        of each device its own: return a mean in their place.""",
    ]
    axis_name: Annotated[
        Any,
        None,
        """Name of the device axis inside `jax.pmap` or `jax.shard_map`; values, aux and
        gradients come back averaged over it.""",
    ]
    microbatch_size: Annotated[
        int | None,
        None,
        """Examples that a pass differentiates at a time; None for all. The objective
        stays that of the whole batch: gradients are accumulated inside each pass,
        before a norm is taken. With `axis_name` it counts a device's examples.
        BatchNorm sees micro-batches; its statistics are averaged over them.""",
    ]


class LossOptions(PassOptions, total=False):
    """Of a gradient of any loss."""

    weights: Annotated[
        Any,
        None,
        """For a loss that is normalised by weights, as of masked tokens: a function of
        the batch to them, `lambda batch: batch["mask"]`, of shape (B,) or (B, ...).
        Parts of the batch then count by their weights, and one without any counts
        nothing, so that their mean is the loss of the whole. Aux is averaged over
        parts by these weights too. An ascent step is along the loss of its own part.
        None for a mean over examples.""",
    ]


class RobustOptions(
    ParticleOptions,
    SamplerChoice,
    SamplerOptions,
    BallOptions,
    ShapeOptions,
    PartOptions,
    LossOptions,
    total=False,
):
    """Of the robust gradient: all there are."""


class SamOptions(BallOptions, ShapeOptions, PartOptions, LossOptions, total=False):
    """Of a climb on the whole batch without noise: one particle."""


class FixedShapeOptions(BallOptions, PartOptions, LossOptions, total=False):
    """The same in a ball whose shape is the function's own."""


class PartedOptions(PartOptions, LossOptions, total=False):
    """Of a climb that is the function's own, on parts of the batch."""


_FIELDS = fields_of(RobustOptions)
# Those of the sampler's options that do something.
_OF_SAMPLER = {
    "ascent": ("project",),
    "first_order": ("inverse_temperature", "tilt"),
    "langevin": ("inverse_temperature", "tilt", "num_steps", "step_size"),
}
_Fields: Any = dataclasses.make_dataclass(
    "_Fields",
    [(name, kind, default) for name, (kind, default, _) in _FIELDS.items()],
    frozen=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(_Fields):
    """The fields of :class:`RobustOptions`, checked once, when a gradient is built.

    Construction raises a ValueError or a TypeError for anything that cannot work.

    Attributes:
      watched: Whether anybody gets to see the diagnostics; no option of users.
    """

    watched: bool = True

    def __post_init__(self):
        """Checks every field, then what goes together."""
        check_words(RobustOptions, vars(self))
        for name, (kind, _, _) in _FIELDS.items():
            value = getattr(self, name)
            if kind is bool and not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}.")
            elif kind is int or (kind == int | None and value is not None):
                check_count(name, value)
            elif kind == jax.typing.ArrayLike or (
                kind == jax.typing.ArrayLike | None and value is not None
            ):
                check_number(name, value, infinite=name == "inverse_temperature")
        self._check_sampler()
        if self.adaptive and self.curved:
            raise ValueError(
                f"adaptive=True and fisher={self.fisher!r} are two shapes of the ball: "
                "use one of them."
            )
        if self.weights is not None and not callable(self.weights):
            raise TypeError(
                "weights must be a function of the batch to the weights of its "
                f'examples, as lambda batch: batch["mask"], got {self.weights!r}.'
            )
        if self.axis_name is None and not self.sync_perturbation:
            raise ValueError(
                "sync_perturbation=False lets each device of axis_name climb on its "
                "own, but axis_name is None: name the axis, or use num_subbatches for "
                "parts of the batch that climb on their own anywhere."
            )

    def _check_sampler(self):
        """What the options of a sampler, and those that it has no use for, must be."""
        sampler = self.sampler
        for name in fields_of(SamplerOptions):
            value = getattr(self, name)
            takers = [taker for taker, names in _OF_SAMPLER.items() if name in names]
            if value is not None and value is not False and sampler not in takers:
                raise ValueError(
                    f"{name} does nothing with sampler={sampler!r}: it belongs to "
                    f"{' and '.join(map(repr, takers))}."
                )
        shaped = self.adaptive or self.curved or self.norm != "global"
        if sampler == "ascent":
            if self.project and shaped:
                raise ValueError(
                    "project=True needs a ball, and one radius for all weights: leave "
                    "adaptive, fisher and norm out, or project."
                )
            return
        given = self.inverse_temperature, self.tilt
        if (given[0] is None) == (given[1] is None):
            raise ValueError(
                f"sampler={sampler!r} needs either inverse_temperature (0: uniform in "
                "the ball, infinity: SAM) or tilt (the same from 0 to 1); got "
                f"inverse_temperature={given[0]!r}, tilt={given[1]!r}."
            )
        if is_known(self.tilt) and self.tilt > 1:
            raise ValueError(f"tilt must be from 0 to 1, got {self.tilt!r}.")
        if self.noisy or self.merge is not None:
            raise ValueError(
                f"sampler={sampler!r} takes no steps of ascent, whose noise_std and "
                "merge are: leave them out."
            )
        if sampler == "langevin":
            if self.num_steps is None:
                raise ValueError('sampler="langevin" needs num_steps, the steps taken.')
            limits = zip(given, (math.inf, 1), strict=True)
            if shaped or any(is_known(x) and x == limit for x, limit in limits):
                raise ValueError(
                    'sampler="langevin" needs a ball of all weights (leave adaptive, '
                    "fisher and norm out) and a finite inverse_temperature, or a tilt "
                    'below 1: for the rest use sampler="first_order".'
                )
        elif self.norm == "none" or self.split == "ordered":
            raise ValueError(
                'sampler="first_order" draws in a ball, from one gradient of all of '
                'the batch: norm="none" has no ball, split="ordered" does nothing.'
            )
        else:
            object.__setattr__(self, "split", "shared")

    def num_parts(self, num_radii: int) -> int:
        """How many parts of the batch a particle sees before the last pass."""
        if self.sampler == "ascent":
            return num_radii
        if self.sampler == "first_order" or self.split == "shared":
            return 1
        assert self.num_steps is not None  # it has been checked
        return self.num_steps

    @property
    def noisy(self) -> bool:
        """Whether ascent steps add noise (a traced noise_std counts as noise)."""
        return isinstance(self.noise_std, jax.core.Tracer) or bool(self.noise_std != 0)

    @property
    def curved(self) -> bool:
        """Whether the ball has the shape of a Fisher information."""
        return isinstance(self.fisher, jax.core.Tracer) or bool(self.fisher != 0)

    @property
    def cuts(self) -> bool:
        """Whether the batch is cut on its device, along the axis of the examples."""
        whole = self.microbatch_size is None and self.num_subbatches == 1
        return self.split != "shared" or not whole

    @property
    def random(self) -> bool:
        """Whether a PRNG key is needed."""
        return self.noisy or self.split == "random" or self.sampler != "ascent"
