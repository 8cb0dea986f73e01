"""Sets and solutions spread over devices, on both kinds of axes: as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

from otmdr_jax import data, landscape
from otmdr_jax.metrics import streaming
from tests.marks import slow_but

ROWS = PartitionSpec("data")


@pytest.fixture(
    params=slow_but([AxisType.Explicit], [AxisType.Explicit, AxisType.Auto]), ids=str
)
def place(request):
    """Places arrays on four devices."""
    mesh = jax.make_mesh(
        (4,), ("data",), devices=jax.devices()[:4], axis_types=(request.param,)
    )

    def put(values, spec=ROWS):
        return jax.device_put(values, NamedSharding(mesh, spec))

    return put


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 255, (8, 6, 6, 3))
    return pixels.astype(np.uint8)


@pytest.mark.slow
def test_images_are_augmented_where_they_are(place, images, key):
    want = data.augment(key, images, ("crop", "flip"))
    got = data.augment(key, place(images), ("crop", "flip"))
    assert_array_equal(got, want)
    assert got.sharding.spec[0] == "data"


def test_batches_are_gathered(place, images):
    labels, order = np.arange(8), jnp.array([5, 0, 3, 7, 1, 2, 6, 4])
    split = data.Split(place(images), place(labels))
    got = jax.jit(data.take, static_argnums=3)(split, order, 1, 4)
    assert_array_equal(got.labels, [1, 2, 6, 4])
    assert_array_equal(got.images, images[[1, 2, 6, 4]])


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 3])
def test_metrics_of_a_batch(place, samples):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), (samples, 8)).astype(np.float32)
    labels = rng.integers(0, 4, 8)
    spread = place(probs, PartitionSpec(None, "data")), place(labels)
    one, other = streaming.init(4), place(streaming.init(4), PartitionSpec())
    for _ in range(2):  # on a state that has been through one, too
        one = streaming.update(one, probs, labels)
        other = streaming.update(other, *spread)
    want, got = streaming.compute(one), streaming.compute(other)
    for name, value in want.items():
        assert_allclose(got[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_batch_whose_labels_alone_are_spread(place):
    probs, labels = np.full((8, 2), 0.5, np.float32), np.arange(8) % 2
    state = streaming.update(
        streaming.init(2), place(probs, PartitionSpec()), place(labels)
    )
    assert streaming.compute(state)["accuracy"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("spec", [ROWS, PartitionSpec(None, "data")], ids=str)
def test_a_plane_through_solutions(place, spec):
    solutions = np.random.default_rng(0).normal(size=(3, 8, 4)).astype(np.float32)
    want = landscape.through(*solutions)
    got = landscape.through(*(place(w, spec) for w in solutions))
    assert_allclose(got.points, want.points, rtol=1e-5)
    for d, e in zip(got.directions, want.directions, strict=True):
        assert_allclose(d, e, rtol=1e-4, atol=1e-6)
        assert d.sharding.is_equivalent_to(place(d, spec).sharding, 2)
