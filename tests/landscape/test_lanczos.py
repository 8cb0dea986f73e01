"""Leading eigenpairs against the spectra that matrices were made of, and NumPy's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otmdr_jax.landscape import lanczos
from tests.marks import slow_but

NORMAL = np.random.default_rng(0).normal(size=2000)
SPECTRA = {
    "four of each": np.repeat(np.arange(1.0, 9.0), 8),
    "one of each, from zero": np.arange(65.0),
    "negative, from zero": -np.arange(65.0),
    "all equal": np.ones(300),
    "all zero": np.zeros(300),
    "two values": np.repeat([2.0, -1.0], 100),
    "few above zeros": np.concatenate([[5.0, 5.0, 5.0, 1.0], np.zeros(996)]),
    "indefinite": NORMAL[:500],
    "clustered": np.concatenate([1 + 1e-4 * NORMAL[:300], NORMAL[300:] / 10]),
    "crowded near zero": np.linspace(0, 1, 300) ** 2,
    "crowded at the top": np.linspace(0, 1, 500) ** 0.5,
    "six of each": np.repeat(NORMAL[:64] ** 2 + 0.1, 6),
    "both signs": np.concatenate([[4.0, -3.0] * 3, NORMAL[:500] / 3]),
    "small": np.arange(-20.0, 23.0),
    "tiny": 1e-30 * np.repeat(np.arange(1.0, 21.0), 5),
    "huge": 1e30 * np.repeat(np.arange(1.0, 21.0), 5),
}


def diagonal(spectrum, dtype=np.float32, seed=0):
    """The spectrum in a random order, and the product with that diagonal matrix."""
    values = np.random.default_rng(seed).permutation(spectrum).astype(dtype)
    return lambda v: values * v


def leading_of(spectrum, k, which):
    spectrum = np.asarray(spectrum)
    return spectrum[np.argsort(lanczos.ORDERS[which](spectrum), kind="stable")[:k]]


class Counted:
    """A product that counts its calls."""

    def __init__(self, times):
        self.times, self.calls = times, 0

    def __call__(self, vector):
        self.calls += 1
        return self.times(vector)


def assert_found(found, spectrum, k, which, tol):
    want = leading_of(spectrum, k, which)
    allowed = tol * np.maximum(np.abs(want), 1e-3 * np.abs(spectrum).max())
    allowed = np.maximum(allowed, 1e-5 * np.abs(spectrum).max())
    off = np.abs(np.sort(found.values) - np.sort(want))
    assert (off <= allowed[np.argsort(want)]).all(), (found.values, want)


@pytest.fixture(params=["few rows", "many rows"])
def few(request, monkeypatch):
    """Whether the basis may grow to the whole space; if not, there are restarts."""
    if request.param == "many rows":
        monkeypatch.setattr(lanczos, "WHOLE", 0)
    return request.param == "few rows"


@pytest.mark.parametrize("which", lanczos.ORDERS)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_each_comes_as_often_as_it_occurs(name, k, which, few):
    spectrum = SPECTRA[name]
    times = Counted(diagonal(spectrum))
    size = len(spectrum)
    if not few and name == "crowded near zero" and which == "smallest":
        pytest.skip("takes thousands of products")
    found = lanczos.leading(times, size, np.dtype(np.float32), k, which, 1e-3, 300)
    if few:
        assert times.calls <= (size if k == 1 else 1.25 * size)
    assert_found(found, spectrum, k, which, 1e-3)
    rows = found.vectors.astype(float)
    np.testing.assert_allclose(rows @ rows.T, np.eye(k), atol=1e-5)
    residuals = [times(v) - a * v for v, a in zip(rows, found.values, strict=True)]
    limit = 1e-3 * np.abs(spectrum).max()
    assert (np.linalg.norm(residuals, axis=1) <= limit).all()


@st.composite
def spectra(draw):
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    size = draw(st.integers(45, 400))
    kind = draw(st.sampled_from(["few", "whole", "normal", "zeros", "pairs"]))
    if kind == "few":
        return rng.choice(rng.normal(size=draw(st.integers(1, 12))), size)
    if kind == "whole":
        return np.round(3 * rng.normal(size=size))
    if kind == "zeros":
        return np.where(rng.random(size) < 0.8, 0.0, rng.normal(size=size))
    if kind == "pairs":
        return np.repeat(rng.normal(size=size // 2 + 1), 2)
    return rng.normal(size=size) ** draw(st.sampled_from([1, 2, 3]))


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(
    "size", slow_but([41, 64, 65, 129], [41, 64, 65, 129, 300, 401])
)
def test_crowded_eigenvalues_of_few_rows_are_exact(size, k):
    """Whatever is asked for: they take no more products than a dense matrix does."""
    basis, _ = np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))
    spectrum = np.linspace(0, 1, size) ** 3 - 0.1
    matrix = (basis * spectrum) @ basis.T
    times = Counted(lambda v: matrix @ v)
    found = lanczos.leading(times, size, np.dtype(float), k, "smallest", 1e-12, 1)
    assert times.calls <= (size if k == 1 else 1.25 * size)
    np.testing.assert_allclose(found.values, spectrum[:k], rtol=0, atol=1e-13)
    rest = found.vectors @ matrix - found.values[:, None] * found.vectors
    np.testing.assert_allclose(rest, 0, atol=1e-12)


@pytest.mark.slow
def test_a_thousand_rows_of_a_crowded_end():
    spectrum = np.linspace(0, 1, 1200) ** 2
    times = Counted(diagonal(spectrum))
    found = lanczos.leading(times, 1200, np.dtype(np.float32), 3, "smallest", 1e-3, 1)
    assert times.calls <= 1500
    np.testing.assert_allclose(found.values, spectrum[:3], rtol=0, atol=2e-6)


def test_a_mixture_of_close_eigenvalues_does_not_count_as_converged():
    """Two values that differ by 1.2 times the tolerance, whatever the first vector.

    With a residual of up to the tolerance 7 of the 40 would be off by that, with one of
    up to half of it 1.
    """
    spectrum = np.concatenate(
        [[1, 1 - 1.2 * 0.003], np.linspace(0, 1 - 8 * 0.003, 300)]
    )
    for seed in range(40):
        times = diagonal(spectrum, np.float64, seed)
        found = lanczos.leading(times, 302, np.dtype(float), 1, "largest", 0.003, 300)
        assert found.values[0] == pytest.approx(1, abs=0.003)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    spectra(),
    st.booleans(),
    st.integers(1, 8),
    st.sampled_from(["largest", "smallest"]),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([1e-2, 1e-3, 1e-5]),
)
def test_of_any_spectrum(spectrum, few, k, which, dtype, tol):
    """It is right; or, of many rows, it says that it has not converged."""
    size = len(spectrum)
    basis, _ = np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))
    matrix = ((basis * spectrum) @ basis.T).astype(dtype)
    spectrum = np.linalg.eigvalsh(matrix.astype(float))
    times = Counted(lambda v: matrix @ v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanczos, "WHOLE", 2000 if few else 0)
        try:
            found = lanczos.leading(times, size, np.dtype(dtype), k, which, tol, 100)
        except RuntimeError as error:
            assert not few and "converged" in str(error)
            return
    assert not few or times.calls <= (size if k == 1 else 1.25 * size)
    assert_found(found, spectrum, k, which, tol)


def test_it_holds_no_more_vectors_than_it_says():
    for k in (1, 5, 40):
        assert lanczos.room(k) == max(20, 2 * k + 1) + k


@pytest.mark.parametrize(
    ("k", "what"),
    [
        (1, "0 of 1 eigenvalues converged .* eigenvalue 1 is .* a residual of"),
        (5, "0 of 5 eigenvalues converged"),
    ],
)
def test_what_has_not_converged_is_named_with_its_residual(k, what):
    with pytest.raises(RuntimeError, match=what):
        lanczos.leading(
            diagonal(np.linspace(0, 1, 2001) ** 2),
            2001,
            np.dtype(np.float32),
            k,
            "smallest",
            1e-5,
            3,
        )


def test_a_search_for_others_that_does_not_end_is_an_error():
    """Two values stand apart; the others crowd right below."""
    spectrum = np.append([1.2, 1.0], 0.95 - 0.95 * np.linspace(0, 1, 2000) ** 2)
    with pytest.raises(RuntimeError, match="2 eigenvalues converged, but the search"):
        lanczos.leading(
            diagonal(spectrum, np.float64),
            len(spectrum),
            np.dtype(np.float64),
            2,
            "largest",
            1e-7,
            12,
        )
