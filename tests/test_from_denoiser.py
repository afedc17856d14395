"""`from_denoiser`: every convention of other people's networks is the native diffusion.

Foreign networks are written from the other side: each works out σ from its label alone, then asks
the analytic denoiser D(x; σ) = E[x_0 | x_0 + σ ε] of a Gaussian or of a mixture, in float64.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen, nnx
from numpyro.infer import Trace_ELBO

import probdiff
from probdiff import (
    Diffusion,
    GaussianKernel,
    diagnostics,
    from_denoiser,
    infer,
    readouts,
    sample,
    schedules,
)
from probdiff.readouts import BridgeVariance, ForwardVariance, InterpolatedVariance

T = 8
KEY = jax.random.key(0)
TIMES = np.linspace(0.05, 1.0, T)
"""t in [0, 1] of the levels."""


def sigma_of(t):
    """σ(t) of Song et al.'s variance-preserving process, β_min = 0.1, β_max = 20, as EDM has it."""
    xp = jnp if isinstance(t, jax.Array) else np
    return xp.sqrt(xp.expm1(9.95 * t**2 + 0.1 * t))


def scale_of(t):
    """Its scale times a factor, so that neither x_t nor x_0 + σ ε is what the network takes."""
    return 1.5 / np.sqrt(1 + sigma_of(t) ** 2)


SIGMA = sigma_of(TIMES)
ALPHA_BAR = 1 / (1 + SIGMA**2)

# analytic denoisers, x `(B, 2)` and σ `(B,)`

MEAN, SD = np.array([0.6, -0.3]), np.array([0.5, 0.8])
MEANS, WEIGHTS, WIDTH = np.array([[1.2, 0.4], [-0.9, 0.8], [0.1, -1.1]]), np.array([5, 3, 2.0]), 0.3


def gaussian(x, sigma):
    """Of N(MEAN, SD²)."""
    square = sigma[:, None] ** 2
    return (x * SD**2 + square * MEAN) / (SD**2 + square)


def mixture(x, sigma):
    """Of Σ_k w_k N(MEANS_k, WIDTH² I)."""
    square = sigma[:, None] ** 2
    gap = x[:, None] - MEANS
    log_w = np.log(WEIGHTS) - 0.5 * (gap**2).sum(-1) / (WIDTH**2 + square)
    w = jax.nn.softmax(log_w, -1)
    return (x * WIDTH**2 + square * (w @ MEANS)) / (WIDTH**2 + square)


LAWS = {"gaussian": gaussian, "mixture": mixture}

# conventions

SIGMA_DATA = 0.5


def predicted(name, x_0_hat, x, sigma, scale):
    """What a network that predicts so says of x = x_0 + σ ε, seen as s x."""
    noise = (x - x_0_hat) / sigma
    if name == "edm":
        h = jnp.sqrt(sigma**2 + SIGMA_DATA**2)
        return (x_0_hat - SIGMA_DATA**2 / h**2 * x) * h / (sigma * SIGMA_DATA)
    return {
        "x_0": x_0_hat,
        "noise": noise,
        "v": (noise - sigma * x_0_hat) / jnp.sqrt(1 + sigma**2),
        "score": -noise / (scale * sigma),
    }[name]


READOUTS = {
    "x_0": readouts.Data, "noise": readouts.Epsilon, "v": readouts.Velocity,
    "score": readouts.Score, "edm": readouts.Data,
}  # fmt: skip
NOISES = {
    "alphas_cumprod": ({"alphas_cumprod": ALPHA_BAR}, lambda s: 1 / jnp.sqrt(1 + s**2)),
    "sigma_and_scale": ({"sigma": SIGMA, "input_scale": scale_of(TIMES)},
                        lambda s: 1.5 / jnp.sqrt(1 + s**2)),
    "takes_sigma": ({"sigma": SIGMA}, jnp.ones_like),
}  # fmt: skip
LABELS = {
    "from_0": (np.arange(T), lambda i: jnp.asarray(SIGMA)[i]),
    "from_1": (np.arange(1, T + 1), lambda i: jnp.asarray(SIGMA)[i - 1]),
    "sigma": (SIGMA, lambda s: s),
    "log_sigma": (np.log(SIGMA), jnp.exp),
    "quarter_log_sigma": (np.log(SIGMA) / 4, lambda c: jnp.exp(4 * c)),
    "unit_time": (TIMES, sigma_of),
}


def foreign(law, predicts, noise, label):
    """A network of other people's, and what to tell `from_denoiser` of it."""
    told, scale_at = NOISES[noise]
    labels, sigma_at = LABELS[label]

    def network(x, time):
        sigma = sigma_at(time)
        scale = scale_at(sigma)
        if predicts == "edm":
            scale = 1 / jnp.sqrt(sigma**2 + SIGMA_DATA**2)
        x_sigma = x / scale[:, None]
        columns = sigma[:, None], scale[:, None]
        return predicted(predicts, LAWS[law](x_sigma, sigma), x_sigma, *columns)

    told = told | {"time": labels, "event_shape": (2,)}
    if predicts == "edm":
        told.pop("input_scale", None)
        told |= {"sigma_data": SIGMA_DATA, "data_variance": 1.0}
    return network, told


def made(law, predicts, noise, label, variance=None, **options):
    network, told = foreign(law, predicts, noise, label)
    readout = READOUTS[predicts](BridgeVariance() if variance is None else variance)
    return from_denoiser(network, readout, **told | options)


def native(law, variance=None, **options):
    """The same diffusion, written for this package."""
    beta = schedules.check_beta(1 - ALPHA_BAR / np.concatenate([[1.0], ALPHA_BAR[:-1]]))
    table = schedules.steps(beta)

    def network(x_t, t):
        step = table.at(t, 0)
        sigma = jnp.sqrt(step.noise_t / step.alpha_bar_t)
        return LAWS[law](x_t / jnp.sqrt(step.alpha_bar_t)[:, None], sigma)

    readout = readouts.Data(BridgeVariance() if variance is None else variance)
    options = {"event_shape": (2,), "last_step": readouts.Learned()} | options
    return Diffusion(GaussianKernel(), beta, network, readout=readout, **options)


COMBINATIONS = list(itertools.product(LAWS, READOUTS, NOISES, LABELS))
X_T = np.random.default_rng(0).normal(size=(T, 3, 2)) * 1.3


def steps_of(diffusion):
    """Means and standard deviations of p(x_s | x_t) at every level, with p(x_0 | x_1)."""
    reverse = diffusion.bind({})
    last = reverse.data(jnp.asarray(X_T[0])).base
    law = reverse.step(jnp.asarray(X_T[1:]), jnp.arange(2, T + 1)[:, None])
    laws = [(p.mean, jnp.broadcast_to(p.scale, p.mean.shape)) for p in (last, law)]
    return [np.concatenate([a[None], b]) for a, b in zip(*laws, strict=True)]


def bound_of(diffusion):
    """K of a few examples at a fixed key, whole trajectories."""
    x_0 = jnp.asarray(MEANS[:, ::-1])
    return -Trace_ELBO().loss(KEY, {}, diffusion.model, diffusion.guide, x_0)


def posterior_of(diffusion, num_particles=200):
    """Draws and log evidence at a fixed key, the first number measured with noise."""
    prior = diffusion.prior({})

    def program(y):
        x = prior()
        numpyro.sample("y", dist.Normal(x[..., 0], 0.4), obs=y)

    smc = infer.SMC(program, num_particles=num_particles, num_runs=2)
    smc.run(KEY, y=0.7)
    return smc


FEW = [
    ("gaussian", "noise", "alphas_cumprod", "from_0"),
    ("mixture", "v", "alphas_cumprod", "from_1"),
    ("mixture", "score", "sigma_and_scale", "unit_time"),
    ("gaussian", "x_0", "takes_sigma", "sigma"),
    ("mixture", "edm", "takes_sigma", "quarter_log_sigma"),
]


@functools.cache
def of_native(law, function):
    with jax.enable_x64(True):
        return function(native(law))


def check_steps(case):
    diffusion = made(*case)
    for one, other in zip(steps_of(diffusion), of_native(case[0], steps_of), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)
    return diffusion


@pytest.mark.parametrize("case", FEW, ids="-".join)
def test_a_convention_is_the_native_diffusion(x64, case):
    diffusion = check_steps(case)
    assert diffusion.T == T and diffusion.params_template == {}


def of_kind(law, predicts):
    """18 combinations of noise and label."""
    cases = [case for case in COMBINATIONS if case[:2] == (law, predicts)]
    assert len(cases) == 18 and len(COMBINATIONS) == 180
    return cases


every_kind = pytest.mark.parametrize(("law", "predicts"), list(itertools.product(LAWS, READOUTS)))


@pytest.mark.slow
@every_kind
def test_every_convention_has_the_native_steps_and_bound(x64, law, predicts):
    for case in of_kind(law, predicts):
        diffusion = check_steps(case)
        np.testing.assert_allclose(bound_of(diffusion), of_native(law, bound_of), rtol=1e-8)


@pytest.mark.slow
@every_kind
def test_every_convention_has_the_native_posterior(x64, law, predicts):
    smc = of_native(law, posterior_of)
    for case in of_kind(law, predicts):
        found = posterior_of(made(*case))
        np.testing.assert_allclose(found.log_evidence, smc.log_evidence, rtol=1e-7)
        draws = found.get_samples()["x_0"], smc.get_samples()["x_0"]
        np.testing.assert_allclose(*draws, rtol=1e-6, atol=1e-6)


# levels and labels

DATA = readouts.Data(BridgeVariance())


def says_its_label(x, label):
    """x̂_0 is the label."""
    return jnp.broadcast_to(label.astype(float), x.T.shape).T


def labels_of(diffusion, steps=None):
    """Labels that the network is told at every level."""
    reverse = diffusion.bind({}).respaced(steps)
    return reverse.x_0_hat(jnp.zeros((reverse.n, 1)), jnp.arange(1, reverse.n + 1))[:, 0]


@pytest.mark.parametrize("label", LABELS)
def test_fewer_steps_keep_the_labels_of_their_levels(x64, label):
    given = LABELS[label][0]
    diffusion = from_denoiser(says_its_label, DATA, sigma=SIGMA, time=given, event_shape=(1,))
    np.testing.assert_array_equal(labels_of(diffusion), given)
    np.testing.assert_array_equal(labels_of(diffusion, 3), given[schedules.evenly_spread(T, 3) - 1])


def test_labels_that_are_not_given_are_those_of_the_convention(x64):
    told = {"event_shape": (1,)}
    by_share = from_denoiser(says_its_label, DATA, alphas_cumprod=ALPHA_BAR, **told)
    by_sigma = from_denoiser(says_its_label, DATA, sigma=SIGMA, **told)
    np.testing.assert_array_equal(labels_of(by_share), np.arange(T))
    np.testing.assert_array_equal(labels_of(by_sigma), SIGMA)
    seen = []

    def edm(x, label):
        seen.append(label.dtype)
        return says_its_label(x, label)

    raw = from_denoiser(edm, DATA, sigma=SIGMA, sigma_data=0.5, **told)
    gain = SIGMA * 0.5 / np.sqrt(SIGMA**2 + 0.25)
    np.testing.assert_allclose(labels_of(raw) / gain, np.log(SIGMA) / 4)
    assert set(seen) == {np.dtype("float64")}


def test_integers_stay_integers(x64):
    def table(x, label):
        return x * jnp.arange(T)[label][:, None]  # floats would be refused as an index

    assert from_denoiser(table, DATA, alphas_cumprod=ALPHA_BAR, event_shape=(1,)).T == T


def test_levels_between_those_of_the_network_take_the_nearest_and_say_how_far_it_is(x64):
    beta = schedules.log_snr_linear(5, beta_1=1 - ALPHA_BAR[0], alpha_bar_T=ALPHA_BAR[-1])
    told = {"alphas_cumprod": ALPHA_BAR, "event_shape": (1,), "beta": beta}
    with pytest.warns(UserWarning, match="beta has levels that the network was not") as caught:
        diffusion = from_denoiser(says_its_label, DATA, **told)
    alpha_bar = np.cumprod(1 - beta)
    sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
    apart = np.abs(np.log(SIGMA / sigma[:, None]))
    np.testing.assert_array_equal(labels_of(diffusion), apart.argmin(1))
    off = np.abs(SIGMA[apart.argmin(1)] / sigma - 1)
    assert f"off by up to {off.max():.2g} of itself, at t = {off.argmax() + 1} " in str(
        caught[0].message
    )
    np.testing.assert_allclose(diffusion.rates, beta)
    half = ALPHA_BAR[::2]
    told["beta"] = 1 - half / np.concatenate([[1.0], half[:-1]])
    np.testing.assert_array_equal(
        labels_of(from_denoiser(says_its_label, DATA, **told)), [0, 2, 4, 6]
    )


def test_a_nearest_level_keeps_the_noise_of_its_own_level(x64):
    """The denoiser of N(0, 1) between its levels: x_0 + σ ε arrives with the diffusion's own σ."""
    seen = []

    def network(x, sigma):
        seen.append(x)
        return x

    beta = schedules.check_beta([0.3, 0.4])
    with pytest.warns(UserWarning, match="beta has levels"):
        diffusion = from_denoiser(network, DATA, sigma=[0.5, 1.0], beta=beta, event_shape=(1,))
    x_0_hat = diffusion.bind({}).x_0_hat(jnp.ones((2, 1)), jnp.array([1, 2]))
    np.testing.assert_allclose(x_0_hat[:, 0], 1 / np.sqrt([0.7, 0.42]))


def test_rates_have_all_digits_of_sigma():
    """In JAX's float32, from σ of EDM's range: σ² to 1e-13 after adding the steps up again."""
    sigma = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 1000) ** 7
    diffusion = from_denoiser(gaussian, DATA, sigma=sigma, event_shape=(2,))
    assert diffusion.rates.dtype == np.float64
    again = np.expm1(-np.cumsum(np.log1p(-diffusion.rates)))
    np.testing.assert_allclose(again, sigma**2, rtol=1e-12)
    assert f"{diffusion.rates[0]:.2g}" == "4e-06"
    assert f"{np.prod(1 - diffusion.rates):.2g}" == "0.00016"
    np.testing.assert_allclose(diffusion.bind({}).steps.noise_t[0], 4e-6, rtol=1e-5)


def test_a_v_network_may_end_without_signal(x64):
    """Zero terminal signal-to-noise ratio: the last step starts at D(no signal), the mean."""
    alphas = np.append(ALPHA_BAR[:-1], 0.0)

    def network(x, index):  # v of N(MEAN, SD²), √ᾱ_T = 0 included
        share = jnp.asarray(alphas)[index][:, None]
        x_0_hat = MEAN + jnp.sqrt(share) * SD**2 * (x - jnp.sqrt(share) * MEAN) / (
            share * SD**2 + 1 - share
        )
        return (jnp.sqrt(share) * x - x_0_hat) / jnp.sqrt(1 - share)

    told = {"alphas_cumprod": alphas, "event_shape": (2,)}
    diffusion = from_denoiser(network, readouts.Velocity(BridgeVariance()), **told)
    assert diffusion.rates[-1] == 1
    at_end = diffusion.bind({}).x_0_hat(jnp.asarray(X_T[0]), jnp.full(3, T))
    np.testing.assert_allclose(at_end, np.broadcast_to(MEAN, (3, 2)))
    for readout in (readouts.Epsilon, readouts.Score):
        with pytest.raises(ValueError, match="beta_T must be below 1 for readout"):
            from_denoiser(network, readout(BridgeVariance()), **told)
    with pytest.raises(ValueError, match="alphas_cumprod must end above 0"):
        from_denoiser(network, DATA, sigma_data=0.5, **told)


def test_a_flow_is_a_function_away(x64):
    """Velocity ε − x_0 at (1−t) x_0 + t ε, as the file's docstring has it."""

    def flow(x, t):
        x_0_hat = gaussian(x / (1 - t)[:, None], t / (1 - t))
        return (x - (1 - t)[:, None] * x_0_hat) / t[:, None] - x_0_hat

    t = SIGMA / (1 + SIGMA)
    diffusion = from_denoiser(
        lambda x, t: x - t[:, None] * flow(x, t), DATA,
        sigma=t / (1 - t), input_scale=1 - t, time=t, event_shape=(2,),
    )  # fmt: skip
    for one, other in zip(steps_of(diffusion), of_native("gaussian", steps_of), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)


# units


def test_the_units_of_the_network_have_their_own_variance():
    """EDM's data have second moment 0.25, of which nothing is said, and twists are as wide."""
    x_0 = np.random.default_rng(0).normal(size=(500, 2)) * 0.5 * 127.5 + 127.5
    told = {"sigma": SIGMA, "event_shape": (2,), "data_range": (0, 255)}
    edm = from_denoiser(gaussian, DATA, sigma_data=0.5, **told)
    edm.check_data(x_0)
    assert (edm.loc, edm.scale, edm.prior({}).variance) == (127.5, 127.5, 0.25)
    assert edm.prior({}, variance=0.3).variance == 0.3
    np.testing.assert_allclose(edm.to_state(np.array([0.0, 255.0])), [-1, 1])
    told_so = from_denoiser(gaussian, DATA, data_variance=[0.2, 0.3], **told)
    told_so.check_data(x_0)
    np.testing.assert_array_equal(told_so.prior({}).variance, [0.2, 0.3])
    with pytest.warns(UserWarning, match="second moment 0.2.*, where x_T ~ π has 1"):
        from_denoiser(gaussian, DATA, **told).check_data(x_0)
    with pytest.warns(UserWarning, match="second moment 0.2.*, where data_variance is 4"):
        from_denoiser(gaussian, DATA, data_variance=4.0 * np.eye(2), **told).check_data(x_0)


def test_clipping_is_off_until_it_is_asked_for(x64):
    told = {"sigma": SIGMA, "event_shape": (2,)}

    def noise(x, sigma):
        return predicted("noise", gaussian(x, sigma), x, sigma[:, None], 1.0)

    free = from_denoiser(noise, readouts.Epsilon(ForwardVariance()), **told)
    clipped = from_denoiser(noise, readouts.Epsilon(ForwardVariance()), clip=(-0.5, 1), **told)
    x_0_hat, held = (
        d.bind({}).x_0_hat(jnp.asarray(3 * X_T), jnp.arange(1, T + 1)[:, None])
        for d in (free, clipped)
    )
    assert (np.abs(x_0_hat) > 1).any()
    np.testing.assert_allclose(held, np.clip(x_0_hat, -0.5, 1))


# shapes of outputs

IMAGE = (4, 3, 2)
"""Height, width, channels."""


def of_image(x, axis):
    """An image's x̂_0 and variance, blocks of channels along an axis; the first row counts more."""
    first = np.arange(1, 3).reshape([2 if a == axis % 4 else 1 for a in range(4)])
    return jnp.concatenate([jnp.sin(x) * first, jnp.tanh(x) / first], axis)


@pytest.mark.parametrize(
    "order",
    ["first_of_last", *(pytest.param(o, marks=pytest.mark.long) for o in ("first", "last"))],
)
def test_channels_are_where_the_network_has_them(x64, order):
    rng = np.random.default_rng(1)
    axis = -1 if order == "last" else 1
    shape = (2, 4, 3) if order == "first" else IMAGE
    diffusion = from_denoiser(
        lambda x, sigma: of_image(x, axis), readouts.Data(InterpolatedVariance()),
        sigma=SIGMA, input_scale=1 / np.sqrt(1 + SIGMA**2), event_shape=shape,
        channels_first=order == "first_of_last",
    )  # fmt: skip
    x = rng.normal(size=(5, *IMAGE))
    x_0_hat, v = np.split(of_image(x, -1), 2, -1)
    beta = diffusion.rates[3]
    small = beta * (1 - ALPHA_BAR[2]) / (1 - ALPHA_BAR[3])
    variance = np.exp((1 + v) / 2 * np.log(beta) + (1 - v) / 2 * np.log(small))
    given = np.moveaxis(x, -1, 1) if order == "first" else x
    law = diffusion.bind({}).step(jnp.asarray(given), jnp.full(5, 4))
    found = diffusion.bind({}).x_0_hat(jnp.asarray(given), jnp.full(5, 4)), law.variance
    for one, expected in zip(found, (x_0_hat, variance), strict=True):
        one = np.moveaxis(one, 1, -1) if order == "first" else one
        np.testing.assert_allclose(one, expected, rtol=1e-9)


def test_numbers_without_axes_have_their_outputs_on_a_last_one(x64):
    def network(x, sigma):
        return jnp.stack([jnp.sin(x), jnp.zeros_like(x)], -1)

    told = {"sigma": SIGMA, "event_shape": ()}
    diffusion = from_denoiser(network, readouts.Data(InterpolatedVariance()), **told)
    law = diffusion.bind({}).step(jnp.ones(1), jnp.array([2]))
    between = np.sqrt(diffusion.rates[1] ** 2 * (1 - ALPHA_BAR[0]) / (1 - ALPHA_BAR[1]))
    np.testing.assert_allclose(law.variance, between)
    assert from_denoiser(lambda x, sigma: x, DATA, **told).T == T


# networks of every kind


class NnxNoise(nnx.Module):
    """Noise predictor with class-free labels in [0, 1]."""

    def __init__(self):
        self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def __call__(self, x, time):
        return jnp.tanh(self.layer(jnp.concatenate([x, time[:, None]], -1)))


class LinenNoise(linen.Module):
    """The same with a class of five as context, an index."""

    @linen.compact
    def __call__(self, x, time, label):
        shift = linen.Embed(5, 2)(label.astype(int))
        return jnp.tanh(linen.Dense(2)(jnp.concatenate([x, time[:, None]], -1)) + shift)


def of_module(network, **options):
    readout = readouts.Epsilon(BridgeVariance())
    told = {"sigma": SIGMA, "input_scale": scale_of(TIMES), "time": TIMES, "event_shape": (2,)}
    return from_denoiser(network, readout, **told | options)


def noise_of(diffusion, params, context=None):
    """What a noise predictor said, from x̂_0."""
    reverse, t = diffusion.bind(params, context=context), jnp.full(3, 4)
    x_t, step = jnp.asarray(X_T[0], jnp.result_type(float)), reverse.coefficients(4)
    x_0_hat = reverse.x_0_hat(x_t, t)
    return (x_t - jnp.sqrt(step.alpha_bar_t) * x_0_hat) / jnp.sqrt(step.noise_t)


def inputs_at_4():
    """What the network is given there, 1.5 x_t by `scale_of`, and its label."""
    return jnp.asarray(1.5 * X_T[0]), jnp.full(3, TIMES[3])


def test_an_nnx_module_is_frozen_or_trained(x64):
    module = NnxNoise()
    expected = module(*inputs_at_4())
    frozen, trained = of_module(module), of_module(module, trainable=True)
    weights = {"x_0_network$params": nnx.to_pure_dict(nnx.state(module, nnx.Param))}
    np.testing.assert_allclose(noise_of(frozen, {}), expected, rtol=1e-6)
    np.testing.assert_allclose(noise_of(trained, weights), expected, rtol=1e-6)
    assert frozen.params_template == {}
    gradient = jax.grad(lambda w: noise_of(trained, w).sum())(weights)
    assert all(jnp.abs(leaf).min() > 0 for leaf in jax.tree.leaves(gradient))
    other = jax.tree.map(lambda a: a + 1.0, weights)
    assert np.abs(noise_of(trained, other) - expected).max() > 0.1


def test_a_linen_module_comes_with_its_weights_and_a_context(x64):
    module = LinenNoise()
    inputs, label = inputs_at_4(), jnp.array([0, 4, 2])
    variables = module.init(KEY, *inputs, label)
    expected = module.apply(variables, *inputs, label)
    for options, params in (({}, {}), ({"trainable": True}, {"x_0_network$params": variables})):
        diffusion = of_module((module.apply, variables), context_shape=(), **options)
        found = noise_of(diffusion, params, context=label)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="network must come with its weights"):
        of_module(module, context_shape=())
    anew = of_module(module, context_shape=(), trainable=True)
    assert jax.tree.map(np.shape, anew.params_template["x_0_network$params"]) == jax.tree.map(
        np.shape, variables["params"]
    )


def test_an_equinox_module_takes_one_example(x64):
    eqx = pytest.importorskip("equinox")

    class Noise(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, x, time):
            return jnp.tanh(self.layer(jnp.append(x, time)))

    module = Noise(eqx.nn.Linear(3, 2, key=KEY))
    expected = jax.vmap(module)(*inputs_at_4())
    np.testing.assert_allclose(noise_of(of_module(module), {}), expected, rtol=1e-6)
    trained = of_module(module, trainable=True)
    assert list(trained.params_template) == ["x_0_network$params"]


def test_a_model_with_a_foreign_network_is_saved_beside_it(x64, tmp_path):
    module = NnxNoise()
    diffusion = of_module(module, trainable=True, data_variance=0.3)
    params = {"x_0_network$params": nnx.to_pure_dict(nnx.state(module, nnx.Param))}
    probdiff.save(tmp_path, diffusion, params)
    with pytest.raises(ValueError, match="network must be given"):
        probdiff.load(tmp_path)
    again, params_again = probdiff.load(tmp_path, network=diffusion.network)
    np.testing.assert_array_equal(noise_of(again, params_again), noise_of(diffusion, params))
    assert again.data_variance == 0.3


def in_numpy(x, sigma):
    """The mixture's denoiser, as another framework has it."""
    x, square = np.asarray(x), np.asarray(sigma)[:, None] ** 2
    gap = x[:, None] - MEANS
    log_w = np.log(WEIGHTS) - 0.5 * (gap**2).sum(-1) / (WIDTH**2 + square)
    w = np.exp(log_w - log_w.max(-1, keepdims=True))
    w /= w.sum(-1, keepdims=True)
    return ((x * WIDTH**2 + square * (w @ MEANS)) / (WIDTH**2 + square)).astype(x.dtype)


def called_back(x, sigma):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(in_numpy, shape, x, sigma, vmap_method="expand_dims")


@jax.custom_vjp
def called_back_with_gradient(x, sigma):
    return called_back(x, sigma)


def _forward(x, sigma):
    return called_back(x, sigma), (x, sigma)


def _backward(saved, v):
    x, sigma = saved
    return jax.vjp(lambda x: mixture(x, sigma), x)[1](v)[0], jnp.zeros_like(sigma)


called_back_with_gradient.defvjp(_forward, _backward)


def test_a_network_of_another_framework_is_called_back(x64):
    diffusion = from_denoiser(called_back, DATA, sigma=SIGMA, event_shape=(2,))
    for one, other in zip(steps_of(diffusion), of_native("mixture", steps_of), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)


P = WEIGHTS / WEIGHTS.sum()


def log_density(x):
    """log p(x) of the mixture, nats."""
    gap = ((x[:, None] - MEANS) ** 2).sum(-1) / WIDTH**2
    return np.logaddexp.reduce(np.log(P) - 0.5 * gap - np.log(2 * np.pi * WIDTH**2), 1)


def modes_of(x):
    """Share of each mode."""
    return np.bincount(((x[:, None] - MEANS) ** 2).sum(-1).argmin(1), minlength=3) / len(x)


EXACT_GAP = 0.7 - MEANS[:, 0]
"""Of the measurement of `posterior_of` from every mode."""


def exact_posterior():
    """Weights of the mixture's modes given the measurement, and log Z."""
    variance = WIDTH**2 + 0.4**2
    log_w = np.log(P) - 0.5 * EXACT_GAP**2 / variance
    log_z = np.logaddexp.reduce(log_w)
    return np.exp(log_w - log_z), log_z - 0.5 * np.log(2 * np.pi * variance)


@pytest.mark.long
def test_a_network_without_gradient_serves_weighted_particles():
    """It says what the native diffusion does, with a gradient of its own or without."""
    told, found = {"sigma": SIGMA, "event_shape": (2,)}, []
    for network in (mixture, called_back_with_gradient, called_back):
        smc = posterior_of(from_denoiser(network, DATA, **told), 4000)
        modes = modes_of(smc.get_samples()["x_0"])
        found.append((smc.log_evidence, smc.log_evidence_se, smc.result.health.ess, modes))
    for log_evidence, se, _, modes in found[1:]:
        assert abs(log_evidence - found[0][0]) < 4 * np.hypot(se, found[0][1]) + 0.02
        np.testing.assert_allclose(modes, found[0][3], atol=0.03)


# a denoiser trained elsewhere


class Trained(linen.Module):
    """A small noise predictor with a label in 0..T − 1."""

    levels: int

    @linen.compact
    def __call__(self, x, index):
        angle = index[:, None] / self.levels * jnp.pi * 2.0 ** jnp.arange(5)
        h = jnp.concatenate([x, jnp.sin(angle), jnp.cos(angle)], -1)
        for _ in range(3):
            h = linen.silu(linen.Dense(96)(h))
        return linen.Dense(2)(h)


def trained_by_a_plain_loop(key, x_0, alphas_cumprod, num_steps=3000):
    """A noise predictor by L_simple, as anyone writes it; nothing of this package."""
    network, share = Trained(len(alphas_cumprod)), jnp.asarray(alphas_cumprod, jnp.float32)
    weights = network.init(key, x_0[:2], jnp.zeros(2, int))
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))

    def loss(weights, key):
        row, of_time, of_noise = jax.random.split(key, 3)
        x = x_0[jax.random.randint(row, (512,), 0, len(x_0))]
        index = jax.random.randint(of_time, (512,), 0, len(share))
        noise, a = jax.random.normal(of_noise, x.shape), share[index][:, None]
        said = network.apply(weights, jnp.sqrt(a) * x + jnp.sqrt(1 - a) * noise, index)
        return jnp.mean((said - noise) ** 2)

    def step(carry, key):
        weights, state = carry
        updates, state = adam.update(jax.grad(loss)(weights, key), state)
        return (optax.apply_updates(weights, updates), state), None

    keys = jax.random.split(key, num_steps)
    return network, jax.lax.scan(step, (weights, adam.init(weights)), keys)[0][0]


@pytest.mark.long
def test_a_denoiser_trained_elsewhere_is_sampled_bounded_and_conditioned():
    rng, levels = np.random.default_rng(0), 100
    data, held_out = (
        (MEANS[rng.choice(3, n, p=P)] + WIDTH * rng.normal(size=(n, 2))).astype(np.float32)
        for n in (20_000, 1000)
    )
    alphas = np.cumprod(1 - np.linspace(1e-3, 0.2, levels))
    network, weights = trained_by_a_plain_loop(KEY, jnp.asarray(data), alphas)
    diffusion = from_denoiser(
        (network.apply, weights), readouts.Epsilon(ForwardVariance()), alphas_cumprod=alphas,
        event_shape=(2,),
    )  # fmt: skip
    draws = sample.ancestral(KEY, diffusion, {}, 4000)
    np.testing.assert_allclose(modes_of(draws), P, atol=0.05)
    # β_t is a little too wide for steps of modes: 0.2 nats with the exact denoiser, too
    assert abs(log_density(draws).mean() - log_density(held_out).mean()) < 0.35

    tree = diagnostics.bound(KEY, diffusion, {}, held_out, num_draws=1)["bound"]
    gap = log_density(held_out) - tree["bound"].values
    se = gap.std() / np.sqrt(len(gap))
    assert -4 * se < gap.mean() < 0.25

    smc = posterior_of(diffusion, 1000)
    weights, exact = exact_posterior()
    assert abs(smc.log_evidence - exact) < 4 * smc.log_evidence_se + 0.05
    found = modes_of(smc.get_samples()["x_0"])
    np.testing.assert_allclose(found, weights, atol=0.06)


# what does not fit


def of(**options):
    readout = options.pop("readout", DATA)
    network = options.pop("network", gaussian)
    return from_denoiser(network, readout, **{"event_shape": (2,), "sigma": SIGMA} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": readouts.Mixture()}, "readout must be one such as readouts.Epsilon"),
        ({"readout": "noise"}, "readout must be one such as readouts.Epsilon.*got 'noise'"),
        ({"alphas_cumprod": ALPHA_BAR}, "alphas_cumprod or sigma must be given, one of them; got "
         "both"),
        ({"sigma": None}, "alphas_cumprod or sigma must be given, one of them; got neither"),
        ({"sigma": SIGMA[::-1]}, "sigma must be positive and increase.*got 152.167 at level "
         "1 to 0.174143 at level 8"),
        ({"sigma": np.append(0.0, SIGMA)}, "sigma must be positive and increase.*without a 0"),
        ({"sigma": [1.0]}, "sigma must hold at least 2 levels; got"),
        ({"sigma": np.ones((2, 2))}, r"sigma must have shape \(T,\); got shape \(2, 2\)"),
        ({"sigma": [0.5, np.inf]}, "sigma must be finite"),
        ({"sigma": None, "alphas_cumprod": ALPHA_BAR[::-1]}, "alphas_cumprod must decrease"),
        ({"sigma": None, "alphas_cumprod": [1.0, 0.5]}, r"alphas_cumprod must decrease within "
         r"\(0, 1\), its last may be 0; got 1 at level 1 to 0.5 at level 2"),
        ({"input_scale": SIGMA[1:]}, r"input_scale must have shape \(8,\); got shape \(7,\)"),
        ({"input_scale": -SIGMA}, "input_scale must be positive"),
        ({"input_scale": SIGMA, "sigma_data": 0.5}, "input_scale must be left out unless"),
        ({"time": SIGMA[1:]}, r"time must have shape \(8,\); got shape \(7,\)"),
        ({"time": "sigma"}, "time must be an array of"),
        ({"sigma_data": 0.0}, "sigma_data must be positive and finite; got 0.0"),
        ({"sigma_data": 0.5, "readout": readouts.Epsilon(ForwardVariance())},
         "readout must be Data where sigma_data is given"),
        ({"beta": [0.5, 1.0]}, "beta_T must be below 1, for a network that takes x_0"),
        ({"beta": [0.5, 2.0]}, r"beta must lie in \(0, 1\]; got 2.0 at t = 2"),
        ({"data_range": (1, 0)}, r"data_range must be \(low, high\) with low < high; got \(1, 0\)"),
        ({"data_range": (0, 1), "scale": 2.0}, "data_range must be left out where loc or scale"),
        ({"clip": (1, 1)}, r"clip must be \(low, high\) with low < high; got \(1, 1\)"),
        ({"channels_first": True, "event_shape": ()}, "channels_first must be False for numbers"),
        ({"trainable": True}, "trainable must be False for a function, which has no weights"),
        ({"data_variance": -1.0}, "data_variance must be positive and finite; got -1.0"),
        ({"network": lambda x, t, c: x}, r"network must be callable as network\(x_t, t\); missing"),
        ({"network": gaussian, "context_shape": (3,)}, "network must be callable as .* context"),
        ({"readout": readouts.Data(InterpolatedVariance())}, r"network must return 2 outputs of "
         r"shape \(B, 2\) for .*; got \(B, 2\)\. .*BridgeVariance\(\) or ForwardVariance\(\)"),
        ({"network": lambda x, t: jnp.tile(x, 2)}, r"network must return 1 output of shape "
         r"\(B, 2\) for .*; got \(B, 4\)\. .*InterpolatedVariance\(\)"),
        ({"network": lambda x, t: {"sample": x}}, "network must be a function that returns an"),
        ({"network": lambda x, t: x - x.mean(0)}, "network must take every row of x_t by itself"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        if (beta := options.get("beta")) is not None and beta[-1] == 1:
            with pytest.warns(UserWarning, match="beta has levels"):
                of(**options)
        of(**options)
