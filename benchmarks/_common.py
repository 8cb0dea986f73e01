"""What the benchmarks share: the steps, their compilation, their timing."""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from _record import nvidia_smi, processor_name

import otmdr_jax
from otmdr_jax.core.batches import accumulate
from otmdr_jax.experiments import methods

RHO = (0.05, 0.1)
REFERENCE = "SAM (optax.contrib)"


class Step(NamedTuple):
    """A training step and what it costs by its definition.

    Attributes:
      function: (params, opt_state, model_state, batch, key) -> the first three.
      optimizer: Makes the optimizer's state.
      passes: Gradient passes over a whole batch a step.
    """

    function: Callable[..., Any]
    optimizer: Any
    passes: int


def make_steps(model, particles=(), draws=(), climbs=(), **options):
    """SGD, Optax's SAM, ours, and OT-MDR by number of particles and particle map.

    Args:
      model: Of `otmdr_jax.models`.
      particles: Pairs (K, particle map) for OT-MDR beside K = 1.
      draws: Numbers K of particles that are drawn from one gradient.
      climbs: Numbers of ascent steps of the dual form.
      **options: Of `otmdr_jax.value_and_grad`, for our SAM and OT-MDR.

    Returns:
      Name -> `Step`.
    """

    def loss_fn(params, batch, model_state):
        images, labels = batch
        logits, model_state = model.apply(params, model_state, images, train=True)
        return methods.cross_entropy(logits, labels), model_state

    base = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    micro = options.get("microbatch_size")

    def plain(params, batch, model_state):
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        return accumulate(lambda b: gradient(params, b, model_state), batch, micro)

    def with_gradient(grad_fn, passes, keyed=True):
        def step(params, opt_state, model_state, batch, key):
            kwargs = {"key": key} if keyed else {}
            (_, model_state), grads = grad_fn(params, batch, model_state, **kwargs)
            updates, opt_state = base.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, model_state

        return Step(step, base, passes)

    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO[0]))
    theirs = optax.contrib.sam(base, ascent, opaque_mode=True)

    def optax_sam(params, opt_state, model_state, batch, key):
        del key
        (_, new_state), grads = plain(params, batch, model_state)
        updates, opt_state = theirs.update(
            grads,
            opt_state,
            params,
            grad_fn=lambda p, _: plain(p, batch, model_state)[1],
        )
        return optax.apply_updates(params, updates), opt_state, new_state

    def robust(rho=RHO, **own):
        grad_fn = otmdr_jax.value_and_grad(
            loss_fn, rho, has_aux=True, **{**options, **own}
        )
        count = own.get("num_particles", 1)
        return with_gradient(grad_fn, 1 + count if "tilt" in own else 2 * count)

    def dual(count):
        form = otmdr_jax.dual_gradient(
            loss_fn, RHO[0], num_steps=count, has_aux=True, **options
        )

        def step(params, opt_state, model_state, batch, key):
            del key
            own, opt_state = opt_state
            found, own = form.apply(own, params, batch, model_state)
            updates, opt_state = base.update(found.grads, opt_state, params)
            return optax.apply_updates(params, updates), (own, opt_state), found.aux

        both = optax.GradientTransformation(
            lambda params: (form.init(), base.init(params)), base.update
        )
        return Step(step, both, 1 + count)

    steps = {
        "SGD": with_gradient(plain, 1, keyed=False),
        REFERENCE: Step(optax_sam, theirs, 2),
        "SAM": robust(RHO[:1], split="shared"),
        "OT-MDR K=1": robust(),
    }
    for k, how in particles:
        steps[f"OT-MDR K={k} {how}"] = robust(num_particles=k, particle_map=how)
    for k in draws:
        steps[f"draws K={k}"] = robust(
            RHO[:1], sampler="first_order", tilt=0.5, num_particles=k
        )
    for count in climbs:
        steps[f"dual, {count} ascent step{'s' * (count > 1)}"] = dual(count)
    return steps


def make_batch(size, image_size=32):
    images = jax.random.normal(jax.random.key(2), (size, image_size, image_size, 3))
    return images, jnp.arange(size) % 10


def make_arguments(step, model, batch, seed=0):
    """The five arguments of a step's function."""
    params, model_state = model.init(jax.random.key(seed), batch[0])
    opt_state = step.optimizer.init(params)
    return params, opt_state, model_state, batch, jax.random.key(seed + 1)


def compile_step(function, arguments, compiler_options=None):
    """Compiles a step; arguments may be shapes if it is not run.

    Returns:
      `run(times)`, which runs it that often and waits once, at the end, and a dict of
      what the program costs. The state is donated, as in a training loop.
    """
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=(0, 1, 2)).lower(*arguments)
    compiled = lowered.compile(compiler_options=compiler_options)
    seconds = time.perf_counter() - start
    cost = {"compile_seconds": seconds, "peak_mib": peak_mib(compiled)}
    # XLA counts a loop's body once, so a scan's figure is that of one particle.
    cost["gflop"] = (compiled.cost_analysis() or {}).get("flops", float("nan")) / 1e9
    state = list(arguments[:3])

    def run(times=1):
        for _ in range(times):
            state[:] = compiled(*state, *arguments[3:])
        jax.block_until_ready(state)

    return run, cost


def peak_mib(compiled):
    """The compiled program's own account: nothing is run."""
    memory = compiled.memory_analysis()
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    ) / 2**20


def measure(runs, rounds, steps=1, progress=False):
    """Interleaved seconds a step: each once a round.

    Args:
      runs: Name -> `run(times)`.
      rounds: Number of rounds.
      steps: How often a step runs between two looks at the clock.
      progress: Print a line a round.
    """
    times = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm-up
    for turn in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(steps)
            times[name].append((time.perf_counter() - start) / steps)
        if progress:
            print(f"round {turn + 1}/{rounds}", flush=True)
    return times


def summarise(times, reference=REFERENCE, ratio="ratio_to_optax_sam"):
    """Medians: milliseconds, and the ratio to the reference in the same round.

    Args:
      times: What `measure` gave.
      reference: The step that others are compared with.
      ratio: What the ratio is called.
    """
    summary = {}
    for name, mine in times.items():
        summary[name] = {
            "milliseconds": 1e3 * statistics.median(mine),
            "n": len(mine),
        }
        if reference in times:
            pairs = zip(mine, times[reference], strict=False)
            summary[name][ratio] = statistics.median(a / b for a, b in pairs)
    return summary


def environment():
    """Machine, driver, versions and date: the head of every record."""
    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "nvidia_smi": nvidia_smi(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "date": datetime.date.today().isoformat(),
    }
