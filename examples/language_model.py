"""A small transformer language model: AdamW, SAM and OT-MDR with equal steps.

    python examples/language_model.py             # about 4 minutes on 2 CPU cores
    python examples/language_model.py --steps 20  # a glance

The text is the reference manual that comes with Python (`pydoc_data.topics`), line by
line. Lines differ in length, so a mean over tokens is one with weights: a part of the
batch has other numbers of tokens than the whole. `weights=` says which, and the robust
gradient is then of the mean over the tokens of the whole batch, whatever is cut.

Needs Flax alone (`pip install '.[models]'`). Expected: after 300 steps the loss on
other sections is between 2.2 and 2.7 nats per character for each method, 4.85 before;
a network that has hardly begun to overfit is no place where robust training shines.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import otmdr_jax

LENGTH, VOCABULARY, WIDTH, HEADS, LAYERS = 80, 128, 64, 4, 2
PAD = 0  # also what a line begins with


class Block(nnx.Module):
    """Attention to what came before, and a perceptron, each added to its input."""

    def __init__(self, *, rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.wide = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.narrow = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.narrow(nnx.gelu(self.wide(self.norm2(x))))


class LanguageModel(nnx.Module):
    """(B, LENGTH) characters to logits of the next one at each place."""

    def __init__(self, *, rngs):
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.places = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens) + self.places(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.embedding.attend(self.norm(x))


def counted(batch):
    """Which tokens are predicted: all but those that fill a line up."""
    return (batch != PAD).astype(jnp.float32)


def loss_fn(model, batch):
    """The mean over tokens of minus the log-probability of each, in nats."""
    before = jnp.pad(batch[:, :-1], ((0, 0), (1, 0)), constant_values=PAD)
    losses = optax.softmax_cross_entropy_with_integer_labels(model(before), batch)
    weights = counted(batch)
    return jnp.sum(weights * losses) / jnp.sum(weights)


def lines_of_the_manual():
    """Lines as rows of characters, of sections to train on and of others to test."""
    from pydoc_data.topics import topics

    def rows(names):
        lines = [x for name in names for x in topics[name].splitlines() if x.strip()]
        found = np.full((len(lines), LENGTH), PAD, np.uint8)
        for row, line in zip(found, lines, strict=True):
            text = (line[: LENGTH - 1] + "\n").encode("ascii", "replace")
            row[: len(text)] = np.frombuffer(text, np.uint8)
        return found

    names = sorted(topics)
    return rows([n for i, n in enumerate(names) if i % 5]), rows(names[::5])


def train(grad_fn, lines, steps, seed, batch_size=32):
    """The loop. Only `grad_fn` differs between methods."""
    model = LanguageModel(rngs=nnx.Rngs(seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(steps // 20, 1), steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch, key):
        loss, grads = grad_fn(model, batch, key=key)
        optimizer.update(model, grads)
        return loss

    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    began = time.perf_counter()
    for i in range(steps):
        batch = jnp.asarray(lines[rng.integers(0, len(lines), batch_size)])
        loss = step(model, optimizer, batch, jax.random.fold_in(key, i))
        if (i + 1) % 100 == 0:
            rate = (i + 1) / (time.perf_counter() - began)
            print(f"  step {i + 1}: loss {loss:.3f}, {rate:.1f} steps/s", flush=True)
    return model


def test_loss(model, lines):
    """The mean over all tokens of a set."""
    of_batch = nnx.jit(lambda model, batch: (loss_fn(model, batch), counted(batch)))
    total, count = 0.0, 0.0
    for start in range(0, len(lines), 256):
        batch = np.full((256, LENGTH), PAD, np.uint8)  # of one size: compiled once
        part = lines[start : start + 256]
        batch[: len(part)] = part
        loss, weights = of_batch(model, jnp.asarray(batch))
        total += float(loss) * float(weights.sum())
        count += float(weights.sum())
    return total / count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()

    robust = functools.partial(otmdr_jax.nnx.value_and_grad, loss_fn, weights=counted)
    plain = nnx.value_and_grad(loss_fn)
    methods = {
        "AdamW": lambda model, batch, key: plain(model, batch),
        "SAM": robust(rho=0.05, split="shared"),
        "OT-MDR": robust(rho=(0.025, 0.05)),
    }
    lines, others = lines_of_the_manual()
    print(f"{len(lines)} lines to train on, {len(others)} to test")
    found = {}
    for name, grad_fn in methods.items():
        losses = []
        for seed in range(options.seeds):
            print(f"{name}, seed {seed}")
            losses.append(test_loss(train(grad_fn, lines, options.steps, seed), others))
        found[name] = losses
    print(f"{'method':<8} test loss (nats per character), n = {options.seeds}")
    for name, losses in found.items():
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        print(f"{name:<8} {statistics.mean(losses):.4f}{spread}")


if __name__ == "__main__":
    main()
