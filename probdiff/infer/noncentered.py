"""`noncentered`: a program over the noise of its reverse trajectories, for `MCMC(NUTS(...))`.

A reverse trajectory of numbers is a smooth map of standard normal noise z_0..z_T,

    x_T = z_T,    x_s = μ_t(x_t) + σ_t(x_t) z_s    for t = T..1, s = t − 1,

so that x_0 ~ p and everything below it is as before, while the latent site is z, "x_0_noise", of
event shape `(T + 1, *event_shape)` with level t at index t. The prior of z is N(0, I) whatever the
rates: for N(0, 1) data in two dimensions, T = 40 and a likelihood of standard deviation 0.15, NUTS
took 31 leapfrog steps an iteration over z, and 46, 91, 213 over x_1..x_T at β_1 = 1e-2, 1e-3, 1e-4
(log_snr_linear), though each of those is one batched network call instead of T calls in turn.
x_0 is deterministic and recorded; the trajectory is not, T times as large. With `steps=n` the map
is that of the n-step diffusion, another model than the T-step one, as in `SMC`.

NUTS crosses between modes poorly. `initial_noise` starts chains at draws of `SMC`: from each x_0
a trajectory is drawn forward, and the reverse steps are solved for the noise,

    x_t ~ q(· | x_s),    z_s = (x_s − μ_t(x_t)) / σ_t(x_t),    z_T = x_T.

Sources: Sohl-Dickstein et al. (2015), section 2.2; Papaspiliopoulos et al. (2007) for noncentering.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.primitives import Messenger

from probdiff.arguments import (
    check_at_least,
    check_callable,
    check_key,
    check_object,
    plain,
    shape_text,
)
from probdiff.infer.program import Program, Site, changed, given, refuse, unexpanded
from probdiff.prior import check_counted
from probdiff.reverse import Reverse
from probdiff.trajectories import TRAJECTORY_SUFFIX, SampledTimes

_Noise = Float[Array, "levels *shape"]
_State = Float[Array, "*shape"]


def noncentered(program: Program, *, steps: int | None = None) -> Program:
    """The same program over the noise of its priors: `MCMC(NUTS(noncentered(program)))`.

    Any number of priors, and any other latent sites, which NUTS infers along. A prior `x_0` has the
    sites `x_0_noise`, standard normal with event shape `(n + 1, *event_shape)` under the plates of
    the prior, and `x_0`, deterministic. Where entries are known, the factor `x_0_known` stays and
    their part of the noise z_0 has no effect.

    Args:
        program: A program that calls priors of numbers; condition it before, on what it observes.
        steps: Steps n of the diffusion, in 2..T; all T if absent. Fewer are another, coarser model,
            whose posteriors may be narrower by a quarter.

    Returns:
        A program with the arguments of `program`. When called it raises a `ValueError` if it meets
        no prior, one of symbols or of numbers on a grid, one whose density a handler or a
        subsampling plate changes, or one whose trajectory or x_0 has a value from a handler, or an
        unbound parameter. An x_0 that `condition` observes is one more observation, where none of
        its entries is known.

    Example:
        >>> prior = standard_diffusion(T=4).prior({})  # x_0 ~ N(0, 1)
        >>> program = lambda y: numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> options = {"num_warmup": 200, "num_samples": 1000, "progress_bar": False}
        >>> mcmc = MCMC(NUTS(infer.noncentered(program)), **options)
        >>> mcmc.run(jax.random.key(0), y=2.0)
        >>> draws = mcmc.get_samples()
        >>> draws["x_0_noise"].shape  # levels 0..4
        (1000, 5)
        >>> abs(float(draws["x_0"].mean()) - 1.0) < 0.2  # y/2
        True
    """

    check_callable("program(*args)", program=program)
    check_at_least(1, or_none=True, steps=steps)
    return over(program, lambda: _Retreat(steps))


def initial_noise(
    key: Array, program: Program, draws: dict[str, Any], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Where to start chains, `MCMC.run(init_params=...)`, so that they are at given x_0.

    Args:
        key: Randomness, of the trajectories: equal x_0 differ in their noise.
        program: What `noncentered` returned.
        draws: Values of all its other latent sites and of x_0 by site name, `(num_chains, ...)`;
            x_0 in the user's units, `(num_chains, *plates, *event_shape)`. Other names are not
            read.
        args: Arguments of the program.
        kwargs: Keyword arguments of the program.

    Returns:
        Unconstrained values of every latent site, `(num_chains, ...)`; without that axis where
        there is one chain, as `MCMC.run` expects.

    Raises:
        ValueError: if values are missing, or their shapes do not fit.

    Example:
        Two chains that are to start at x_0 = −1.5 and 1.5, say draws of `SMC`:

        >>> prior = standard_diffusion(T=4).prior({})  # x_0 ~ N(0, 1)
        >>> program = lambda y=None: numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> over_noise = infer.noncentered(program)
        >>> x_0 = jnp.array([-1.5, 1.5])
        >>> start = infer.initial_noise(jax.random.key(0), over_noise, {"x_0": x_0}, y=2.0)
        >>> {name: value.shape for name, value in start.items()}  # MCMC.run(init_params=start)
        {'x_0_noise': (2, 5)}
        >>> there = Predictive(over_noise, start)(jax.random.key(1))["x_0"]
        >>> bool(jnp.allclose(there, x_0, atol=1e-4))
        True
    """
    check_key(key)
    check_callable("what noncentered returned", program=program)
    check_object(dict, "a dict of arrays by site name", draws=draws)
    draws = {name: jnp.asarray(plain(name, value)) for name, value in draws.items()}
    counts = {value.shape[:1] for value in draws.values()}
    if len(counts) != 1 or () in counts or (0,) in counts:
        shapes = {name: value.shape for name, value in draws.items()}
        raise ValueError(f"draws must have one row for each chain; got shapes {shapes}")

    def start(key: Array, values: dict) -> dict:
        choose = functools.partial(_value, draws=values)
        run = handlers.substitute(handlers.seed(program, key), substitute_fn=choose)
        with handlers.block():
            sites = handlers.trace(run).get_trace(*args, **kwargs)
        latent = {name: site for name, site in sites.items() if _is_latent(site)}
        return {n: biject_to(site["fn"].support).inv(site["value"]) for n, site in latent.items()}

    ((num_chains,),) = counts
    if num_chains == 1:
        return jax.jit(start)(key, {name: value[0] for name, value in draws.items()})
    return jax.jit(jax.vmap(start))(jax.random.split(key, num_chains), draws)


class Start(NamedTuple):
    """How a chain starts at a given x_0; kept with the site that stands in its place."""

    name: str  # of x_0
    reverse: Reverse
    lead: tuple[int, ...]  # shape of the plates around the prior
    times: np.ndarray | None  # of the levels of a noise, t = 0 the data
    value: Callable[[Array, Array], Array]  # of the site, from a key and x_0 in the user's units

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of x_0."""
        return (*self.lead, *self.reverse.event_shape)


def over(program: Program, make: "Callable[[], Reparametrised]") -> Program:
    """The program with its priors replaced."""

    def replaced(*args: Any, **kwargs: Any) -> Any:
        messenger = make()
        with messenger:
            value = program(*args, **kwargs)
        if not messenger.count:
            raise ValueError("program must call a prior made by Diffusion.prior; got none")
        return value

    return replaced


class Reparametrised(Messenger):
    """Puts other latent sites, and what follows from them, in place of a prior's; abstract.

    `stop` hides the two from all handlers outside.
    """

    def __init__(self, steps: int | None):
        super().__init__()
        self.steps, self.count = steps, 0

    @abc.abstractmethod
    def put_trajectory(self, msg: Site, reverse: Reverse) -> Array:
        """Draw what stands in place of the trajectory; x_1, `(*plates, *event_shape)`."""

    @abc.abstractmethod
    def put_data(self, msg: Site, reverse: Reverse) -> Array | None:
        """x_0 in the user's units; None where the site stays as it is."""

    def process_message(self, msg: Site) -> None:
        """Replace the sites of a prior."""
        if msg["type"] == "param" and msg["value"] is None:
            raise ValueError(
                f"param {msg['name']!r} is unbound in the program, and MCMC would keep its initial "
                "value. Give it one inside noncentered, by numpyro.handlers.substitute(program, "
                "data=params)"
            )
        if msg["type"] != "sample":
            return
        if "prior" in msg["infer"]:
            _check(msg)
            self.count += 1
            reverse = msg["infer"]["prior"].reverse.respaced(self.steps)
            x_1 = self.put_trajectory(msg, reverse)
            msg["value"], msg["stop"] = _only(x_1, len(msg["fn"].batch_shape)), True
        elif "data_of" in msg["infer"]:
            draw = msg["infer"]["data_of"]
            x_0 = self.put_data(msg, draw.reverse.respaced(self.steps))
            if x_0 is not None:
                refuse(changed(msg) or given(msg))
                msg["value"], msg["stop"] = x_0, True
                numpyro.deterministic(draw.name, x_0)


class _Retreat(Reparametrised):
    """Puts noise in place of a prior's trajectory."""

    def __init__(self, steps: int | None):
        super().__init__(steps)
        self.noise_0: dict[int, Array] = {}  # of each draw of a prior

    def put_trajectory(self, msg: Site, reverse: Reverse) -> Array:
        draw, lead = msg["infer"]["prior"], msg["fn"].batch_shape
        name = msg["name"].removesuffix(TRAJECTORY_SUFFIX)  # with the prefix of a scope

        def noise_of(key: Array, x_0: Array) -> Array:
            noise = _noise_of_data(key, reverse, reverse.to_state(x_0))
            return jnp.moveaxis(noise, 0, len(lead))

        event_dim = 1 + reverse.event_dim
        shape = (*lead, reverse.n + 1, *reverse.event_shape)
        normal = dist.Normal(0.0, 1.0) if draw.known is None else _NoiseOfKnown(name)
        law = normal.expand(shape).to_event(event_dim)
        infer = {"start": Start(name, reverse, lead, np.append(0, reverse.times), noise_of)}
        noise = jnp.moveaxis(numpyro.sample(f"{draw.name}_noise", law, infer=infer), -event_dim, 0)
        self.noise_0[id(draw)] = noise[0]
        return _x_1_of_noise(reverse, noise)

    def put_data(self, msg: Site, reverse: Reverse) -> Array | None:
        draw, law = msg["infer"]["data_of"], unexpanded(msg["fn"])
        if msg["is_observed"] and draw.known is None:
            return None
        x_0 = law.units.to_data(law.base.loc + law.base.scale * self.noise_0[id(draw)])
        return x_0 if draw.known is None else jnp.where(draw.mask, draw.known, x_0)


class _NoiseOfKnown(dist.Normal):
    """N(0, 1), not to be drawn by `Predictive`, as the prior over it is not."""

    pytree_aux_fields = ("name",)

    def __init__(self, name: str):
        super().__init__(0.0, 1.0)
        self.name = name

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        check_counted(self.name)
        return super().sample(key, sample_shape)


def _x_1_of_noise(reverse: Reverse, noise: _Noise) -> _State:
    """x_1 from the noise z_0..z_n, levels in front, on the scale of the diffusion.

    Steps are computed again for the gradient: one level is kept for each, nothing of the network.
    """

    def retreat(x_t: _State, inputs: tuple) -> tuple:
        t, z_s = inputs
        law = reverse.step(x_t, t)
        return law.loc + law.scale * z_s, None

    again = jax.checkpoint(retreat, prevent_cse=False)  # a scan keeps the two apart by itself
    t = jnp.arange(2, reverse.n + 1)
    return jax.lax.scan(again, noise[-1], (t, noise[1:-1]), reverse=True)[0]


def _noise_of_data(key: Array, reverse: Reverse, x_0: _State) -> _Noise:
    """One noise z_0..z_n, levels in front, that leads to x_0 (on the scale of the diffusion)."""
    kernel, keys = reverse.kernel, jax.random.split(key, reverse.n)

    def climb(x_s: _State, inputs: tuple) -> tuple:
        t, key = inputs
        x_t = kernel.transition(x_s, reverse.coefficients(t)).sample(key)
        return x_t, _solve(reverse.step(x_t, t), x_s)

    x_1 = kernel.transition(x_0, reverse.coefficients(1)).sample(keys[0])
    z_0 = _solve(reverse.last(x_1), x_0)
    x_n, z = jax.lax.scan(climb, x_1, (jnp.arange(2, reverse.n + 1), keys[1:]))
    return jnp.concatenate([z_0[None], z, x_n[None]])


def _solve(law: dist.Distribution, x_s: _State) -> _State:
    return (x_s - law.loc) / law.scale


def _only(x_1: _State, lead_dim: int) -> SampledTimes:
    """A trajectory of which x_1 is kept, all that a prior reads of it."""
    none = jnp.zeros((0, *x_1.shape[:lead_dim]))
    return SampledTimes(x_1, jnp.zeros((0, *x_1.shape)), none.astype(jnp.int32), none)


def _check(msg: Site) -> None:
    draw = msg["infer"]["prior"]
    reverse = draw.reverse
    if reverse.kernel.is_discrete or reverse.grid is not None:
        numbers, other = "numbers that are", f"numbers on a grid, {reverse.last_step}"
        if reverse.kernel.is_discrete:
            numbers, other = "numbers, which are", f"symbols, {reverse.kernel}"
        raise ValueError(
            f"prior {draw.name!r} must be one of {numbers} smooth in their noise; got {other}. Use "
            "infer.SMC"
        )
    refuse(given(msg) or changed(msg))


def _is_latent(site: Site) -> bool:
    """Whether NUTS walks over the site: it sums over discrete ones."""
    is_drawn = site["type"] == "sample" and not site["is_observed"]
    return is_drawn and not site["fn"].support.is_discrete


def _value(site: Site, draws: dict) -> Any:
    """Value of a latent site of a noncentered program."""
    if not _is_latent(site):
        return None
    start = site["infer"].get("start")
    name = site["name"] if start is None else start.name
    if name not in draws:
        raise ValueError(
            f"draws must hold every latent site and every prior; {name!r} is missing from "
            f"{sorted(draws)}"
        )
    shape = site["fn"].shape() if start is None else start.shape
    if draws[name].shape != shape:
        raise ValueError(
            f"draws[{name!r}] must have shape {shape_text('num_chains', shape)}; "
            f"got {shape_text('num_chains', draws[name].shape)}"
        )
    return draws[name] if start is None else start.value(site["kwargs"]["rng_key"], draws[name])
