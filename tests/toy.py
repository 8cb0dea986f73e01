"""Toy losses whose every quantity has a closed form or a short NumPy program."""

import jax.numpy as jnp
import numpy as np


def quadratic(w, batch):
    """0.5 w'Aw - b'w with A diagonal; the batch plays no part but for its mean."""
    a = jnp.array([1.0, 3.0, 10.0])
    return 0.5 * jnp.sum(a * w**2) + 0.0 * jnp.mean(batch)


def regression(params, batch):
    """Least squares of a linear model with a bias."""
    residual = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.mean(residual**2)


def regression_problem(seed=0, batch=12, dim=4, dtype=np.float32):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=dim).astype(dtype), "b": np.asarray(0.3, dtype)}
    data = {
        "x": rng.normal(size=(batch, dim)).astype(dtype),
        "y": rng.normal(size=batch).astype(dtype),
    }
    return params, data


def regression_gradient(w, b, x, y):
    """The gradient of `regression`, in NumPy."""
    residual = x @ w + b - y
    return 2 * x.T @ residual / len(y), 2 * residual.mean()


def climb(w, b, parts, radii):
    """Eq. 9 for `regression`, in NumPy float64: one global norm, no noise."""
    for (x, y), rho in zip(parts, radii, strict=True):
        gw, gb = regression_gradient(w, b, x, y)
        length = np.sqrt(np.sum(gw**2) + gb**2)
        w, b = w + rho * gw / length, b + rho * gb / length
    return w, b
