"""Swiss roll: can a diffusion learn a curve, and how close to the truth is its bound?

The roll has noise 0.1 in raw units; it is centred and scaled to unit mean variance. β_1 is 1e-4 and
ᾱ_T is 1e-3, the log signal-to-noise ratio falls linearly, the last step is tied. For such a model K
cannot pass −h(X⁽¹⁾), which is computed from the law of the roll, and with T = 40 Gaussian steps the
best possible is about −0.14 bits per point. Four models, trained alike (Adam, its rate falling to 0
along a cosine, averaged weights), all bounded on the same held-out points:

    perceptron, T = 40               4 layers of 96 units, fixed rates; saved, and in all figures
    perceptron, T = 40, learned β    β_2..β_T trained too; the same draws of the forward noise, so
                                     the gain of a learned schedule is a paired difference
    radial basis, T = 40             the network of 2015: 16 units, a read-out per step
    perceptron, T = 200              smaller steps, which Gaussian reverse steps fit better

Table 1 of 2015 has K = 2.35 and K − L_null = 6.45 bits. They cannot be reproduced as numbers: the
generator, its noise and β_1 are unpublished, and K of a curve with less noise or a smaller β_1 is
higher without limit. With the usual generator, 2.35 asks for a roll almost free of noise and a β_1
near 1e-5. Figure 1 is as in the paper: draws of both trajectories, and the drift of a reverse step.

**Denoising.** Points x are seen as y = x + ε with noise of sd 0.5, as wide as the gap between the
roll's turns, so that a posterior lies on several of them, and inferred by SMC, 4 runs. In the plane
the right answer can be had by force, from many draws x_m of the model and w_m = p(y | x_m):

    p(y) ≈ (1/M) Σ_m w_m,    E[x | y] ≈ Σ_m w_m x_m / Σ_m w_m.

Both know the same model, so evidences must agree within their errors. An error told by four runs is
Student's t with 3 degrees of freedom: the root mean square of the differences, in such errors, is
near √3.

**The ladder.** At held-out points x_0 whose density is known,

    log q(x_0) − K = [log q(x_0) − log p(x_0)]   the model: its network, its steps, its last step
                   + [log p(x_0) − K]            the bound, which is tighter with more steps

and with S trajectories a point importance weighting and SMC come to log p(x_0); at draws of the
model the bounds from below and above leave the gap stated.

Source: Sohl-Dickstein et al. (2015), eq. 9, sections 2.5 and 3.1.1, appendix C, table 1, figure 1.
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from flax import nnx
from jaxtyping import Array
from matplotlib.figure import Figure

import probdiff
from probdiff import Diffusion, datasets, diagnostics, infer, networks, plots, sample, schedules
from probdiff.diagnostics import BITS_PER_NAT
from probdiff.experiments import report
from probdiff.experiments.report import Experiment, Found, Row, Run, mean_and_se, verdict
from probdiff.experiments.training import Trained, train_and_bound
from probdiff.trajectories import ForwardTrajectory
from probdiff.types import Params

NOISE, BETA_1, _ALPHA_BAR_T = 0.1, 1e-4, 1e-3
SIGMA = 0.5
_UNIT = "bits per point"
_Points = Array | np.ndarray
_Mean = tuple[float, float]


class Size(NamedTuple):
    """How much of everything a run does."""

    num_steps: int = 10_000
    points: int = 10_000
    """To train, and as many held out."""
    num_draws: int = 4
    """Of the forward noise, for a bound with T = 40; 1 for the longer one."""
    ceiling_points: int = 40_000
    T_long: int = 200
    denoised: int = 40
    particles: int = 256
    draws_for_force: int = 200_000
    climbed: int = 100
    sizes: tuple[int, ...] = (1, 10, 100, 1000)
    few: int = 400
    """Points to rank the models by, beside all."""
    draws_of_few: int = 50
    batch_size: int = 512
    learning_rate: float = 4e-3


SMALL = Size(
    num_steps=20, points=300, num_draws=1, ceiling_points=500, T_long=60,
    denoised=6, particles=20, draws_for_force=500, climbed=4, sizes=(1, 10), few=100,
    draws_of_few=2,
)  # fmt: skip


def _conduct(run: Run) -> Found:
    size = run.size
    keys = run.keys("train", "held_out", "fit", "bound", "draw", "forward", "ceiling")
    key_denoise, key_ladder = (jax.random.fold_in(keys["draw"], i) for i in (1, 2))
    x, held_out = (
        datasets.swiss_roll(keys[name], size.points, noise=NOISE) for name in ("train", "held_out")
    )
    models, diffusions = {}, {
        "perceptron, T = 40": define(40),
        "perceptron, T = 40, learned β": define(40, learned=True),
        "radial basis (2015), T = 40": define(40, radial_basis=True),
        f"perceptron, T = {size.T_long}": define(size.T_long),
    }  # fmt: skip
    for name, diffusion in diffusions.items():
        run.say(f"train and bound: {name}")
        num_draws = size.num_draws if diffusion.T == 40 else 1
        models[name] = train_and_bound(run, keys, diffusion, x, held_out, num_draws=num_draws)

    run.say("ceilings, draws and figures")
    main, *_ = models.values()
    model = main.model
    ceilings = [ceiling(keys["ceiling"], size.ceiling_points, beta) for beta in (BETA_1, 0.0)]
    drawn = min(size.points, 4000)
    x_0, trajectory = sample.ancestral(keys["draw"], *model, drawn, keep_trajectory=True)
    off_roll = share_off_roll(keys["ceiling"], x_0, held_out)
    run.say("denoise")
    denoised = _denoise(key_denoise, *model, held_out[: size.denoised], size)
    run.say("rank by few points")
    asked = {"num_draws": size.draws_of_few}
    few = {name: diagnostics.bound(keys["bound"], *m.model, held_out[: size.few], **asked)
           for name, m in models.items()}  # fmt: skip
    run.say("climb from K to the log density")
    climbed = _climb(key_ladder, *model, held_out[: size.climbed], size.sizes)
    rows = [
        *_bound_rows(models, held_out, ceilings),
        *_ranking_rows(few, {name: m.tree for name, m in models.items()}),
        *_ladder_rows(climbed),
        Row("draws off the roll (of the data: 1)", *off_roll, "%"),
        *_denoising_rows(denoised),
    ]
    figures = {
        "figure_1": _figure_1(keys["forward"], *model, held_out, x_0, trajectory),
        "samples": _samples(held_out, x_0),
        "bound_per_step": plots.bound_per_step(main.tree).figure,
        "losses": plots.losses(main.fitted.losses, batch_size=size.batch_size).figure,
        "denoising": _denoising_figure(denoised),
        "ladder": _ladder_figure(climbed),
    }
    sections = {"Verdict": verdict(rows, ceilings[0][1])}
    return Found(rows, figures, {"bounds": main.tree}, sections, model)


EXPERIMENT = Experiment("Swiss roll", __doc__, _conduct, {"cpu": Size(), "quick": SMALL})


def define(T: int, *, learned: bool = False, radial_basis: bool = False) -> Diffusion:
    """A diffusion for the roll, with the readout of 2015 and a tied last step."""
    beta = schedules.log_snr_linear(T, beta_1=BETA_1, alpha_bar_T=_ALPHA_BAR_T)
    if radial_basis:
        network = networks.RadialBasis((2,), width=16, T=T, rngs=nnx.Rngs(0))
    else:
        network = networks.Perceptron((2,), width=96, depth=4, T=T, rngs=nnx.Rngs(0))
    rates = schedules.learned(beta) if learned else beta
    return Diffusion(probdiff.GaussianKernel(), rates, network, event_shape=(2,))


def ceiling(key: Array, n: int, beta: float) -> tuple[float, float]:
    """−h(√(1−β) X_0 + √β ε) in bits, and its standard error: β_1 gives −h(X_1), 0 gives −h(X_0)."""
    key_x, key_noise = jax.random.split(key)
    x = datasets.swiss_roll(key_x, n, noise=NOISE)
    x = jnp.sqrt(1 - beta) * x + jnp.sqrt(beta) * jax.random.normal(key_noise, x.shape)
    law = {"noise": NOISE, "shrink": 1 - beta, "extra_variance": beta}
    return mean_and_se(np.asarray(datasets.swiss_roll_log_density(x, **law)) * BITS_PER_NAT)


def share_off_roll(key: Array, x_0: _Points, held_out: _Points) -> tuple[float, float]:
    """Percentage of draws less likely than all but 1 % of the data, and its standard error.

    A tied last step puts noise on x_1, which has noise already: a perfect x_1 ends as data with
    β_1 (2 − β_1) of noise, and it is data with this noise that draws are compared to.
    """
    shrink, extra = (1 - BETA_1) ** 2, BETA_1 * (2 - BETA_1)
    noise = jax.random.normal(key, held_out.shape)
    data = jnp.sqrt(shrink) * held_out + jnp.sqrt(extra) * noise
    law = {"noise": NOISE, "shrink": shrink, "extra_variance": extra}
    edge = np.quantile(datasets.swiss_roll_log_density(data, **law), 0.01)
    is_off = np.asarray(datasets.swiss_roll_log_density(jnp.asarray(x_0), **law)) < edge
    return mean_and_se(100 * is_off)


def _bound_rows(models: dict[str, Trained], held_out: Array, ceilings: list[_Mean]) -> list[Row]:
    hard = ceilings[0][0]
    bits = {n: m.tree["bound"]["bound"].values * BITS_PER_NAT for n, m in models.items()}
    fixed, learned = list(bits.values())[:2]
    l_null = -(np.log(2 * np.pi) + 0.5 * np.sum(np.asarray(held_out) ** 2, -1)) / np.log(2)
    first, *rest = [Row(f"K, {n}", *mean_and_se(k), _UNIT, hard) for n, k in bits.items()]
    return [
        first._replace(published=2.35),
        *rest,
        Row("K learned β − K fixed β, paired", *mean_and_se(learned - fixed), _UNIT),
        Row("L_null, log density under N(0, I)", *mean_and_se(l_null), _UNIT),
        Row("K − L_null, perceptron, T = 40", *mean_and_se(fixed - l_null), _UNIT,
            hard - float(l_null.mean()), 6.45),
        Row("ceiling of a tied last step, −h(X⁽¹⁾)", *ceilings[0], _UNIT),
        Row("ceiling of any density, −h(X⁽⁰⁾)", *ceilings[1], _UNIT),
    ]  # fmt: skip


def _ranking_rows(*trees: Mapping[str, xr.DataTree]) -> list[Row]:
    """Differences to the best model, paired, by each set of bounds of the same models."""
    rows = []
    for models in trees:
        group = diagnostics.compare(models)["comparison"]
        best, n = group.attrs["best"], group.attrs["num_examples"]
        difference, se = (group[v] * BITS_PER_NAT for v in ("difference", "difference_se"))
        rows += [
            Row(f"K less that of the best ({best}), {n} points: {name}",
                float(difference.sel(model=name)), float(se.sel(model=name)), _UNIT)
            for name in group["model"].values[1:]
        ]  # fmt: skip
    return rows


class _Denoised(NamedTuple):
    """Posteriors of points, by SMC and by force."""

    truth: np.ndarray
    y: np.ndarray
    draws: np.ndarray
    """Of the posteriors, `(draws, points, 2)`."""
    prior: np.ndarray
    """Draws of the model."""
    log_evidence: tuple[np.ndarray, np.ndarray]
    """With its standard error."""
    by_force: tuple[np.ndarray, np.ndarray, np.ndarray]
    """log p(y), its standard error, and E[x | y]."""


def _denoise(key: Array, diffusion: Diffusion, params: Params, x: Array, size: Size) -> _Denoised:
    key_noise, key_smc, key_draw = jax.random.split(key, 3)
    prior, x = diffusion.prior(params), np.asarray(x)
    y = x + SIGMA * np.asarray(jax.random.normal(key_noise, x.shape))

    def program(y: Array | np.ndarray) -> None:
        with numpyro.plate("point", len(x)):
            numpyro.sample("y", dist.Normal(prior(), SIGMA).to_event(1), obs=y)

    smc = infer.SMC(program, num_particles=size.particles, num_runs=4)
    with warnings.catch_warnings(action="ignore", category=infer.InferenceWarning):
        smc.run(key_smc, y)  # the table tells
    from_model = sample.ancestral(key_draw, diffusion, params, size.draws_for_force)
    evidence = np.asarray(smc.log_evidence), np.asarray(smc.log_evidence_se)
    draws = smc.get_samples()["x_0"]
    return _Denoised(x, y, draws, from_model, evidence, by_force(y, from_model))


def by_force(y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p(y), its standard error and E[x | y] of each y, from draws x of the prior."""
    log_w = jax.vmap(lambda y: dist.Normal(jnp.asarray(x), SIGMA).to_event(1).log_prob(y))(y)
    log_w = np.asarray(log_w, np.float64)
    top = log_w.max(1, keepdims=True)
    w = np.exp(log_w - top)
    mean = w.mean(1)
    se = w.std(1, ddof=1) / np.sqrt(len(x)) / mean
    return np.log(mean) + top[:, 0], se, w @ x / w.sum(1, keepdims=True)


def _denoising_rows(found: _Denoised) -> list[Row]:
    (log_z, se), (forced, forced_se, forced_mean) = found.log_evidence, found.by_force
    scaled = (log_z - forced) / np.hypot(se, forced_se)
    means = {"SMC": found.draws.mean(0), "by force": forced_mean, "y": found.y}
    wrong = {n: report.root_mean_square(mean - found.truth) for n, mean in means.items()}
    return [
        Row("denoising: log evidence, SMC − by force", *mean_and_se(log_z - forced),
            "nats per point", 0.0),
        Row("denoising: error of log evidence by SMC, median", np.median(se), None, "nats"),
        Row("denoising: difference over its error, root mean square",
            float(np.sqrt(np.mean(scaled**2)))),
        *(Row(f"denoising: RMSE, {name}", *error, "scaled units")
          for name, error in wrong.items()),
    ]  # fmt: skip


def _denoising_figure(found: _Denoised) -> Figure:
    """Posterior draws of the first points, on draws of the model."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 6.6), layout="constrained")
    for i, ax in enumerate(axes.flat):
        at = {"truth": found.truth[i], "observation": found.y[i], "behind": found.prior[:2000]}
        plots.posterior_points(found.draws[:, i], **at, ax=ax)
    for ax in axes.flat[:-1]:
        ax.get_legend().remove()
    return figure


class _Climbed(NamedTuple):
    """The ladder at held-out points, and bounds from both sides at draws."""

    tree: xr.DataTree
    both: xr.DataTree
    log_density: np.ndarray
    """log q(x_0) of the same held-out points, nats."""


def _climb(
    key: Array, diffusion: Diffusion, params: Params, x: Array, sizes: tuple[int, ...]
) -> _Climbed:
    key_ladder, key_both = jax.random.split(key)
    options: dict[str, Any] = {"sizes": sizes, "block_size": 16_384}
    # the table tells
    with warnings.catch_warnings(action="ignore", category=diagnostics.LadderWarning):
        tree = diagnostics.ladder(key_ladder, diffusion, params, np.asarray(x), **options)
    both = diagnostics.sandwich(key_both, diffusion, params, len(x), num_repeats=1, **options)
    return _Climbed(tree, both, np.asarray(datasets.swiss_roll_log_density(x, noise=NOISE)))


def _ladder_rows(found: _Climbed) -> list[Row]:
    """Rungs, and what is between them, paired by point."""
    group, both = found.tree["ladder"], found.both["sandwich"]
    truth = found.log_density * BITS_PER_NAT
    k, smc, rungs = (group[v].values * BITS_PER_NAT for v in ("bound", "smc", "importance"))
    sizes, at, ceiling = group["size"].values, f"ladder, {len(truth)} points", float(truth.mean())
    gap, gap_se = (float(both[name][-1]) for name in ("gap_mean", "gap_mean_se"))
    return [
        Row(f"{at}: K", *mean_and_se(k), _UNIT, ceiling),
        *(Row(f"{at}: importance weighted, S = {size}", *mean_and_se(rung), _UNIT, ceiling)
          for size, rung in zip(sizes, rungs.T, strict=True)),
        Row(f"{at}: SMC, {sizes[-1]} particles", *mean_and_se(smc), _UNIT, ceiling),
        Row(f"{at}: log density of the roll", *mean_and_se(truth), _UNIT),
        Row("gap: the bound's, S at most − K", *mean_and_se(rungs[:, -1] - k), _UNIT, 0.0),
        Row("gap: the model's, roll − S at most", *mean_and_se(truth - rungs[:, -1]), _UNIT, 0.0),
        Row("gap: left at draws of the model, upper − lower at most S", gap * BITS_PER_NAT,
            gap_se * BITS_PER_NAT, _UNIT, 0.0),
        Row("ladder: points with Pareto k > 0.7", 100 * float(np.mean(group["pareto_k"] > 0.7)),
            None, "%"),
    ]  # fmt: skip


def _ladder_figure(found: _Climbed) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    plots.ladder(found.tree, truth=float(found.log_density.mean()), ax=left)
    plots.sandwich(found.both, ax=right)
    return figure


def drift_fields(
    diffusion: Diffusion, params: Params, levels: list[int]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Points of a square grid, and the drift f_μ(x, t) − x there at each of the levels."""
    line = np.linspace(-2.2, 2.2, 15, dtype=np.float32)
    grid = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    reverse = diffusion.bind(params)
    means = [reverse.step(jnp.asarray(grid), jnp.full(len(grid), t)).mean for t in levels]
    return grid, [np.asarray(mean) - grid for mean in means]


def _figure_1(
    key: Array, diffusion: Diffusion, params: Params, x: Array, x_0: _Points, trajectory: _Points
) -> Figure:
    """Figure 1 of the paper, from data and from draws with their trajectories.

    The columns are t = 0, T/4 and T, where the log signal-to-noise ratio has the paper's look; no
    reverse step starts from 0, so the first drift is that of T/8.
    """
    T, shown = diffusion.T, 2000
    forward = ForwardTrajectory.of(diffusion.bind(params), x[:shown]).sample(key)
    drift_levels = [T // 8, T // 4, T]
    grid, drifts = drift_fields(diffusion, params, drift_levels)
    axes = plots.figure_1(
        [x[:shown], forward[:, T // 4 - 1], forward[:, T - 1]],
        [x_0[:shown], trajectory[:shown, T // 4 - 1], trajectory[:shown, T - 1]],
        [grid] * 3, drifts, [trajectory[:shown, t - 1] for t in drift_levels],
        [0, T // 4, T], drift_levels=drift_levels,
    )  # fmt: skip
    return axes[0, 0].figure


def _samples(held_out: _Points, x_0: _Points) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
    plots.points(held_out[:2000], title="held-out data", ax=left)
    plots.points(x_0[:2000], title="draws of the model", color=plots.ORANGE, ax=right)
    return figure
