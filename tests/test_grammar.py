"""Programs made at random from a small grammar, whose posteriors are exact, under `SMC`.

A program calls a prior x_0 ~ N(loc, scale²) once, maybe with known entries, in plates or in none,
and observes affine maps of it,

    log r(x) = Σ w log N(y; a·x + c, σ²),

w being what masks, scales and plates make of a row: so posterior and evidence have closed forms,
written here in NumPy and float64. Handlers stand inside and around it. Each program must be right,
refused by a `ValueError` that names what is wrong, or warned of; what may be answered is never
refused, and what has no answer always.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

from probdiff import infer, standard_diffusion
from probdiff.infer.program import read

PARTICLES, RUNS, T = 64, 16, 2
FLOOR = 0.02
"""Nats, and standard deviations: what is allowed beside four standard errors."""
DEFAULT, LONG, ALL = 12, 60, 252  # programs
SAMPLED = 5
"""Every such program is sampled, which compiles for seconds; of all others r is compared alone."""
SIGMA = 0.7
LOG_P_SIGMA = math.log(2 / math.pi) / 2 - SIGMA**2 / 2  # half-normal


@dataclasses.dataclass(frozen=True)
class Site:
    """One observed site: rows a·x + c ~ N(y, σ²), or the same as a factor."""

    name: str
    form: str  # "sum", "rows" or "entries" of x_0
    is_factor: bool
    repeats: int  # size of a plate of its own, 0 for none
    mask: str  # "", "handler", "law"
    scale: float  # 1 for none
    link: bool  # through a deterministic site
    given: str  # "obs", "condition"
    a: np.ndarray  # (m, d)
    c: np.ndarray  # (m,)
    sigma: np.ndarray  # (m,)
    y: np.ndarray  # (*repeats, *around, m)
    seen: np.ndarray  # mask of y's shape; of its rows alike where a handler puts it


@dataclasses.dataclass(frozen=True)
class Program:
    """What is said, and by which handlers it is changed; `fault` is what makes it wrong."""

    prior: str
    around: tuple[int, ...]
    sites: tuple[Site, ...]
    known: np.ndarray | None
    mask: np.ndarray | None
    noise: str  # "number", "substitute", "condition" or "param": where the first site has σ from
    handler: str
    fault: str
    order: int = 0  # of the plates' dims: by hand or not


PRIORS = {
    "number": ((), 0.0, 1.0),
    "pair": ((2,), 0.0, 1.0),
    "units": ((2,), np.array([3.0, -20.0]), np.array([0.5, 4.0])),
}


@functools.cache
def prior_of(name):
    shape, loc, scale = PRIORS[name]
    options = {} if np.isscalar(loc) else {"loc": loc, "scale": scale}
    return standard_diffusion(shape, T=T, **options).prior({})


HANDLERS = ["", "", "", "scope", "seed", "do", "hide", "beside"]
FAULTS = {
    "condition x_0": "'x_0' must be left to its prior",
    "substitute trajectory": "'x_0_trajectory' must be left to its prior",
    "do trajectory": "'x_0_trajectory' must not be replaced",
    "mask all": "must keep its density at site 'x_0_trajectory'",
    "scale all": "must keep its density at site 'x_0_trajectory'",
    "scale prior": "must keep its density at site 'x_0_trajectory'",
    "hide x_0": r"sites \['x_0'\] must be seen|got no call|prng_key",
    "latent": "latent site 'tau' must have a value",
    "param": "param 'tau' is unbound",
    "twice": "exactly once; got 'x_0_trajectory' twice",
    "subsample": "plate 'rows' must not be subsampled",
    "delta": "'exact' must have a density; got a Delta",
    "batch": "'batch' must lie in a plate of size 4",
    "outside": "'late' must lie inside the plates",
    "coupled": "must keep the entries of the plates .* apart",
    "draws": "must say the same each time",
    "key": "must not draw by numpyro.prng_key",
    "shape": "must have values of shape|broadcast|shape",
}
NEED_PLATES = {"outside", "coupled"}


def make(seed):
    """A program of the grammar."""
    rng = np.random.default_rng(seed)
    prior = rng.choice(list(PRIORS))
    around = [(), (), (3,), (2, 3)][rng.integers(4)]
    fault = str(rng.choice(list(FAULTS))) if rng.random() < 0.3 else ""
    if fault in NEED_PLATES and not around:
        around = (3,)
    shape, loc, scale = PRIORS[prior]
    d = int(np.prod(shape))
    known = mask = None
    if shape and rng.random() < 0.25:
        mask = np.array([True, False]) ^ bool(rng.integers(2))
        mask = np.broadcast_to(mask, (*around, 2)).copy()
        known = (loc + scale * rng.normal(size=(*around, 2))).astype(np.float32)
    sites = tuple(
        _site(rng, f"y{i}", d, around, shape, scale, loc) for i in range(rng.integers(1, 4))
    )
    noise = str(rng.choice(["number", "number", "substitute", "condition", "param"]))
    if sites[0].is_factor or (noise == "condition" and around):
        noise = "number"
    handler = str(rng.choice(HANDLERS)) if not fault else ""
    if handler == "do" and known is not None:
        handler = ""
    return Program(prior, around, sites, known, mask, noise, handler, fault, int(rng.integers(2)))


def _site(rng, name, d, around, shape, scale, loc):
    form = str(rng.choice(["sum", "rows", "entries"] if shape else ["sum"]))
    m = {"sum": 1, "rows": int(rng.integers(1, 3)), "entries": d}[form]
    a = {"sum": np.ones((1, d)), "rows": rng.normal(size=(m, d)), "entries": np.eye(d)}[form]
    a = a / np.broadcast_to(scale, d) if form == "rows" else a  # of like size in all units
    c = rng.normal(size=m) if form == "rows" else np.zeros(m)
    size = np.sqrt((a**2 * np.broadcast_to(scale, d) ** 2).sum(1))
    is_factor = bool(rng.random() < 0.25)
    sigma = np.full(m, SIGMA) if name == "y0" and not is_factor else size * rng.uniform(0.2, 2, m)
    repeats = int(rng.choice([0, 0, 2]))
    lead = (*(repeats,) * (repeats > 0), *around)
    centre = a @ np.broadcast_to(loc, d) + c
    y = centre + np.hypot(size, sigma) * rng.normal(size=(*lead, m))
    mask = str(rng.choice(["", "", "handler", "law"]))
    seen = np.ones(y.shape, bool)
    if mask:
        seen = rng.random(lead if mask == "handler" or is_factor else y.shape) < 0.6
        seen = np.broadcast_to(seen if seen.shape == y.shape else seen[..., None], y.shape)
    mask = "handler" if mask and is_factor else mask
    if mask and not is_factor and rng.random() < 0.5:
        y = np.where(seen, y, np.nan)
    given = "condition" if rng.random() < 0.2 and not is_factor else "obs"
    return Site(
        name, form, is_factor, repeats, mask, float(rng.choice([1.0, 1.0, 0.5, 3.0])),
        bool(rng.random() < 0.3), given, a.astype(np.float32), c.astype(np.float32),
        sigma.astype(np.float32), y.astype(np.float32), seen,
    )  # fmt: skip


# What it says to NumPyro.


def spoken(of):
    """The program as a function without arguments, its handlers around it."""
    prior = prior_of(of.prior)

    def program():
        sigma = noise_of(of)
        if of.fault == "latent":
            numpyro.sample("tau", dist.HalfNormal(1.0))
        if of.fault == "param":
            numpyro.param("tau", 1.0)
        with contextlib.ExitStack() as stack:
            for i, size in enumerate(reversed(of.around)):
                dim = -1 - i if of.order else None
                stack.enter_context(numpyro.plate(f"around{i}", size, dim=dim))
            x = called(of, prior)
            if of.handler == "beside":
                numpyro.handlers.scope(prior, prefix="other")()
            if of.fault == "twice":
                prior()
            for site in of.sites:
                observe(of, site, x, sigma if site.name == "y0" else site.sigma)
            inside_fault(of, x)
        if of.fault == "outside":
            numpyro.sample("late", dist.Normal(jnp.sum(x), 1.0), obs=0.0)

    return wrapped(of, program)


def called(of, prior):
    known = {} if of.known is None else {"known": of.known, "mask": of.mask}
    if of.fault == "scale prior":
        with handlers.scale(scale=2.0):
            return prior(**known)
    return prior(**known)


def noise_of(of):
    site = of.sites[0]
    if of.noise == "number":
        return site.sigma
    if of.noise == "param":
        return numpyro.param("sigma", 3.0) * jnp.ones(len(site.sigma))
    return numpyro.sample("sigma", dist.HalfNormal(1.0)) * jnp.ones(len(site.sigma))


def observe(of, site, x, sigma):
    x = x[..., None] if not PRIORS[of.prior][0] else x
    if site.form == "entries":
        mean = x
    elif site.form == "sum":
        mean = x.sum(-1)
    else:
        mean = x @ site.a.T + site.c
    if site.link:
        mean = numpyro.deterministic(f"mean_{site.name}", mean)
    has_event = site.form != "sum"
    y, seen = (v if has_event else v[..., 0] for v in (site.y, site.seen))
    sigma = sigma if has_event else sigma[0]
    with contextlib.ExitStack() as stack:
        if site.repeats:
            dim = -1 - len(of.around) if of.order else None
            stack.enter_context(numpyro.plate(f"own_{site.name}", site.repeats, dim=dim))
        if site.mask == "handler":
            by_row = seen[..., 0] if has_event else seen
            stack.enter_context(handlers.mask(mask=by_row))
        if site.scale != 1:
            stack.enter_context(handlers.scale(scale=site.scale))
        if site.is_factor:
            terms = -0.5 * ((y - mean) / sigma) ** 2
            numpyro.factor(site.name, terms.sum(-1) if has_event else terms)
            return
        law = dist.Normal(mean, sigma)
        if site.mask == "law":
            law = law.expand(y.shape).mask(seen)
        law = law.to_event(1) if has_event else law
        numpyro.sample(site.name, law, obs=None if site.given == "condition" else y)


def inside_fault(of, x):
    number = x if not PRIORS[of.prior][0] else x[..., 0]
    if of.fault == "subsample":
        with numpyro.plate("rows", 10, subsample_size=5):
            numpyro.sample("some", dist.Normal(number, 1.0), obs=0.0)
    elif of.fault == "delta":
        numpyro.sample("exact", dist.Delta(number), obs=jnp.zeros(of.around))
    elif of.fault == "batch":
        law = dist.Normal(jnp.broadcast_to(number, (4, *of.around) if of.around else (4,)), 1.0)
        numpyro.sample("batch", law, obs=np.zeros(law.batch_shape, np.float32))
    elif of.fault == "coupled":
        numpyro.sample("far", dist.Normal(number + 0.3 * number[..., ::-1], 1.0), obs=0.0)
    elif of.fault == "draws":
        numpyro.sample("noisy", dist.Normal(number + np.random.normal(), 1.0), obs=0.0)
    elif of.fault == "key":
        noise = jax.random.normal(numpyro.prng_key())
        numpyro.sample("noisy", dist.Normal(number + noise, 1.0), obs=0.0)
    elif of.fault == "shape":
        numpyro.sample("odd", dist.Normal(number, 1.0), obs=np.zeros((7, *of.around[1:])))


def wrapped(of, program):
    """Handlers around the program, those that give values first."""
    values = {
        s.name: (s.y if s.form != "sum" else s.y[..., 0])
        for s in of.sites
        if s.given == "condition"
    }
    if of.noise == "condition":
        values["sigma"] = SIGMA
    program = handlers.condition(program, values) if values else program
    if of.noise in ("substitute", "param"):
        program = handlers.substitute(program, {"sigma": SIGMA})
    shape = (*of.around, *PRIORS[of.prior][0])
    trajectory = {"x_0_trajectory": jnp.ones((T, *shape))}
    changes = {
        "scope": lambda p: handlers.scope(p, prefix="outer"),
        "seed": lambda p: handlers.seed(p, 3),
        "do": lambda p: handlers.do(p, {"x_0": intervention(of)}),
        "hide": lambda p: handlers.block(p, hide=[of.sites[-1].name]),
        "condition x_0": lambda p: handlers.condition(p, {"x_0": jnp.ones(shape)}),
        "substitute trajectory": lambda p: handlers.substitute(p, trajectory),
        "do trajectory": lambda p: handlers.do(p, trajectory),
        "mask all": lambda p: handlers.mask(p, mask=False),
        "scale all": lambda p: handlers.scale(p, 2.0),
        "hide x_0": lambda p: handlers.block(p, hide=["x_0"]),
    }
    return changes.get(of.handler or of.fault, lambda p: p)(program)


def intervention(of):
    shape, loc, scale = PRIORS[of.prior]
    return jnp.broadcast_to(jnp.asarray(loc + 0.5 * np.asarray(scale)), (*of.around, *shape))


# What it means.


def exact(of):
    """log Z, means and standard deviations, the systems in front; float64."""
    shape, loc, scale = PRIORS[of.prior]
    d, B = int(np.prod(shape)), int(np.prod(of.around))
    loc, scale = (np.broadcast_to(np.asarray(v, float), d) for v in (loc, scale))
    log_z, means, sds = np.zeros(B), np.zeros((B, d)), np.zeros((B, d))
    for b in range(B):
        free = np.ones(d, bool)
        at = np.zeros(d)
        if of.known is not None:
            free = ~of.mask.reshape(B, d)[b]
            at = np.where(free, 0.0, of.known.reshape(B, d)[b])
            log_z[b] += log_normal(at, loc, scale)[~free].sum()
        precision, pull = np.diag(scale[free] ** -2), loc[free] / scale[free] ** 2
        const = -0.5 * ((loc / scale) ** 2 + np.log(2 * np.pi * scale**2))[free].sum()
        if of.handler == "do":
            at, free_now = np.asarray(intervention(of), float).reshape(B, d)[b], np.zeros(d, bool)
        else:
            free_now = free
        for a, c, sigma, y, w, is_normal in rows(of, b):
            gap, a_free = y - c - a[~free_now] @ at[~free_now], a[free_now]
            const += w * (-0.5 * (gap / sigma) ** 2)
            const -= w * is_normal * 0.5 * np.log(2 * np.pi * sigma**2)
            if free_now.any():
                precision = precision + w * np.outer(a_free, a_free) / sigma**2
                pull = pull + w * a_free * gap / sigma**2
        mean = np.linalg.solve(precision, pull)
        k = int(free.sum())
        log_z[b] += const + 0.5 * pull @ mean + 0.5 * k * np.log(2 * np.pi)
        log_z[b] -= 0.5 * np.linalg.slogdet(precision)[1]
        means[b], sds[b] = at if of.handler != "do" else loc, 0.0
        means[b][free] = mean
        sds[b][free] = np.sqrt(np.diag(np.linalg.inv(precision)))
    if of.noise == "condition":
        log_z += LOG_P_SIGMA
    return log_z, means, sds


def rows(of, b):
    """Rows (a, c, σ, y, w, whether they are normalised) that system b is observed by."""
    hidden = of.sites[-1].name if of.handler == "hide" else ""
    for site in of.sites:
        if site.name == hidden:
            continue
        m, B = len(site.sigma), int(np.prod(of.around))
        y, seen = (v.reshape(-1, B, m)[:, b] for v in (site.y, site.seen))
        for r in range(len(y)):
            for i in range(m):
                if seen[r, i]:
                    yield (
                        site.a[i].astype(float), float(site.c[i]), float(site.sigma[i]),
                        float(y[r, i]), site.scale, not site.is_factor,
                    )  # fmt: skip


def log_normal(x, mean, sd):
    return -0.5 * ((x - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)


# How it ends.


def outcome(of, is_sampled=True):
    """How a program ends, "right", "refused", "warned" or "wrong", and what there is to say."""
    program, smc = spoken(of), None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if is_sampled or of.fault:
                smc = infer.SMC(program, num_particles=PARTICLES, num_runs=RUNS)
                smc.run(jax.random.key(0))
            gaps = " ".join(differences_of_r(of, program) if smc is None else differences(of, smc))
        except ValueError as error:
            is_named = of.fault and re.search(FAULTS[of.fault], str(error))
            return ("refused" if is_named else "wrong"), f"{of.fault}: {error}"
    if of.fault:
        return "wrong", f"{of.fault}: answered log Z = {smc.log_evidence}"
    if not gaps:
        return "right", ""
    texts = [str(w.message) for w in caught]
    return ("warned" if texts else "wrong"), f"{gaps} {texts}"


def differences_of_r(of, program):
    """Where log r is not what it should be, at three draws of the prior."""
    shape, loc, scale = PRIORS[of.prior]
    log_r = jax.jit(read(program, (), {}).conditioned.log_r)
    d, B = int(np.prod(shape)), int(np.prod(of.around))
    for seed in range(3):
        draw = np.random.default_rng(seed).normal(size=(*of.around, *shape))
        x = (loc + scale * draw).astype(np.float32)
        both = np.repeat(x.reshape(*of.around, 1, d), 2, -2).reshape(*of.around, 2 * d)
        found = np.ravel(log_r(both if of.handler == "beside" else x))
        x = x if of.known is None else np.where(of.mask, of.known, x)
        at = (x if of.handler != "do" else np.asarray(intervention(of))).astype(float)
        expected = np.zeros(B) + (of.noise == "condition") * LOG_P_SIGMA
        for b, x_b in enumerate(at.reshape(B, d)):
            for a, c, sigma, y, w, is_normal in rows(of, b):
                log_p = log_normal(y, a @ x_b + c, sigma)
                expected[b] += w * (log_p + (not is_normal) * np.log(2 * np.pi * sigma**2) / 2)
        if not np.allclose(found, expected, rtol=1e-4, atol=1e-3):
            yield f"log r {found}, exactly {expected};"


def differences(of, smc):
    """What is further from the closed form than four standard errors and the floor."""
    log_z, means, sds = exact(of)
    sites, log_w = smc.get_weighted_samples()
    x = next(v for name, v in sites.items() if name.endswith("x_0"))
    x, w = x.reshape(len(x), *means.shape), np.exp(log_w).reshape(len(x), -1, 1)
    count = 1 / (w**2).sum(0)
    mean = (w * x).sum(0)
    sd = np.sqrt((w * (x - mean) ** 2).sum(0))
    found, se = np.ravel(smc.log_evidence), np.ravel(smc.log_evidence_se)
    if (np.abs(found - log_z) > 4 * se + FLOOR).any():
        yield f"log Z {found} ± {se}, exactly {log_z};"
    unit = np.where(sds > 0, sds, 1e-4 * (1 + np.abs(means)))
    if (np.abs(mean - means) > (4 / np.sqrt(count) + FLOOR) * unit).any():
        yield f"mean {mean.tolist()}, exactly {means.tolist()};"
    if (np.abs(sd - sds) > (4 / np.sqrt(2 * count) + FLOOR) * unit).any():
        yield f"sd {sd.tolist()}, exactly {sds.tolist()};"


def endings(seeds, is_sampled):
    """How many programs end how, and what is to be said of those that are wrong."""
    counts, wrong = collections.Counter(), []
    for seed in seeds:
        ending, text = outcome(make(seed), is_sampled(seed))
        counts[ending] += 1
        if ending == "wrong":
            wrong.append(f"{seed}: {text}")
        if seed % 20 == 0:  # memory maps of what was compiled
            jax.clear_caches()
    print(dict(counts))
    return counts, "\n".join(wrong)


@pytest.mark.parametrize("seed", range(DEFAULT))
def test_a_program_is_right_or_refused(seed):
    of = make(seed)
    ending, text = outcome(of, seed % SAMPLED == 0)
    assert ending == ("refused" if of.fault else "right"), text


@pytest.mark.long
def test_programs_are_right_or_refused():
    """None is wrong without a word; n = 60, of which a fifth is sampled."""
    counts, wrong = endings(range(DEFAULT, DEFAULT + LONG), lambda seed: seed % SAMPLED == 0)
    assert not wrong, wrong
    assert counts["right"] > LONG / 2 and counts["refused"] > LONG / 8


@pytest.mark.slow
def test_programs_have_their_posteriors():
    """n = 252, all of them sampled."""
    counts, wrong = endings(range(ALL), lambda seed: True)
    assert not wrong, wrong
    assert counts["right"] > ALL / 2
