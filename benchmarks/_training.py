"""Training on CIFAR-10 by SGD, SAM and OT-MDR, in as many epochs as the time allows.

The recipe is that of fast runs of residual networks (D. Page, "How to train your
ResNet", 2018): a learning rate that rises and falls linearly, Nesterov momentum, weight
decay, smoothed labels, random crops and flips. The set lives on the device, and a step
is one program: gather, augment, normalise, differentiate, update.

All methods have the same epochs. Steps are timed first; the epochs that fit are chosen
then, at most `MAX_EPOCHS`. For ResNet-18 (1.1 GFLOP an image forward, 3.3 a gradient)
an epoch of all three takes five gradients of every image, 0.84 PFLOP: 4 seconds at 200
TFLOP/s, of which 30 fit into two minutes. These recipes reach 94 to 95 % so, on images
as they were published: a set of JPEG images has lost detail, and accuracy with it.
"""

import functools
import io
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _record import markdown
from _session import Skipped, compile_all

from otmdr_jax import data, metrics, models
from otmdr_jax.experiments import methods

METHODS = {
    "SGD": ("sgd", {}),
    "SAM": ("sam", {"rho": 0.05}),
    "OT-MDR K=1": ("otmdr", {"rho": (0.05, 0.1)}),
}
MAX_EPOCHS = 30
# 0.4 for a batch of 512, in proportion to the batch; reached after a fifth of the run.
PEAK_RATE, RATE_BATCH, WARM_UP = 0.4, 512, 0.2
MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING = 0.9, 5e-4, 0.1
TEST_BATCH = 1000


def read(file):
    """The set in a file: JPEG scans with a common header, or what `data.load` reads."""
    with zipfile.ZipFile(file) as members:
        encoded = "scans.npy" in members.namelist()
    if not encoded:
        return data.load(file)
    from PIL import Image

    with np.load(file) as arrays:
        header, scans = arrays["header"].tobytes(), arrays["scans"].tobytes()
        offsets, labels, is_test = (
            arrays[name] for name in ("offsets", "labels", "is_test")
        )
    images = np.empty((len(labels), 32, 32, 3), np.uint8)
    for i in range(len(labels)):
        jpeg = header + scans[offsets[i] : offsets[i + 1]]
        with Image.open(io.BytesIO(jpeg)) as image:
            images[i] = image.convert("RGB")
    train, test = ((images[rows], labels[rows]) for rows in (~is_test, is_test))
    return data.from_arrays(train, test, 10, "cifar10", augment=("crop", "flip"))


@optax.inject_hyperparams
def optimizer(learning_rate):
    """Its rate is a part of its state: epochs are chosen after compilation."""
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.sgd(learning_rate, momentum=MOMENTUM, nesterov=True),
    )


def rates(steps, room, batch_size):
    """The learning rates of a run, filled up with zeros to an array of fixed size."""
    peak = PEAK_RATE * batch_size / RATE_BATCH
    top = max(1, round(WARM_UP * steps))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(peak / top, peak, top),
            optax.linear_schedule(peak, 0.0, steps - top),
        ],
        [top],
    )
    return jnp.zeros(room).at[:steps].set(jax.vmap(schedule)(jnp.arange(steps)))


def programs(method, dataset, batch_size):
    """The step of a run, and its predictions.

    The step is (state, (images, labels), order of the epoch, rates) -> (state, loss);
    predictions are (state, images) -> log-probabilities.
    """
    steps_per_epoch = dataset.train.num_examples // batch_size
    prepare = functools.partial(data.normalise, mean=dataset.mean, std=dataset.std)

    def step(state, examples, order, rates):
        key, own = jax.random.split(state.key)
        batch = data.take(
            data.Split(*examples), order, state.step % steps_per_epoch, batch_size
        )
        images = data.augment(own, batch.images, dataset.augment)
        hyperparams = {"learning_rate": rates[state.step]}
        opt_state = state.opt_state._replace(hyperparams=hyperparams)
        state = state._replace(key=key, opt_state=opt_state)
        state, seen = method.step(state, (prepare(images), batch.labels))
        return state, seen["loss"]

    def predict(state, images):
        return method.predict(state, prepare(images))

    return step, predict


def compile_method(model, dataset, examples, batch_size, name):
    """A method's way to a first state, and its two programs, compiled."""
    kind, options = METHODS[name]
    method = methods.create(
        kind, model, optimizer(0.0), label_smoothing=LABEL_SMOOTHING, **options
    )
    example = jnp.zeros((1, *dataset.image_shape))
    init = functools.partial(method.init, example_images=example)
    step, predict = programs(method, dataset, batch_size)
    start = time.perf_counter()
    state = init(jax.random.key(0))
    order = jnp.arange(dataset.train.num_examples, dtype=jnp.int32)
    step = (
        jax.jit(step, donate_argnums=0)
        .lower(state, examples, order, no_rates(dataset, batch_size))
        .compile()
    )
    size = min(TEST_BATCH, dataset.test.num_examples)
    some = jax.ShapeDtypeStruct((size, *dataset.image_shape), jnp.uint8)
    predict = jax.jit(predict).lower(state, some).compile()
    seconds = time.perf_counter() - start
    return (init, step, predict), {"compile_seconds": seconds}


def no_rates(dataset, batch_size):
    return jnp.zeros(MAX_EPOCHS * (dataset.train.num_examples // batch_size))


def seconds_a_step(ready, examples, order, still, steps):
    """Seconds of a step that is dispatched without waiting, at a rate of 0."""
    init, step, _ = ready
    state = init(jax.random.key(0))
    for count in (3, steps):
        start = time.perf_counter()
        for _ in range(count):
            state, _ = step(state, examples, order, still)
        jax.block_until_ready(state)
    return (time.perf_counter() - start) / steps


def train(ready, dataset, examples, epochs, batch_size):
    """One run, and what its predictions on the test set are worth."""
    init, step, predict = ready
    steps_per_epoch = dataset.train.num_examples // batch_size
    room = MAX_EPOCHS * steps_per_epoch
    own_rates = rates(epochs * steps_per_epoch, room, batch_size)
    draw = jax.jit(data.epoch_order, static_argnums=1)
    keys = jax.random.split(jax.random.key(1), epochs)
    state = jax.block_until_ready(init(jax.random.key(0)))
    start = time.perf_counter()
    losses = []
    for key in keys:
        order = draw(key, dataset.train.num_examples)
        for _ in range(steps_per_epoch):
            state, loss = step(state, examples, order, own_rates)
        losses.append(loss)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - start
    log_probs = []
    size = min(TEST_BATCH, dataset.test.num_examples)
    for images, _, mask in data.eval_batches(dataset.test, size):
        log_probs.append(np.asarray(predict(state, images))[0, mask])
    values = metrics.evaluate(np.concatenate(log_probs), dataset.test.labels)
    return {
        **values,
        "epochs": epochs,
        "seconds": seconds,
        "images_per_second": epochs * steps_per_epoch * batch_size / seconds,
        "skipped_steps": int(state.skipped),
        "last_loss_of_epochs": [round(float(x), 4) for x in losses],
    }


def train_all(session, dataset, network, dtype, batch_size, seconds):
    """Fills record["training"], in about `seconds` with compilation.

    Args:
      session: The session.
      dataset: Of `read`.
      network: Its name.
      dtype: Of its convolutions and activations.
      batch_size: The batch size.
      seconds: For compilation, timing, training and evaluation of all methods.
    """
    start = time.perf_counter()
    model = models.create(network, dataset.num_classes, dtype=jnp.dtype(dtype))
    examples = tuple(jax.device_put(tuple(dataset.train)))
    record = {
        "network": network,
        "dtype": dtype,
        "batch_size": batch_size,
        "examples": dataset.train.num_examples,
        "results": {},
    }
    session.record["training"] = record
    ready = compile_all(
        session,
        "training",
        {
            name: (
                0,
                functools.partial(
                    compile_method, model, dataset, examples, batch_size, name
                ),
            )
            for name in METHODS
        },
    )
    order = jnp.arange(dataset.train.num_examples, dtype=jnp.int32)
    still, count = no_rates(dataset, batch_size), 2 if session.options.smoke else 20
    of_step = {}
    for name, (own, _) in ready.items():
        found = session.attempt(
            f"training: time of {name}",
            0,
            seconds_a_step,
            *(own, examples, order, still, count),
        )
        if found:
            of_step[name] = found
    steps_per_epoch = dataset.train.num_examples // batch_size
    epoch = steps_per_epoch * sum(of_step.values())
    # A twentieth for what a step's time does not hold: orders, evaluation.
    left = min(session.left() - 5, seconds - (time.perf_counter() - start))
    epochs = min(MAX_EPOCHS, int(0.95 * left / max(epoch, 1e-9)))
    record |= {
        "seconds_of_an_epoch_of_all": epoch,
        "seconds_left_for_epochs": left,
        "epochs": epochs,
    }
    session.say(
        f"training: an epoch of all takes {epoch:.2f} s, {left:.0f} s are left: "
        f"{epochs} epochs"
    )
    if epochs < 1:
        raise Skipped(f"an epoch of {epoch:.0f} s does not fit")
    for name in of_step:
        own, cost = ready[name]
        done = session.attempt(
            f"training: {name}",
            0,
            train,
            *(own, dataset, examples, epochs, batch_size),
        )
        if done:
            record["results"][name] = {
                **done,
                **cost,
                "milliseconds_a_step": 1e3 * of_step[name],
            }
            session.say(f"training: {name}: accuracy {done['accuracy']:.4f}")
            session.save()
    show(record)


def show(record):
    columns = {
        "accuracy": ("accuracy", ".2%"),
        "NLL": ("nll", ".4f"),
        "ECE": ("ece", ".4f"),
        "epochs": ("epochs", "d"),
        "seconds": ("seconds", ".1f"),
        "images/s": ("images_per_second", ".0f"),
    }
    rows = [
        [name, *(format(values[key], spec) for key, spec in columns.values())]
        for name, values in record["results"].items()
    ]
    print(
        f"\n{record['network']} on {record['examples']} images\n"
        f"{markdown(['method', *columns], rows)}\n",
        flush=True,
    )
