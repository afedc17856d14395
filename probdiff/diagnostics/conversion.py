"""What was fitted or sampled as an ArviZ DataTree, with dims that are always right.

    SMC, Guided             their own `to_datatree`
    MCMC                    posterior, sample_stats, observed_data
    Fit, SVIRunResult       training: the loss of each step; held_out: that of each evaluation
      with svi=             the same, and draws of its guide as posterior, and observed_data

An axis has the name of the plate that makes it, wherever the plate stands, and the axes of an event
those of the diffusion they belong to:

    x_0                (…plates, x_0_dim_0, x_0_dim_1, …)
    x_0_trajectory     (…plates, step, x_0_dim_0, …)        step = 1..T, level t of the diffusion
    x_0_noise          (…plates, level, x_0_dim_0, …)       level = 0..n, or 1..n of the noise
                                                            of forward coordinates; `t` beside it

as in `SMC.to_datatree`. All other axes are `site_dim_i`. Where diffusions differ in length, or a
plate is called `step`, the name stands in front: `x_0_step`. ArviZ's own conversion forgets gaps
between plates, names the axes of a trajectory after the trajectory, so that they are not those of
x_0, and gives `lp` the sign of an energy; here `lp` is the log density.
"""

import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from arviz_base import from_dict
from jaxtyping import Array, ArrayLike
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive
from numpyro.infer.svi import SVIRunResult

from probdiff.arguments import check_at_least, check_key, check_object
from probdiff.infer.program import numbered, plate_dims, unwrapped
from probdiff.infer.smc import Sampler
from probdiff.reverse import DataGivenFirst
from probdiff.train import Fit
from probdiff.trajectories import TRAJECTORY_SUFFIX, ForwardTrajectory, ReverseTrajectory

_STATS = {
    "num_steps": "n_steps", "accept_prob": "acceptance_rate", "adapt_state.step_size": "step_size",
}  # fmt: skip
"""ArviZ's names of NumPyro's extra fields."""
_Site = dict[str, Any]


def to_datatree(
    source: MCMC | Sampler | Fit | SVIRunResult, *args: Any, svi: SVI | None = None,
    key: Array | None = None, num_draws: int = 500, **kwargs: Any,
) -> xr.DataTree:  # fmt: skip
    """A run as an ArviZ DataTree, NumPy arrays with named dims.

        to_datatree(mcmc)                                  # of any program, noncentered or not
        to_datatree(fitted)                                # losses
        to_datatree(fitted, x_0, svi=svi, key=key)         # and draws of the guide given x_0

    Args:
        source: `SMC`, `Guided` or NumPyro's `MCMC` that has run; what `fit` or `SVI.run` returned.
        args, kwargs: Arguments of the program of `svi`; a sampler has those of its run.
        svi: The SVI of a fit, for draws of its guide.
        key: Randomness of these draws.
        num_draws: Number of these draws.

    Returns:
        DataTree. An MCMC has `posterior` with its deterministic sites, `sample_stats` under ArviZ's
        names (`diverging`, and what `extra_fields` asked for) and `observed_data`, factors left
        out. A fit has `training` with `loss` by `step`, and `held_out` where there was some.

    Raises:
        ValueError: if the source has not run or holds no program, or arguments do not belong to it.

    Example:
        A fit of the rates alone, and draws of its guide, each axis under its own name:

        >>> diffusion = standard_diffusion((2,), 4, beta=schedules.learned(schedules.cosine(4)))
        >>> svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), Trace_ELBO())
        >>> x = jax.random.normal(jax.random.key(0), (100, 2))
        >>> fitted = svi.run(jax.random.key(1), 5, x, progress_bar=False)
        >>> tree = diagnostics.to_datatree(fitted, x, svi=svi, key=jax.random.key(2), num_draws=50)
        >>> dict(tree["posterior"]["x_0_trajectory"].sizes)
        {'chain': 1, 'draw': 50, 'data': 100, 'step': 4, 'x_0_dim_0': 2}
        >>> dict(tree["training"]["loss"].sizes)
        {'step': 5}
    """
    family = MCMC | Sampler | Fit | SVIRunResult
    check_object(family, "SMC, Guided or MCMC that has run, or a fit", source=source)
    check_key(key, or_none=True)
    check_object(SVI, "a numpyro.infer.SVI", or_none=True, svi=svi)
    check_at_least(1, num_draws=num_draws)
    if isinstance(source, Fit | SVIRunResult):
        return _of_fit(source, svi, key, num_draws, args, kwargs)
    if svi is not None or key is not None or args or kwargs:
        raise ValueError(
            "svi, key and arguments of a program must come with a fit; a sampler has those of its "
            f"run; got them with {type(source).__name__}"
        )
    return source.to_datatree() if isinstance(source, Sampler) else _of_mcmc(source)


def _of_mcmc(mcmc: MCMC) -> xr.DataTree:
    program = getattr(mcmc.sampler, "model", None)
    if program is None:
        raise ValueError(f"source must sample a program; got {type(mcmc.sampler).__name__} of none")
    if mcmc.last_state is None:
        raise ValueError("source must have run; there are no draws yet")
    # MCMC keeps what it ran on in these alone
    given = mcmc._args, mcmc._kwargs
    tree = _tree(_arrays(mcmc.get_samples(group_by_chain=True)), program, *given)
    fields = mcmc.get_extra_fields(group_by_chain=True)
    stats = _sample_stats(fields, isinstance(mcmc.sampler, NUTS))
    if stats:
        tree["sample_stats"] = _group("sample_stats", stats, {}, {})
    tree.attrs |= {
        "sampler": type(mcmc.sampler).__name__, "num_chains": mcmc.num_chains,
        "num_warmup": mcmc.num_warmup, "num_samples": mcmc.num_samples, "thinning": mcmc.thinning,
    }  # fmt: skip
    return tree


def _of_fit(
    fitted: Fit | SVIRunResult, svi: SVI | None, key: Array | None, num_draws: int,
    args: tuple, kwargs: dict,
) -> xr.DataTree:  # fmt: skip
    if (svi is None) != (key is None):
        alone = "key" if svi is None else "svi"
        raise ValueError(f"svi and key must be given together; got {alone} alone")
    if svi is None and (args or kwargs):
        raise ValueError("arguments of a program must come with svi; got none")
    tree = xr.DataTree(name="probdiff")
    if svi is not None:
        kwargs = svi.static_kwargs | kwargs
        model = handlers.substitute(svi.model, data=fitted.params)
        guide = Predictive(svi.guide, params=fitted.params, num_samples=num_draws)
        tree = _tree(_guide_draws(key, guide, model, args, kwargs), model, args, kwargs)
    losses = np.asarray(fitted.losses)
    tree["training"] = _losses(np.arange(1, len(losses) + 1), losses)
    if isinstance(fitted, Fit) and len(fitted.held_out_losses.step):
        tree["held_out"] = _losses(*fitted.held_out_losses)
    tree.attrs |= {"num_steps": len(losses)}
    return tree


def _losses(step: np.ndarray, loss: np.ndarray) -> xr.DataTree:
    attrs = {"units": "nats, summed as SVI sums them"}
    return xr.DataTree(xr.Dataset({"loss": ("step", loss)}, {"step": step}, attrs))


def _guide_draws(
    key: Array, guide: Predictive, model: Callable[..., Any], args: tuple, kwargs: dict
) -> dict[str, np.ndarray]:
    """Draws of the model's latent sites by the guide, and what the model makes of them."""
    key_guide, key_model = jax.random.split(key)
    draws = guide(key_guide, *args, **kwargs)
    sites: dict[str, _Site] = {}

    def look(key: Array) -> None:
        sites.update(handlers.trace(handlers.seed(model, key)).get_trace(*args, **kwargs))

    with handlers.block():
        jax.eval_shape(look, jax.random.key(0))
    latent = {
        name: a
        for name, a in draws.items()
        if name in sites and sites[name]["type"] == "sample" and not sites[name]["is_observed"]
    }
    rest = [name for name, site in sites.items() if site["type"] == "deterministic"]
    if rest:
        model = Predictive(model, posterior_samples=latent, return_sites=rest)
        latent |= model(key_model, *args, **kwargs)
    return {name: a[None] for name, a in _arrays(latent).items()}


# names of axes


class _Axes(NamedTuple):
    """Axes of a diffusion's x_0; T of its trajectory, levels t of its noise, where it has any."""

    x_dims: list[str]
    T: int | None
    times: np.ndarray | None


def _names(
    sites: dict[str, _Site],
) -> tuple[dict[str, list[str]], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Dims of every site, values along `step` and `level`, and levels t along those of walks."""
    plates = {frame.name for site in sites.values() for frame in site.get("cond_indep_stack", ())}
    diffusions = _diffusions(sites)
    step = _counter("step", {name: axes.T for name, axes in diffusions.items() if axes.T}, plates)
    walks = {name: tuple(a.times) for name, a in diffusions.items() if a.times is not None}
    level = _counter("level", walks, set())  # a plate of that name is called level_plate
    dims = {
        name: _site_dims(name, site, _event_dims(name, diffusions, step, level))
        for name, site in sites.items()
        if site["type"] in ("sample", "deterministic")
    }
    coords = {step[name]: np.arange(1, axes.T + 1) for name, axes in diffusions.items() if axes.T}
    coords |= {level[n]: np.arange(len(t)) + int(t[0] > 0) for n, t in walks.items()}
    return dims, coords, {level[name]: np.array(times) for name, times in walks.items()}


def _diffusions(sites: dict[str, _Site]) -> dict[str, _Axes]:
    """Diffusions in a program, by the name of x_0."""
    diffusions = {}
    for name, site in sites.items():
        if site["type"] != "sample":
            continue
        law, start = unwrapped(site["fn"]), site["infer"].get("start")
        if start is not None:
            x_dims = numbered(start.name, 0, start.reverse.event_dim)
            if start.times is not None:
                diffusions[start.name] = _Axes(x_dims, None, start.times)
        elif isinstance(law, ReverseTrajectory | ForwardTrajectory):
            x_name = name.removesuffix(TRAJECTORY_SUFFIX)
            diffusions[x_name] = _Axes(numbered(x_name, 0, law.x_dim), law.steps.T, None)
        elif isinstance(law, DataGivenFirst):
            diffusions.setdefault(name, _Axes(numbered(name, 0, law.event_dim), None, None))
    return diffusions


def _counter(word: str, lengths: Mapping[str, Hashable], taken: set[str]) -> dict[str, str]:
    """Name of the dim that counts each diffusion's levels: one for all where all are alike."""
    is_one = len(set(lengths.values())) == 1 and word not in taken
    return {name: word if is_one else f"{name}_{word}" for name in lengths}


def _event_dims(
    name: str, diffusions: dict[str, _Axes], step: dict[str, str], level: dict[str, str]
) -> list[str] | None:
    """Axes of an event that belongs to a diffusion; None of any other."""
    for x_name, axes in diffusions.items():
        if name == x_name or re.fullmatch(rf"{re.escape(x_name)}_trajectory_\d+", name):
            return axes.x_dims
        if name == x_name + TRAJECTORY_SUFFIX:
            return [step[x_name], *axes.x_dims]
        if name == f"{x_name}_noise" and x_name in level:
            return [level[x_name], *axes.x_dims]
    return None


def _site_dims(name: str, site: _Site, event: list[str] | None) -> list[str]:
    """Plates of a site, then the axes of its event."""
    shape, gap = _shape(site), name if event is None else "plate"  # what an axis of no plate is
    if site["type"] == "sample":
        first = len(shape) - site["fn"].event_dim
        event = event or site["infer"].get("event_dims")
    elif event is not None:
        first = len(shape) - len(event)
    else:
        first = _plates_of_value(site, shape)
    if event is None or len(event) != len(shape) - first:
        event = numbered(name, first, len(shape))
    return plate_dims(site["cond_indep_stack"], gap, shape[:first]) + list(event)


def _plates_of_value(site: _Site, shape: tuple[int, ...]) -> int:
    """Leading axes of a deterministic value that its plates make; 0 unless all of them fit."""
    frames = site["cond_indep_stack"]
    count = max((-frame.dim for frame in frames), default=0)
    fits = count <= len(shape) and all(shape[count + f.dim] == f.size for f in frames)
    return count if fits else 0


def _shape(site: _Site) -> tuple[int, ...]:
    """Shape of a site's value; of an observed one with its plates."""
    shape = jnp.shape(site["value"])
    return shape if site["type"] != "sample" else jnp.broadcast_shapes(site["fn"].shape(), shape)


# groups


def _tree(
    draws: dict[str, np.ndarray], program: Callable[..., Any], args: tuple, kwargs: dict
) -> xr.DataTree:
    """Groups `posterior` and `observed_data`, their axes named as the program names them."""
    named: list[Any] = []

    def look(key: Array, values: dict[str, Array]) -> dict[str, Array]:
        run = handlers.substitute(handlers.seed(program, key), data=values)
        sites = handlers.trace(run).get_trace(*args, **kwargs)
        named[:] = _names(sites)
        return {
            name: jnp.broadcast_to(site["value"], _shape(site))
            for name, site in sites.items()
            if site["type"] == "sample" and site["is_observed"]
            if not isinstance(unwrapped(site["fn"]), dist.Unit)
        }

    first = {name: a[0, 0] for name, a in draws.items()}
    with handlers.block():  # compiled: what is not returned is not run
        observed = _arrays(jax.jit(look)(jax.random.key(0), first))
    dims, coords, times = named
    tree = xr.DataTree(name="probdiff")
    tree["posterior"] = _group("posterior", draws, dims, coords)
    for dim, levels in times.items():
        if dim in tree["posterior"].dims:
            t = dim.removesuffix("level") + "t"
            posterior = tree["posterior"].to_dataset().assign_coords({t: (dim, levels)})
            tree["posterior"] = xr.DataTree(posterior)
    if observed:
        tree["observed_data"] = _group("observed_data", observed, dims, {})
    tree.attrs = {"inference_library": "numpyro", "inference_library_version": numpyro.__version__}
    return tree


def _group(
    name: str, data: dict[str, np.ndarray], dims: dict[str, list[str]],
    coords: dict[str, np.ndarray],
) -> xr.DataTree:  # fmt: skip
    dims = {key: dims[key] for key in data if key in dims}
    used = {dim for names in dims.values() for dim in names}
    coords = {dim: values for dim, values in coords.items() if dim in used}
    return from_dict({name: data}, dims=dims, coords=coords, check_conventions=False)[name]


def _sample_stats(fields: dict[str, Any], has_trees: bool) -> dict[str, np.ndarray]:
    """Extra fields under ArviZ's names; those that are no arrays are left out."""
    is_array = {name: isinstance(value, Array | np.ndarray) for name, value in fields.items()}
    fields = _arrays({name: value for name, value in fields.items() if is_array[name]})
    stats = {_STATS.get(name, name): value for name, value in fields.items()}
    if "potential_energy" in stats:
        stats["lp"] = -stats.pop("potential_energy")
    if has_trees and "n_steps" in stats:
        stats["tree_depth"] = np.log2(stats["n_steps"]).astype(int) + 1
    return stats


def _arrays(values: dict[str, ArrayLike]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in values.items()}
