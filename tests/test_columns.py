"""What is said of columns that no density fits, and that nothing is said of others."""

import re
import warnings

import jax
import numpy as np
import optax
import pytest
from numpyro.infer import SVI

from probdiff import SampledTimeELBO, datasets, readouts, schedules, standard_diffusion

BETA = schedules.log_snr_linear(10, beta_1=1e-4, alpha_bar_T=1e-3)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(5000, 3))
OUTLIER = np.concatenate([X[1:], [[1e6, 0, 0]]])
SEEN = RNG.random(X.shape) < 0.5


def said(x, *, mask=None, **options):
    """Texts of the warnings that data raise."""
    x = np.asarray(x, np.float32)
    return said_by(standard_diffusion(x.shape[1:], beta=BETA, **options), x, mask)


def said_by(diffusion, x, mask=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        diffusion.check_data(x, mask)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.round(X, 1), {}, r"takes few values at columns 0, 1, 2 \(\d+, no less than 0.1 apart.*"
         "up to 0.88 nats.*Discretised.*dequantise"),
        (RNG.integers(0, 10, 5000) / 3 - 1.5, {}, r"takes few values \(10, no less than 0.333"),
        (RNG.choice([-1.0, 1.0], (40, 2)), {}, r"takes few values at columns 0, 1 \(2"),
        (np.c_[X, RNG.poisson(3, 5000)], {"loc": [0, 0, 0, 3], "scale": [1, 1, 1, 1.7]},
         "takes few values at column 3 "),
        (RNG.integers(0, 3, (99, 2, 2)) - 1.0, {},
         r"few values at entries \[0, 0\], \[0, 1\], \[1, 0\] and 1 more"),
        (np.where(SEEN, np.round(X), np.nan), {"mask": SEEN}, "few values at columns 0, 1, 2 "),
        (np.where(SEEN, 0, 1.4 * X), {}, r"x_0 is 0 in \d\d% of the examples at columns 0, 1, 2:"),
        (np.minimum(X, 0.8), {}, r"x_0 is 0.8 in \d\d% of the examples at columns 0, 1, 2:"),
        (2459000 + 0.1 * X, {"loc": 2459000.0, "scale": 0.1},
         r"x_0 is held too coarsely.*column 0: float32 numbers near the loc of 2459000 are 0.25"),
        (np.c_[X, np.full(5000, 0.7)], {}, "constant at column 3, 0.7 in all"),
        (OUTLIER, {"loc": OUTLIER.mean(0), "scale": OUTLIER.std(0)},
         "second moment of x_0 at column 0 comes from about 1 of 5000"),
        (np.exp(3 * X), {"loc": np.exp(3 * X).mean(0), "scale": np.exp(3 * X).std(0)},
         r"second moment of x_0 at columns? .* comes from about \d+ of 5000.*logarithm"),
        (X * [1e-3, 1.2, 1.2], {}, r"deviation 0.001 and second moment 1e-06 .* at column 0,.*std"),
        (X[:, [0, 0, 1, 0]] * [1, -1, 1, 1.2], {}, "at columns 1, 3 is a copy .* column 0"),
    ],
    ids=["rounded", "integer", "two_values", "one_of_four", "images", "masked", "zeros", "clipped",
         "float32", "constant", "outlier", "tails", "narrow", "copy"],
)  # fmt: skip
def test_columns_that_no_density_fits_are_named(x, options, message):
    (text,) = said(x, **options)
    assert re.search(message, text)


DIGITS = datasets.digits().train
DEQUANTISED = np.asarray(datasets.dequantise(jax.random.key(0), DIGITS))


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (X, {}),
        (1.2 * X * [1e-5, 1, 1e6] + [0, 7, 7], {"loc": [0, 7, 7], "scale": [1e-5, 1.0, 1e6]}),
        (X.astype(np.float16), {}), (np.round(X, 3), {}), (RNG.uniform(-1.7, 1.7, (500, 2)), {}),
        (RNG.exponential(size=(5000, 2)) - 1, {}), (RNG.standard_t(3, size=(5000, 2)) / 1.7, {}),
        (X * [1.3, 0.3, 1.0], {}), (np.where(SEEN, X, np.nan), {"mask": SEEN}),
        (np.ones((500, 2)), {}), (np.ones(500), {}), (np.tile(X[:4], (100, 1)) * 1.2, {}),
        (np.repeat(X, 3, 0), {}), (np.round(X[:31]), {}),
        (DEQUANTISED, {"loc": float(DIGITS.mean()) + 0.5, "scale": float(DIGITS.std())}),
        (DIGITS, {"loc": float(DIGITS.mean()), "scale": float(DIGITS.std()),
                  "last_step": readouts.Discretised(0, 16, 17)}),
    ],
    ids=["normal", "units", "float16", "fine_steps", "uniform", "exponential", "student",
         "unequal", "masked", "one_point", "one_number", "four_points", "repeated", "few",
         "dequantised", "grid"],
)  # fmt: skip
def test_nothing_is_said_of_data_that_a_density_fits(x, options):
    assert said(x, **options) == []


def test_nothing_is_said_of_normal_numbers():
    diffusion, rng = standard_diffusion((4,), beta=BETA), np.random.default_rng(1)
    for n in (32, 50, 100, 1000):
        draws = rng.normal(size=(100, n, 4)).astype(np.float32)
        assert not any(said_by(diffusion, x) for x in draws)


def test_fit_warns_before_it_trains():
    diffusion = standard_diffusion((2,), beta=BETA)
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), SampledTimeELBO())
    with pytest.warns(UserWarning, match="takes few values at columns 0, 1"):
        svi.init(jax.random.key(0), np.round(X[:, :2]).astype(np.float32))


@pytest.mark.filterwarnings("ignore:x_0 is held too coarsely")
def test_numbers_whose_squares_overflow_are_refused():
    diffusion = standard_diffusion((2,), beta=BETA, loc=[0.0, 1e30])
    with pytest.raises(ValueError, match=r"within .* times scale of loc.*got 1e\+30 at column 1"):
        diffusion.check_data(np.ones((3, 2)))
