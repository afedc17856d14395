"""L_simple against its definition, and its sum with the bound by gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpyro.infer import SVI

from probdiff import (
    BernoulliKernel,
    CombinedLoss,
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    SimpleLoss,
    diagnostics,
    fit,
    networks,
    readouts,
    schedules,
)
from probdiff.trajectories import ForwardTrajectory

T = 6
BETA = schedules.log_snr_linear(T, beta_1=0.01, alpha_bar_T=0.02)
READOUTS = [
    readouts.Perturbation(),
    readouts.Epsilon(),
    readouts.Data(),
    readouts.Velocity(),
    readouts.Score(),
    readouts.Epsilon(readouts.ForwardVariance()),
    readouts.Mixture(3),
]


def outputs_of(x_t, t, count):
    """Something different for each output, entry and step."""
    z = jnp.sin(x_t + 0.3 * t[:, None])
    return jnp.concatenate([z * (1 - 0.1 * i) for i in range(count)], -1)


def make(readout, last_step=None):
    count = readout.num_outputs(GaussianKernel())
    return Diffusion(
        GaussianKernel(),
        BETA,
        lambda x_t, t: outputs_of(x_t, t, count),
        event_shape=(3,),
        readout=readout,
        last_step=last_step,
    )


@pytest.mark.parametrize("readout", READOUTS, ids=str)
def test_step_loss_is_the_squared_error_of_the_noise(x64, readout):
    diffusion = make(readout)
    key_0, key_t = jax.random.split(jax.random.key(0))
    x_0 = jax.random.normal(key_0, (8, 3))
    reverse = diffusion.bind({})
    forward = ForwardTrajectory.of(reverse, x_0)
    t = jnp.array([2, 3, 4, 5, 6, 6, 2, 4])
    x_t = forward.sample_at(key_t, t)
    step = reverse.coefficients(t)
    a, n = np.asarray(step.alpha_bar_t), np.asarray(step.noise_t)
    noise = (x_t - np.sqrt(a) * x_0) / np.sqrt(n)
    read = (x_t - np.sqrt(a) * reverse.x_0_hat(x_t, t)) / np.sqrt(n)
    expected = ((read - noise) ** 2).sum(-1) / T
    np.testing.assert_allclose(SimpleLoss().step_loss(forward, reverse, x_t, t), expected, 1e-9)


def test_step_loss_of_epsilon_is_that_of_the_network_itself(x64):
    diffusion = make(readouts.Epsilon())
    x_0, noise = jax.random.normal(jax.random.key(0), (2, 5, 3))
    reverse = diffusion.bind({})
    forward = ForwardTrajectory.of(reverse, x_0)
    t = jnp.array([2, 3, 4, 5, 6])
    step = reverse.steps.at(t, 1)
    x_t = jnp.sqrt(step.alpha_bar_t) * x_0 + jnp.sqrt(step.noise_t) * noise
    expected = ((jnp.sin(x_t + 0.3 * t[:, None]) - noise) ** 2).sum(-1) / T
    np.testing.assert_allclose(SimpleLoss().step_loss(forward, reverse, x_t, t), expected, 1e-9)


def test_first_step_counts_as_the_others_do(x64):
    diffusion = make(readouts.Epsilon(), readouts.Learned())
    x_0, noise = jax.random.normal(jax.random.key(0), (2, 5, 3))
    reverse = diffusion.bind({})
    step = reverse.steps.at(1, 0)
    x_1 = jnp.sqrt(step.alpha_bar_t) * x_0 + jnp.sqrt(step.noise_t) * noise
    law = reverse.data(x_1)
    loss = SimpleLoss().data_loss(ForwardTrajectory.of(reverse, x_0), law, x_0)
    np.testing.assert_allclose(loss, ((jnp.sin(x_1 + 0.3) - noise) ** 2).sum(-1) / T, 1e-9)


def test_missing_entries_have_no_loss(x64):
    diffusion = make(readouts.Epsilon(), readouts.Learned())
    x_0, mask = jnp.ones((2, 3)), jnp.array([[True, True, False], [False, False, False]])
    reverse = diffusion.bind({})
    forward = ForwardTrajectory.of(reverse, x_0, mask)
    x_t = jax.random.normal(jax.random.key(0), (2, 3))
    t = jnp.array([3, 4])
    loss = SimpleLoss().step_loss(forward, reverse, x_t, t)
    assert loss[0] > 0
    assert loss[1] == 0
    changed = x_t.at[0, 2].add(1.0)
    np.testing.assert_allclose(SimpleLoss().step_loss(forward, reverse, changed, t), loss, 1e-12)


def trained_sites(objective, last_step):
    """Gradients by the mean's outputs and by the variance's, same key."""
    network = networks.Perceptron((3,), 4, 1, T, outputs=2, rngs=nnx.Rngs(0))
    nnx.update(network, jax.tree.map(lambda leaf: leaf.astype(float), nnx.state(network)))
    kernel = network.readout.kernel
    kernel[...] = 0.1 * jax.random.normal(jax.random.key(1), kernel.shape)
    diffusion = Diffusion(
        GaussianKernel(),
        BETA,
        network,
        event_shape=(3,),
        readout=readouts.Epsilon(),
        last_step=last_step,
    )
    x = jax.random.normal(jax.random.key(2), (16, 3))
    params = {"x_0_network$params": nnx.to_pure_dict(nnx.state(network))}
    gradient = jax.jit(
        jax.grad(
            lambda p: objective.loss(jax.random.key(4), p, diffusion.model, diffusion.guide, x)
        )
    )(params)["x_0_network$params"]["readout"]
    return np.split(np.asarray(gradient["kernel"]), 2, axis=-1)


@pytest.mark.parametrize("last_step", [readouts.Tied(), readouts.Learned()], ids=str)
def test_combined_loss_trains_means_by_one_and_variances_by_the_other(x64, last_step):
    simple = trained_sites(SimpleLoss(), last_step)
    bound = trained_sites(SampledTimeELBO(), last_step)
    combined = trained_sites(CombinedLoss(0.25), last_step)
    assert np.abs(bound[1]).max() > 1e-3
    np.testing.assert_array_equal(simple[1], 0)
    np.testing.assert_allclose(combined[0], simple[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(combined[1], 0.25 * bound[1], rtol=1e-9, atol=1e-12)


@pytest.mark.long
def test_training_by_either_raises_the_bound():
    x = np.random.default_rng(0).normal(size=(2_000, 1)) * [1.0, 1.0]  # two equal numbers
    x = (x + 0.1 * np.random.default_rng(1).normal(size=x.shape)).astype(np.float32)
    means = {}
    for objective in (SampledTimeELBO(), SimpleLoss(), CombinedLoss()):
        network = networks.Perceptron((2,), 32, 2, T, rngs=nnx.Rngs(0))
        diffusion = Diffusion(
            GaussianKernel(), BETA, network, event_shape=(2,), readout=readouts.Data()
        )
        svi = SVI(diffusion.model, diffusion.guide, optax.adam(3e-3), objective)
        for steps in (1, 400):
            fitted = fit(jax.random.key(0), svi, x, num_steps=steps, batch_size=128, progress=False)
            tree = diagnostics.bound(jax.random.key(1), diffusion, fitted.params, x[:200])
            means[type(objective).__name__, steps] = tree["bound"].attrs["mean"]
    for name in ("SampledTimeELBO", "SimpleLoss", "CombinedLoss"):
        assert means[name, 400] > means[name, 1] + 1.0


def test_symbols_are_refused():
    diffusion = Diffusion(
        BernoulliKernel(0.5), schedules.harmonic(4), lambda x, t: 0.0 * x, event_shape=(3,)
    )
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), SimpleLoss())
    with pytest.raises(ValueError, match="for L_simple, whose noise is Gaussian; got"):
        svi.run(jax.random.key(0), 1, np.zeros((4, 3), int), progress_bar=False)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(ValueError, match="weight must be positive"):
        CombinedLoss(weight)


def test_weights_of_noise_say_how_much_each_level_counts(x64):
    """At the same draws each level's loss is multiplied by w(σ_t) over the mean of w."""
    diffusion = make(readouts.Epsilon())
    forward = ForwardTrajectory.of(diffusion.bind({}), jnp.ones((T - 1, 3)))
    t = jnp.arange(2, T + 1)
    x_t = forward.sample_at(jax.random.key(0), t)
    alpha_bar = np.cumprod(1 - BETA)
    sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
    reverse = diffusion.bind({})
    plain = SimpleLoss().step_loss(forward, reverse, x_t, t)
    first = reverse.data(x_t)
    for weight in (lambda s: s, lambda s: 1 / s, lambda s: jnp.minimum(s, 2.0), lambda s: 3.0):
        share = np.broadcast_to(weight(sigma), sigma.shape)
        share = share / share.mean()
        loss = SimpleLoss(noise_weight=weight)
        found = loss.step_loss(forward, reverse, x_t, t)
        np.testing.assert_allclose(found, share[1:] * plain, rtol=1e-10)
        found = loss.data_loss(forward, first, jnp.ones((T - 1, 3)))
        alike = SimpleLoss().data_loss(forward, first, jnp.ones((T - 1, 3)))
        np.testing.assert_allclose(found, share[0] * alike, rtol=1e-10)


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (lambda s: -s, "noise_weight must be finite and not negative at every level"),
        (lambda s: 1 / (s - s), "noise_weight must be finite"),
        (lambda s: 0 * s, "noise_weight must be positive at some level"),
        (2.0, r"noise_weight must be callable, noise_weight\(sigma\)"),
    ],
)
def test_weights_of_noise_that_make_no_loss_are_refused(unchecked, weight, text):
    diffusion = make(readouts.Epsilon())
    with pytest.raises(ValueError, match=text):
        svi = SVI(diffusion.model, diffusion.guide, optax.sgd(0.1), SimpleLoss(noise_weight=weight))
        jax.jit(svi.evaluate)(svi.init(jax.random.key(0), jnp.ones((4, 3))), jnp.ones((4, 3)))
