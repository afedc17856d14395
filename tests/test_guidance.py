"""Classifier-free guidance where both laws are known, and what it does to them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from probdiff import (
    CategoricalKernel,
    Diffusion,
    GaussianKernel,
    guidance,
    infer,
    readouts,
    sample,
    samplers,
    schedules,
)

BETA = schedules.log_snr_linear(200, beta_1=1e-4, alpha_bar_T=1e-4)
MEANS, VARIANCE = np.array([1.0, -1.0]), 0.25


def modes(**options):
    """x_0 ~ N(±1, ¼), evenly; the context is one-hot, the denoiser exact with and without it."""
    left = np.cumprod(1 - np.asarray(BETA, float))

    def network(x_t, t, context):
        alpha_bar = jnp.asarray(left, jnp.float32)[t - 1][:, None]
        a, total = jnp.sqrt(alpha_bar), alpha_bar * VARIANCE + 1 - alpha_bar
        means = MEANS + a * VARIANCE * (x_t - a * MEANS) / total
        even = jax.nn.softmax(-0.5 * (x_t - a * MEANS) ** 2 / total, -1)
        share = jnp.where(context[:, 2:] > 0, context[:, :2], even)
        z = jnp.sum(share * means, -1, keepdims=True)
        return jnp.concatenate([z, jnp.zeros_like(z)], -1)

    return Diffusion(
        GaussianKernel(), BETA, network, event_shape=(1,), context_shape=(3,),
        readout=readouts.Data(), last_step=readouts.Learned(), **options,
    )  # fmt: skip


@pytest.mark.parametrize(("weight", "mean", "sd"), [(0.0, 0.0, 1.25**0.5), (1.0, 1.0, 0.5)])
def test_weights_of_0_and_1_are_the_laws_that_were_learned(key, weight, mean, sd):
    """4000 draws: means and spreads within 4 standard errors."""
    context = np.tile([1.0, 0.0], (4000, 1))
    diffusion = guidance.guided(modes(), {}, weight)
    x = sample.draw(key, diffusion, {}, 4000, samplers.DPMSolver(40), context=context)
    assert abs(x.mean() - mean) < 4 * sd / 4000**0.5
    assert abs(x.std() - sd) < 0.03


@pytest.mark.long
def test_beyond_1_draws_leave_the_conditional_law(key):
    """Further from the other mode and narrower; the label as an observation does neither."""
    context = np.tile([1.0, 0.0], (4000, 1))
    x = sample.draw(
        key, guidance.guided(modes(), {}, 3.0), {}, 4000, samplers.DPMSolver(40), context=context
    )
    assert x.mean() > 1.1 and x.std() < 0.45

    prior = modes().prior({})

    def program():
        x_0 = prior(context=jnp.zeros(3))
        logits = -0.5 * (x_0 - MEANS) ** 2 / VARIANCE
        numpyro.sample("label", dist.Categorical(logits=logits), obs=0)

    smc = infer.SMC(program, num_particles=1000, num_runs=4)
    smc.run(key)
    x_0 = smc.get_samples()["x_0"]
    assert abs(x_0.mean() - 1) < 0.06 and abs(x_0.std() - 0.5) < 0.05
    assert abs(smc.log_evidence + np.log(2)) < 4 * smc.log_evidence_se + 0.02


def test_the_variance_stays_that_of_the_context():
    def network(x_t, t, context):
        return jnp.concatenate([x_t, 0 * x_t + context[:, :1]], -1)

    diffusion = Diffusion(
        GaussianKernel(), schedules.cosine(5), network, event_shape=(3,), readout=readouts.Data(),
        context_shape=(2,), loc=2.0, scale=3.0,
    )  # fmt: skip
    x, context = jnp.ones((4, 3)), jnp.full((4, 1), 0.7)
    given = diffusion.bind({}).given(jnp.concatenate([context, jnp.ones((4, 1))], -1))
    beyond = guidance.guided(diffusion, {}, 2.5).bind({}).given(context)
    np.testing.assert_allclose(beyond.step(x, 3).scale, given.step(x, 3).scale, rtol=1e-6)
    assert beyond.units.scale == 3.0


def test_symbols_have_their_logs_extrapolated(x64):
    """p ∝ p_c^w p^(1−w), normalised."""
    given, without = np.log([0.5, 0.3, 0.2]), np.log([0.2, 0.2, 0.6])

    def network(x_t, t, context):
        logits = jnp.where(context[:, 1:] > 0, given, without)
        return jnp.tile(logits, (1, 2)).reshape(-1, 3, 2).swapaxes(1, 2).reshape(-1, 6)

    diffusion = Diffusion(
        CategoricalKernel(3), schedules.harmonic(4), network, event_shape=(2,), context_shape=(2,)
    )
    x_t = jnp.zeros((1, 2), jnp.int32)

    def law(weight):
        reverse = guidance.guided(diffusion, {}, weight).bind({}).given(jnp.ones((1, 1)))
        return np.asarray(reverse.x_0_given(x_t, 4).probs)

    plain = diffusion.bind({}).given(jnp.ones((1, 2)))
    np.testing.assert_allclose(law(1.0), plain.x_0_given(x_t, 4).probs, rtol=1e-6)
    logs = {w: np.log(law(w)) for w in (0.0, 1.0, 2.5)}
    expected = 2.5 * logs[1.0] - 1.5 * logs[0.0]
    expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
    np.testing.assert_allclose(logs[2.5], expected, atol=1e-5)


def test_a_share_of_contexts_is_left_out(key):
    context = np.random.default_rng(0).normal(size=(4000, 2))
    rows = guidance.flagged(context, key=key, share=0.2)
    is_there = rows[:, 2] == 1
    assert abs(is_there.mean() - 0.8) < 4 * (0.16 / 4000) ** 0.5
    np.testing.assert_array_equal(rows[is_there, :2], context[is_there])
    assert not rows[~is_there].any()


def test_what_cannot_be_guided_is_refused():
    with pytest.raises(ValueError, match="key must be given where a share is left out"):
        guidance.flagged(np.zeros((3, 1)), share=0.1)
    with pytest.raises(ValueError, match=r"context must have shape \(N, c\); got \(3,\)"):
        guidance.flagged(np.zeros(3))
    plain = Diffusion(GaussianKernel(), BETA, lambda x_t, t: x_t, event_shape=(1,),
                      readout=readouts.Data(readouts.BridgeVariance()))  # fmt: skip
    with pytest.raises(ValueError, match=r"diffusion must have a context of shape \(c \+ 1,\)"):
        guidance.guided(plain, {}, 1.0)
    mixture = Diffusion(
        GaussianKernel(), BETA, lambda x_t, t, c: jnp.tile(x_t, (1, 6)), event_shape=(1,),
        readout=readouts.Mixture(2), context_shape=(2,),
    )  # fmt: skip
    with pytest.raises(ValueError, match="no weighing the parts of Mixture"):
        guidance.guided(mixture, {}, 2.0)
