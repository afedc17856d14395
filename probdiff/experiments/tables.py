"""Tables: without settings, is a recipe's law of a table better than a mixture of Gaussians?

Of each table a fifth of the distinct rows, equal ones together, is held out for the figures; the
rest goes to `recipes.table` as it is. Red wine and protein come from the UCI repository, four more
with scikit-learn; the last one is drawn from a law that is known.

    density      K and the importance-weighted bound beside `baselines` on the same rows and
                 measure: masses of rounded, counted and categorical values, densities of others,
                 in which a value rounded too finely for a grid has noise as wide as its step
    imputation   30 % of the entries of held-out rows taken away; SMC's posteriors beside draws of
                 the Gaussian given the rest, and of scikit-learn's iterative imputation
    prediction   one column given all others: SMC's posterior, and a diffusion of the column alone
                 with the others as its context, beside quantile boosting and a forest

An interval of 90 % is judged by a rank among draws, uniform where it is right; of equal values, as
classes and counts have, one is chosen at random. Errors are standard errors over rows, paired where
two are compared. The continuous ranked probability score of draws x, x′ and a truth y is
E|x − y| − ½ E|x − x′|; of classes it is half their squared error in all probabilities.

Sources: Cortez et al. (2009) and Rana (2013) for tables; Gneiting and Raftery (2007) for the score.
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import optax
from jaxtyping import Array
from matplotlib.figure import Figure
from numpyro.infer import SVI

from probdiff import (
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    Table,
    datasets,
    diagnostics,
    fit,
    infer,
    networks,
    readouts,
    recipes,
    sample,
    schedules,
    tables,
)
from probdiff.experiments.report import Experiment, Found, Row, Run, mean_and_se
from probdiff.experiments.training import rngs_of
from probdiff.tables.missing import drawn

NATS = "nats per row"
_HELD_OUT, _MISSING = 0.2, 0.3
_LEVELS = np.linspace(0.025, 0.975, 20)  # of the quantiles that stand for draws
_LOW, _HIGH = 0.05, 0.95
_BLOCK = 50  # rows conditioned at once

Columns = Mapping[str, np.ndarray]


class Size(NamedTuple):
    """How much of everything a run does."""

    tables: tuple[str, ...] = (
        "red wine", "protein", "iris", "wine", "diabetes", "breast cancer", "known law",
    )  # fmt: skip
    known_rows: int = 10_000
    most_rows: int = 100_000
    num_steps: int | None = None
    test_rows: int = 2_000
    ladder_rows: int = 100
    ladder_draws: int = 32
    imputed_rows: int = 100
    predicted_rows: int = 100
    particles: int = 200
    levels: int = 50
    trees: int = 200


SMALL = Size(
    ("iris",), 200, 200, 3, 20, 10, 4, 12, 12, 20, 10, 5
)  # fmt: skip


class Problem(NamedTuple):
    """One table, described, split and fitted."""

    name: str
    target: str
    table: Table
    train: Columns
    test: Columns
    recipe: recipes.Recipe


def _conduct(run: Run) -> Found:
    rows, sections, figure, model = [], {}, {}, None
    keys = run.keys(*run.size.tables)
    for name in run.size.tables:
        key_split, key_fit, *rest = jax.random.split(keys[name], 5)
        run.say(f"{name}: fit")
        problem = _problem(key_split, key_fit, name, run)
        sections[f"{name}, as described"] = f"```\n{problem.table!r}\n```"
        model = (problem.recipe.diffusion, problem.recipe.params)
        for part, key in zip((_density, _imputation, _prediction), rest, strict=True):
            run.say(f"{name}: {part.__name__[1:]}")
            rows += part(key, problem, run.size)
    for kind, wanted in {"density": "− mixture", "intervals": "inside 90 %"}.items():
        figure[kind] = _figure([row for row in rows if wanted in row.row])
    return Found(rows, figure, {}, sections, model if len(run.size.tables) == 1 else None)


EXPERIMENT = Experiment("Tables", __doc__, _conduct, {"cpu": Size(), "quick": SMALL})


# data


def known_law(seed: int, count: int) -> dict[str, np.ndarray]:
    """Three normal numbers of two regimes, one heavy-tailed, one rounded, one counted."""
    rng = np.random.default_rng(seed)
    z, regime = rng.standard_normal((count, 3)), rng.random(count) < 0.4
    u = np.where(regime, 2.0, -1.0) + z[:, 0]
    v = np.where(regime, 0.7, -0.7) * z[:, 0] + np.sqrt(1 - 0.49) * z[:, 1]
    return {
        "regime": np.where(regime, "high", "low"), "u": u, "v": v,
        "tail": 0.5 * u + rng.standard_t(3.0, count), "rounded": np.round(u + v + 0.5 * z[:, 2]),
        "count": rng.poisson(np.exp(0.3 * v)),
    }  # fmt: skip


def known_log_p(data: Columns) -> np.ndarray:
    """Log of the law of `known_law`, nats, each row."""
    from scipy import stats

    is_high = np.asarray(data["regime"]) == "high"
    u, v = (np.asarray(data[name], float) for name in ("u", "v"))
    z = u - np.where(is_high, 2.0, -1.0)
    rounded = np.asarray(data["rounded"], float)
    ends = [stats.norm(u + v, 0.5).cdf(rounded + side) for side in (-0.5, 0.5)]
    tails = [stats.norm(u + v, 0.5).sf(rounded + side) for side in (-0.5, 0.5)]
    mass = np.where(rounded > u + v, tails[0] - tails[1], ends[1] - ends[0])
    return (
        np.log(np.where(is_high, 0.4, 0.6)) + stats.norm.logpdf(z)
        + stats.norm(np.where(is_high, 0.7, -0.7) * z, np.sqrt(1 - 0.49)).logpdf(v)
        + stats.t(3.0, 0.5 * u).logpdf(data["tail"]) + np.log(np.maximum(mass, 1e-300))
        + stats.poisson.logpmf(data["count"], np.exp(0.3 * v))
    )  # fmt: skip


def _read(name: str, seed: int, count: int) -> tuple[Columns, str]:
    """Columns of a table, and the one that is predicted."""
    if name == "known law":
        return known_law(seed, count), "v"
    if name in ("red wine", "protein"):
        return (datasets.red_wine(), "quality") if name == "red wine" else (
            datasets.protein(), "RMSD",
        )  # fmt: skip
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, f"load_{name.replace(' ', '_')}")()
    target = bunch.target if name == "diabetes" else np.asarray(bunch.target_names)[bunch.target]
    return dict(zip(bunch.feature_names, bunch.data.T, strict=True)) | {"target": target}, "target"


def _problem(key_split: Array, key_fit: Array, name: str, run: Run) -> Problem:
    data, target = _read(name, run.seed, run.size.known_rows)
    data = {column: values[: run.size.most_rows] for column, values in data.items()}
    table = Table(data)
    _, group = np.unique(table.encode(data).x_0, axis=0, return_inverse=True)
    order = np.asarray(jax.random.permutation(key_split, int(group.max()) + 1))[group.ravel()]
    is_test = order < _HELD_OUT * (group.max() + 1)
    train = {column: values[~is_test] for column, values in data.items()}
    which = np.flatnonzero(is_test)[np.argsort(order[is_test])][: run.size.test_rows]
    test = {column: values[which] for column, values in data.items()}
    recipe = recipes.table(
        key_fit, table, train, num_steps=run.size.num_steps, progress=run.progress
    )
    return Problem(name, target, table, train, test, recipe)


# density


def _density(key: Array, problem: Problem, size: Size) -> list[Row]:
    name, table, (diffusion, params, _) = problem.name, problem.table, problem.recipe
    keys = jax.random.split(key, 5)
    train, test = (
        table.encode(data, key=k)
        for data, k in zip((problem.train, problem.test), keys[:2], strict=True)
    )
    bound = diagnostics.bound(keys[2], diffusion, params, test.x_0)["bound"]
    trees = diagnostics.baselines(keys[3], diffusion, train.x_0, test.x_0)
    few = test.x_0[: size.ladder_rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diagnostics.LadderWarning)
        rungs = diagnostics.ladder(
            keys[4],
            diffusion,
            params,
            few,
            sizes=(1, size.ladder_draws),
            num_repeats=2,
            num_draws=2,
        )["ladder"]
    k, found = bound["bound"].values, {n: t["bound"]["bound"].values for n, t in trees.items()}
    top = {"importance": rungs["importance"].values[:, -1]}
    rows = [
        Row(f"{name}: K", *mean_and_se(k + test.log_jacobian), NATS),
        *(Row(f"{name}: K − {n}, paired", *mean_and_se(k - v), NATS) for n, v in found.items()),
        *(Row(f"{name}: {rung} − mixture, paired", *mean_and_se(v - found["mixture"][: len(v)]),
              NATS) for rung, v in top.items()),
    ]  # fmt: skip
    if name == "known law":
        truth = known_log_p(problem.test)
        scores = {"K": k, "mixture": found["mixture"]} | top
        rows += [
            Row(f"{name}: {n} − truth", *mean_and_se((v + test.log_jacobian[: len(v)])
                - truth[: len(v)]), NATS, 0.0) for n, v in scores.items()
        ]  # fmt: skip
    return rows


# imputation


def conditioned(
    key: Array, problem: Problem, x_0: np.ndarray, mask: np.ndarray, size: Size
) -> np.ndarray:
    """Draws of SMC `(S, N, d)` given the entries of each row where mask is True."""
    prior = problem.recipe.diffusion.prior(problem.recipe.params)

    def program(known: Any, mask: Any) -> None:
        with numpyro.plate("row", len(known)):
            prior(known=known, mask=mask)

    known, found = np.where(mask, x_0, 0.0), []
    smc = infer.SMC(program, num_particles=size.particles // 2, num_runs=2, steps=size.levels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", infer.InferenceWarning)
        for start in range(0, len(known), _BLOCK):
            block = slice(start, start + _BLOCK)
            smc.run(jax.random.fold_in(key, start), known[block], mask[block])
            found.append(np.asarray(smc.get_samples()["x_0"]))
    return np.concatenate(found, 1)


def _imputation(key: Array, problem: Problem, size: Size) -> list[Row]:
    table = problem.table
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    rows = table.encode(problem.test)
    x_0, mask = (a[: size.imputed_rows] for a in (rows.x_0, rows.mask))
    names = [n for n in table.names if table.kinds[n].entries]
    is_gone = rng.random((len(x_0), len(names))) < _MISSING
    seen = mask.copy()
    for name, gone in zip(names, is_gone.T, strict=True):
        seen[gone, table.place(name)] = False
    train = table.encode(problem.train, key=key).x_0
    draws = {
        "SMC": conditioned(key, problem, np.nan_to_num(x_0), seen, size),
        "Gaussian": _of_gaussian(rng, table, train, x_0, seen, size.particles),
        "iterative": _iterative(rng, table, train, x_0, seen),
    }
    found = []
    for method, found_by in draws.items():
        judged: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for name, gone in zip(names, is_gone.T, strict=True):
            if gone.any():
                kind, place = table.kinds[name], table.place(name)
                truth = np.asarray(kind.decode(rows.x_0[: len(x_0), place]))[gone]
                values = np.asarray(kind.decode(_on_grid(table, found_by)[..., place]))[:, gone]
                of_kind = judged.setdefault(_family(kind), [])
                of_kind.append(_judged(rng, kind, truth, values, _spread(kind, train[:, place])))
        for family, parts in judged.items():
            error, inside = (np.concatenate(part) for part in zip(*parts, strict=True))
            of = f"{problem.name}, {family} imputed, {method}"
            unit = "share wrong" if family == "classes" else "sd of column"
            value, se = mean_and_se(error)
            if unit != "share wrong":
                value, se = np.sqrt(value), se / (2 * np.sqrt(value))
            found += [Row(f"{of}: error", value, se, unit),
                      Row(f"{of}: inside 90 %", *mean_and_se(inside), None, 0.9)]  # fmt: skip
    return found


def _family(kind: tables.Kind) -> str:
    if isinstance(kind, tables.Category):
        return "classes"
    return "levels" if kind.grid[2] else "numbers"


def _spread(kind: tables.Kind, z: np.ndarray) -> float:
    return float(np.std(np.asarray(kind.decode(z))))


def _judged(
    rng: Any, kind: tables.Kind, truth: np.ndarray, values: np.ndarray, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Squared error in sd, or whether the likeliest class is another; and whether 90 % hold it."""
    if isinstance(kind, tables.Category):
        shares = np.stack([np.mean(values == k, 0) for k in range(len(kind.values))])
        which = rng.integers(len(kind.values), size=truth.shape)  # one class, yes or no
        inside = _inside(rng, (truth == which) + 0.0, (values == which) + 0.0)
        return (np.argmax(shares, 0) != truth) + 0.0, inside
    return ((values.mean(0) - truth) / spread) ** 2, _inside(rng, truth, values)


def _inside(rng: Any, truth: np.ndarray, values: np.ndarray) -> np.ndarray:
    below, equal = np.sum(values < truth, 0), np.sum(values == truth, 0)
    rank = (below + rng.random(truth.shape) * (equal + 1)) / (len(values) + 1)
    return ((rank > _LOW) & (rank < _HIGH)) + 0.0


def _on_grid(table: Table, x_0: np.ndarray) -> np.ndarray:
    grid = table.last_step.grid
    return x_0 if grid is None else np.asarray(grid.nearest(x_0))


def _of_gaussian(
    rng: Any, table: Table, train: np.ndarray, x_0: np.ndarray, seen: np.ndarray, count: int
) -> np.ndarray:
    from sklearn.mixture import GaussianMixture

    z, rows = ((a - table.loc) / table.scale for a in (train, np.nan_to_num(x_0)))
    model = GaussianMixture(1, random_state=0).fit(z)
    draws = [drawn(rng, rows, ~seen, model)[0] for _ in range(count)]
    return table.loc + table.scale * np.stack(draws)


def _iterative(
    rng: Any, table: Table, train: np.ndarray, x_0: np.ndarray, seen: np.ndarray
) -> np.ndarray:
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    z = (train - table.loc) / table.scale
    z = z[rng.permutation(len(z))[:5_000]]
    rows = np.where(seen, (x_0 - table.loc) / table.scale, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what has not converged is a rival all the same
        imputer = IterativeImputer(
            sample_posterior=True, max_iter=5, random_state=int(rng.integers(2**31))
        ).fit(z)
        draws = [imputer.transform(rows) for _ in range(20)]
    return table.loc + table.scale * np.stack(draws)


# prediction


def _prediction(key: Array, problem: Problem, size: Size) -> list[Row]:
    table, target = problem.table, problem.target
    kind, place = table.kinds[target], table.place(target)
    keys = jax.random.split(key, 3)
    rng = np.random.default_rng(np.asarray(jax.random.bits(keys[0], (4,))))
    train, test = (table.encode(data).x_0 for data in (problem.train, problem.test))
    test = test[: size.predicted_rows]
    seen = ~np.isnan(test)
    seen[:, place] = False
    inputs = [np.nan_to_num((np.delete(a, place, 1) - np.delete(table.loc, place))
              / np.delete(table.scale, place)) for a in (train, test)]  # fmt: skip
    y, truth = (np.asarray(kind.decode(a[:, place])) for a in (train, test))
    smc = conditioned(keys[1], problem, np.nan_to_num(test), seen, size)
    draws = {"SMC": np.asarray(kind.decode(_on_grid(table, smc)[..., place]))}
    draws["context"] = _by_context(keys[2], problem, inputs, train[:, place], len(smc), size)
    rival = _classes if isinstance(kind, tables.Category) else _numbers
    draws |= rival(rng, inputs, y, size)
    scores = {}
    for method, values in draws.items():
        if isinstance(kind, tables.Category):
            shares = np.stack([np.mean(values == k, 0) for k in range(len(kind.values))], 1)
            shown = np.eye(len(kind.values))[truth.astype(int)]
            scores[method] = 0.5 * np.sum((shares - shown) ** 2, 1)
        else:
            ordered = np.sort(values, 0)
            weight = 2 * np.arange(1, len(values) + 1)[:, None] - len(values) - 1
            pairs = np.sum(weight * ordered, 0) / len(values) ** 2
            scores[method] = np.mean(np.abs(values - truth), 0) - pairs
    spread = 1.0 if isinstance(kind, tables.Category) else _spread(kind, train[:, place])
    unit = "squared error of classes" if isinstance(kind, tables.Category) else "CRPS, sd"
    rivals = [m for m in scores if m not in ("SMC", "context")]
    best = min(rivals, key=lambda m: scores[m].mean())
    of = f"{problem.name}, {target} predicted"
    rows = [Row(f"{of}, {m}", *mean_and_se(s / spread), unit) for m, s in scores.items()]
    rows += [Row(f"{of}, {m} − {best}, paired", *mean_and_se((scores[m] - scores[best]) / spread),
                 unit) for m in ("SMC", "context")]  # fmt: skip
    if not isinstance(kind, tables.Category):
        rows += [Row(f"{of}, {m}: inside 90 %", *mean_and_se(_inside(rng, truth, values)), None,
                     0.9) for m, values in draws.items()]  # fmt: skip
    return rows


def _by_context(
    key: Array, problem: Problem, inputs: list[np.ndarray], z: np.ndarray, count: int, size: Size
) -> np.ndarray:
    """Draws of the target's own diffusion, the other columns its context."""
    table, place = problem.table, problem.table.place(problem.target)
    kind, keys = table.kinds[problem.target], jax.random.split(key, 3)
    own = Table({problem.target: problem.train[problem.target]}, kinds={problem.target: kind})
    x_0 = own.encode({problem.target: problem.train[problem.target]}, key=keys[0]).x_0
    network = networks.Perceptron(
        own.event_shape, width=128, depth=3, T=100, outputs=24, context_size=inputs[0].shape[1],
        rngs=rngs_of(keys[1]),
    )  # fmt: skip
    diffusion = Diffusion(
        GaussianKernel(), schedules.log_snr_linear(100, beta_1=1e-4, alpha_bar_T=1e-3), network,
        event_shape=own.event_shape, readout=readouts.Mixture(8), last_step=own.last_step,
        loc=table.loc[place], scale=table.scale[place], context_shape=inputs[0].shape[1:],
    )  # fmt: skip
    num_steps = size.num_steps or int(np.clip(60 * len(z) / 256, 1_000, 6_000))
    held_out = np.arange(len(z)) % 10 == 0
    rate = optax.adamw(optax.cosine_decay_schedule(1e-3, num_steps), weight_decay=1e-2)
    parts = [{"x_0": x_0[m], "context": inputs[0][m]} for m in (~held_out, held_out)]
    fitted = fit(
        keys[2], SVI(diffusion.model, diffusion.guide, rate, SampledTimeELBO()), parts[0],
        num_steps=num_steps, batch_size=min(256, len(parts[0]["x_0"])), ema_decay=0.999,
        held_out=parts[1], evaluate_every=max(1, num_steps // 10), patience=3, progress=False,
    )  # fmt: skip
    context = np.repeat(inputs[1], count, 0)
    found = sample.ancestral(keys[2], diffusion, fitted.params, len(context), context=context)
    return np.asarray(kind.decode(np.asarray(found, np.float64))).reshape(-1, count).T


def _numbers(
    rng: Any, inputs: list[np.ndarray], y: np.ndarray, size: Size
) -> dict[str, np.ndarray]:
    from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor

    seed = int(rng.integers(2**31))
    quantiles = [
        HistGradientBoostingRegressor(
            loss="quantile", quantile=level, max_iter=size.trees, early_stopping=True,
            random_state=seed,
        ).fit(inputs[0], y).predict(inputs[1]) for level in _LEVELS
    ]  # fmt: skip
    forest = RandomForestRegressor(size.trees, min_samples_leaf=5, random_state=seed, n_jobs=1)
    leaves, own = (forest.fit(inputs[0], y).apply(a) for a in (inputs[1], inputs[0]))
    drawn = np.empty((size.trees, len(leaves)))
    for tree in range(size.trees):
        for row, leaf in enumerate(leaves[:, tree]):
            drawn[tree, row] = rng.choice(y[own[:, tree] == leaf])
    return {"boosting": np.stack(quantiles), "forest": drawn}


def _classes(
    rng: Any, inputs: list[np.ndarray], y: np.ndarray, size: Size
) -> dict[str, np.ndarray]:
    """Classes in the shares that the rivals give them, as 1,000 draws."""
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

    seed, found = int(rng.integers(2**31)), {}
    for name, model in {
        "boosting": HistGradientBoostingClassifier(max_iter=size.trees, random_state=seed),
        "forest": RandomForestClassifier(size.trees, min_samples_leaf=5, random_state=seed),
    }.items():
        share = np.cumsum(model.fit(inputs[0], y).predict_proba(inputs[1]), 1)
        level = (np.arange(1_000)[:, None] + 0.5) / 1_000
        place = np.sum(level[..., None] > share, -1)
        found[name] = model.classes_[np.minimum(place, len(model.classes_) - 1)]
    return found


def _figure(rows: list[Row]) -> Figure:
    """Values with two standard errors, one line each."""
    figure, axes = plt.subplots(figsize=(7, 1 + 0.22 * len(rows)))
    places = np.arange(len(rows))[::-1]
    axes.errorbar(
        [float(r.value) for r in rows], places, xerr=[2 * float(r.se or 0) for r in rows], fmt="o",
        ms=3,
    )  # fmt: skip
    ceiling = rows[0].ceiling if rows else None
    axes.axvline(0.0 if ceiling is None else float(ceiling), color="grey", lw=0.8)
    axes.set_yticks(places, [row.row for row in rows], fontsize=7)
    axes.set_xlabel(rows[0].unit or "share" if rows else "")
    return figure
