"""Every public name called with every argument in turn replaced by what it does not expect.

A case is a function and valid arguments. Each argument that its signature has takes each of
`VALUES`, and a call is

    right     it succeeds, or ends in a `ValueError` or `TypeError` that this package raised and
              that names the argument
    inside    it ends in any other error, in another library or without a name
    slow      it does not end within `PATIENCE` seconds

`python -m tests.hostile [GROUP ...]` makes all calls and prints their counts by group, and what
ended inside. Left out are the methods that only the package calls, with objects of its own: those
of twists and losses that take a view or a trajectory.
"""

import collections
import dataclasses
import functools
import inspect
import itertools
import os
import pathlib
import re
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.infer import SVI

import probdiff
from probdiff import (
    datasets,
    diagnostics,
    flow,
    guidance,
    infer,
    kernels,
    networks,
    plots,
    readouts,
    recipes,
    sample,
    samplers,
    schedules,
    standard_diffusion,
    tables,
)


class _Odd:
    """A class, which takes any arguments."""

    def __init__(self, *_: Any, **__: Any):
        pass


PACKAGE = str(pathlib.Path(probdiff.__file__).parent)
PATIENCE = 30
"""Seconds that a call may take."""
VALUES = {
    "None": None, "text": "text", "empty text": "", "bytes": b"bytes", "-1": -1, "0": 0,
    "2.5": 2.5, "nan": float("nan"), "inf": float("inf"), "1e300": 1e300, "True": True,
    "10**12": 10**12, "[]": [], "{}": {}, "object": object(), "class": _Odd,
    "function": lambda *_, **__: None, "words": np.array(["a", "b"]), "objects": np.array([None]),
    "empty array": np.zeros(0), "complex": np.array([1j, 2.0]), "array": np.full((3, 7, 5), 0.5),
    "list": ["a", None], "integers": [1, 2, 3],
}  # fmt: skip
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function, and arguments that it accepts; those with a default are found by themselves."""

    name: str
    function: Callable
    given: dict[str, Any]
    foreign: tuple[str, ...] = ()
    """Arguments of the user's own program, which stay as they are."""
    called: tuple[tuple[str, str], ...] = ()
    """Arguments that are handed on to the user's program, and what they are called there."""

    def arguments(self) -> list[str]:
        """Names of all arguments that can be given."""
        parameters = inspect.signature(self.function).parameters.values()
        found = {p.name: p.default for p in parameters if p.default is not p.empty}
        return [name for name in found | self.given if name not in self.foreign]

    def call(self, **replaced: Any) -> Any:
        """The call itself, on the given arguments but for those replaced."""
        with warnings.catch_warnings(), numpyro.handlers.seed(rng_seed=0):
            warnings.simplefilter("ignore")
            return jax.block_until_ready(self.function(**(self.given | replaced)))


def of_program(function: Callable, name: str, **given: Any) -> Case:
    """A case that hands `y` to the user's program."""
    return Case(name, function, given | {"y": 1.0}, foreign=("y",))


def case(function: Callable, name: str = "", **given: Any) -> Case:
    """A case under the function's own name."""
    return Case(name or function.__qualname__, function, given)


def calls(cases: list[Case]) -> Iterator[tuple[Case, str, str]]:
    """Case, argument and name of a hostile value, of all calls."""
    for one in cases:
        for argument, value in itertools.product(one.arguments(), VALUES):
            yield one, argument, value


class _SlowError(Exception):
    """A call outlasted `PATIENCE`."""


def outcome(one: Case, argument: str, value: str) -> tuple[str, str]:
    """How a call ends, "accepted", "named", "inside" or "slow", and what it said."""

    def stop(*_: Any) -> None:
        raise _SlowError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    try:
        one.call(**{argument: VALUES[value]})
    except _SlowError:
        return "slow", ""
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = frame.filename.startswith(PACKAGE)
        if isinstance(error, ImportError) and is_ours:  # an extra is not installed
            return "accepted", str(error)
        names = "|".join(re.escape(n) for n in (argument, dict(one.called).get(argument, argument)))
        is_named = re.search(rf"(?<![A-Za-z])({names})(?![A-Za-z])", str(error))
        kind = "named" if isinstance(error, ValueError | TypeError) and is_ours and is_named else ""
        where = "" if is_ours else f" in {pathlib.Path(frame.filename).name}"
        text = str(error).splitlines()[0][:150] if str(error) else ""
        return kind or "inside", f"{type(error).__name__}{where}: {text}"
    finally:
        signal.alarm(0)
        plt.close("all")
    return "accepted", ""


# the cases


@functools.cache
def _diffusion(shape: tuple[int, ...] = (2,), kernel: Any = None) -> probdiff.Diffusion:
    return standard_diffusion(shape, 3, kernel=kernel)


@functools.cache
def _svi() -> SVI:
    model = _diffusion()
    return SVI(model.model, model.guide, optax.adam(1e-3), probdiff.SampledTimeELBO())


@functools.cache
def _perceptron() -> probdiff.Diffusion:
    network = networks.Perceptron((2,), 4, 1, 3, rngs=nnx.Rngs(0))
    beta = schedules.cosine(3)
    return probdiff.Diffusion(kernels.GaussianKernel(), beta, network, event_shape=(2,))


@functools.cache
def _perceptron_params() -> dict[str, Any]:
    weights = nnx.state(_perceptron().network, nnx.Param)
    return {"x_0_network$params": nnx.to_pure_dict(weights)}


X = np.linspace(-1.5, 1.5, 8, dtype=np.float32).reshape(4, 2)
"""Four examples of two numbers."""


PRIOR = _diffusion(()).prior({})


def _program(y: Any = None) -> None:
    numpyro.sample("y", dist.Normal(PRIOR(), 1.0), obs=y)


@functools.cache
def _smc() -> infer.SMC:
    smc = infer.SMC(_program, num_particles=8, num_runs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smc.run(KEY, y=1.0)
    return smc


def of_datasets() -> list[Case]:
    """Generators of data, and what is done to them."""
    photograph = np.random.default_rng(0).uniform(size=(12, 8))
    covariance, drawn = np.eye(2), {"key": KEY, "n": 3}
    mixture = {"means": np.zeros((2, 2)), "covariances": np.stack([covariance] * 2)}
    return [
        case(datasets.swiss_roll, **drawn, noise=0.1),
        case(datasets.swiss_roll_log_density, x=np.zeros((2, 2), np.float32), noise=0.5),
        case(datasets.gaussian, **drawn, covariance=covariance),
        case(datasets.gaussian_mixture, **drawn, **mixture),
        case(datasets.gaussian_mixture_distribution, **mixture),
        case(datasets.heartbeat, **drawn),
        case(datasets.heartbeat_sequences),
        case(datasets.dead_leaves, **drawn, size=3, r_min=1.0),
        case(datasets.textures, **drawn, images=[photograph], size=2, n_test=2),
        case(datasets.grey_images, folder="nowhere"),
        case(datasets.dequantise, key=KEY, x=jnp.ones((2, 2))),
        case(datasets.binarise, key=KEY, images=np.full((2, 2), 51, np.uint8)),
        case(datasets.with_mirrored, images=np.ones((2, 3, 3))),
    ]


def _of_recipe() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=60), "n": rng.poisson(1.0, 60)}
    table = tables.Table(data)
    return {"key": KEY, "table": table, "data": data, "num_steps": 1, "progress": False}


def of_tables() -> list[Case]:
    """Tables and kinds of columns."""
    data = {"x": [1.0, 2.5, 4.0], "n": [0, 1, 2], "c": ["a", "b", None]}
    table = tables.Table(data)
    x_0 = table.encode({"x": [1.5], "n": [1], "c": ["a"]}).x_0
    file = pathlib.Path(tempfile.mkdtemp()) / "t.csv"
    file.write_text("x,n\n1.5,1\n")
    return [
        case(tables.Table, data=data),
        case(table.encode, data=data),
        case(table.decode, x_0=x_0),
        case(table.columns, x_0=x_0),
        case(table.place, name="x"),
        case(table.origin, name="x"),
        case(table.save, path="columns.json"),
        case(tables.Table.load, path="columns.json"),
        case(tables.read_csv, path=file),
        case(tables.Continuous),
        case(tables.Positive),
        case(tables.Bounded),
        case(tables.HeavyTailed),
        case(tables.Hurdle),
        case(tables.Rounded, step=0.5, low=0.0, high=2.0),
        case(tables.Count),
        case(tables.Ordered, values=("a", "b")),
        case(tables.Category, values=("a", "b")),
        case(tables.Constant, value=3.0),
        Case(
            "recipes.table",
            recipes.table,
            _of_recipe(),
            foreign=("num_steps", "checkpoint", "progress"),
        ),
        Case(
            "recipes.image",
            recipes.image,
            {
                "key": KEY,
                "images": np.tile(np.eye(2), (60, 1, 1)),
                "levels": 2,
                "num_steps": 1,
                "progress": False,
            },
            foreign=("num_steps", "checkpoint", "progress"),
        ),
    ]


def of_networks() -> list[Case]:
    """Constructors of networks, and their calls."""
    kinds = {
        networks.Perceptron: {"event_shape": (2,), "width": 2, "depth": 1, "T": 3},
        networks.SharedHead: {"event_shape": (2,), "width": 2, "depth": 1, "T": 3},
        networks.RadialBasis: {"event_shape": (2,), "width": 2, "T": 3},
        networks.SigmoidPerceptron: {"event_shape": (2,), "width": 2, "depth": 1, "T": 3},
        networks.MultiScaleConvolution: {
            "event_shape": (4, 4), "width": 2, "depth": 1, "T": 3, "scales": 1, "dense_width": 2,
            "dense_depth": 1, "upper_width": 2, "upper_depth": 1, "bumps": 2,
        },
        networks.UNet: {"event_shape": (4, 4), "widths": (8,), "depth": 1, "T": 3},
        networks.FromMixture: {"event_shape": (2,), "components": 2, "width": 2, "depth": 1},
    }  # fmt: skip
    found = [case(kind, **given, rngs=nnx.Rngs(0)) for kind, given in kinds.items()]
    for kind, given in kinds.items():
        network = kind(**given, rngs=nnx.Rngs(0))
        x_t = jnp.ones((2, *given["event_shape"]))
        t = jnp.ones(2, float if kind is networks.FromMixture else jnp.int32)
        found.append(case(network.__call__, x_t=x_t, t=t))
    mixture = {"weights": np.ones(2) / 2, "means": np.eye(2), "covariances": np.ones((2, 2, 2))}
    mixture["covariances"] += np.eye(2)
    found.append(case(networks.FromMixture((2,), 2, 2, 1, rngs=nnx.Rngs(0)).start, **mixture))
    given = {"network": networks.RadialBasis((2,), 2, 3, rngs=nnx.Rngs(0)), "event_shape": (2,)}
    images = {"x": jnp.ones((1, 4, 4, 1)), "kernel": jnp.ones((3, 3, 1, 2))}
    return [*found, case(networks.summary, **given), case(networks.convolve, **images)]


def of_schedules() -> list[Case]:
    """Rates, and what is made of them."""
    table = schedules.steps(schedules.harmonic(5))
    return [
        case(schedules.harmonic, T=5),
        case(schedules.linear, T=5, beta_T=0.5),
        case(schedules.cosine, T=5),
        case(schedules.log_snr_linear, T=5, beta_1=0.01, alpha_bar_T=0.01),
        case(schedules.learned, beta=schedules.cosine(5)),
        case(schedules.check_beta, beta=schedules.cosine(5)),
        case(schedules.steps, beta=schedules.cosine(5)),
        case(schedules.respaced, table=table, steps=3),
        case(schedules.evenly_spread, T=5, n=3),
        case(table.at, t=2, event_dim=0),
    ]


def of_kernels() -> list[Case]:
    """Constructors and methods of kernels, and laws."""
    step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=1)
    found = [
        case(probdiff.BernoulliKernel),
        case(probdiff.CategoricalKernel, num_classes=3),
        case(probdiff.AbsorbingKernel, num_classes=3),
        case(kernels.bridge_weights, step=step),
        case(kernels.bridge_mean, x_t=jnp.ones(2), x_0=jnp.ones(2), step=step),
        case(kernels.bridge_variance, step=step),
        case(kernels.Bits, logit=jnp.zeros(2)),
        case(kernels.States, log_probs=jnp.log(jnp.ones((2, 3)) / 3)),
    ]
    symbols = [probdiff.BernoulliKernel(0.5), probdiff.CategoricalKernel(3)]
    for kernel in (probdiff.GaussianKernel(), *symbols, probdiff.AbsorbingKernel(3)):
        x = jnp.ones(2) if kernel in (probdiff.GaussianKernel(),) else jnp.ones(2, jnp.int32)
        found += [
            case(kernel.transition, x_s=x, step=step),
            case(kernel.marginal, x_0=x, step=step),
            case(kernel.bridge, x_t=x, x_0=x, step=step),
            case(kernel.stationary, shape=(2,)),
        ]
    return found


def of_readouts() -> list[Case]:
    """Constructors and methods of readouts, variances and last steps."""
    step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=1)
    kernel, x_t, z = probdiff.GaussianKernel(), jnp.ones(2), jnp.zeros(2)
    bits, x_bits = probdiff.BernoulliKernel(0.5), jnp.ones(2, jnp.int32)
    points = ("Perturbation", "Epsilon", "Data", "Velocity", "Score")
    variances = (
        "ForwardVariance", "BridgeVariance", "LearnedVariance", "InterpolatedVariance",
    )  # fmt: skip
    found = [case(getattr(readouts, name)) for name in points]
    found += [
        case(readouts.Mixture),
        case(readouts.Grid, low=0, high=3, levels=4),
        case(readouts.Discretised, low=0, high=3, levels=4),
        case(readouts.Grid(0, 3, 4).nearest, x=z),
        case(readouts.Grid(0, 3, 4).log_mass, x=z, mean=z, sd=jnp.ones(2)),
    ]
    found += [case(getattr(readouts, name)().__call__, output=z, step=step) for name in variances]
    for name in (*points, "Mixture"):
        readout = getattr(readouts, name)()
        given = {"kernel": kernel, "outputs": (z,) * readout.num_outputs(kernel), "x_t": x_t}
        found += [
            case(readout.__call__, f"{name}.__call__", **given, step=step),
            case(readout.x_0_hat, f"{name}.x_0_hat", **given, step=step),
            case(readout.longer_step, f"{name}.longer_step", **given, trained=step, step=step),
            case(readout.num_outputs, f"{name}.num_outputs", kernel=kernel),
        ]
    for name in ("Logits", "DataLogits"):
        readout = getattr(readouts, name)()
        given = {"kernel": bits, "outputs": (z,), "x_t": x_bits}
        found += [
            case(readout.__call__, f"{name}.__call__", **given, step=step),
            case(readout.x_0_hat, f"{name}.x_0_hat", **given, step=step),
            case(readout.x_0_given, f"{name}.x_0_given", **given, step=step),
            case(readout.longer_step, f"{name}.longer_step", **given, trained=step, step=step),
            case(readout.num_outputs, f"{name}.num_outputs", kernel=bits),
        ]
    return found


def of_diffusions() -> list[Case]:
    """`Diffusion`, its methods, priors, objectives and laws of times."""
    diffusion, beta = _diffusion(), schedules.cosine(3)

    def network(x_t: Any, t: Any) -> Any:
        return jnp.zeros((*x_t.shape[:-1], 2 * x_t.shape[-1]))

    made = {"kernel": probdiff.GaussianKernel(), "beta": beta, "network": network}
    prior = diffusion.prior({})
    known = {"known": np.zeros(2, np.float32), "mask": np.array([True, False])}
    found = [
        case(probdiff.Diffusion, **made, event_shape=(2,)),
        case(standard_diffusion),
        case(
            probdiff.from_denoiser,
            network=lambda x, sigma: x,
            event_shape=(2,),
            readout=readouts.Data(readouts.BridgeVariance()),
            sigma=np.array([0.1, 1.0, 10.0]),
        ),
        case(diffusion.prior, params={}),
        case(diffusion.bind, params={}),
        case(diffusion.check_params, params={}),
        case(diffusion.check_data, x_0=X),
        case(diffusion.model, x_0=X),
        case(diffusion.guide, x_0=X),
        case(diffusion.model_by_step, x_0=X),
        case(diffusion.guide_by_step, x_0=X),
        case(diffusion.forward, x_0=X[0]),
        case(diffusion.reverse, x_0=X[0]),
        case(diffusion.to_state, x_0=X),
        case(probdiff.Prior, reverse=diffusion.bind({})),
        case(prior.__call__, **known),
        case(probdiff.CombinedLoss, num_particles=1, num_times=1),
        case(probdiff.SampledTimeELBO),
        case(probdiff.SimpleLoss),
        case(probdiff.track_kl, guide=diffusion.guide),
        case(probdiff.ImportanceTimes),
    ]
    given = {"key": KEY, "shape": (2,), "mean_square_kl": jnp.ones(3)}
    for kind in (probdiff.UniformTimes, probdiff.StratifiedTimes, probdiff.ImportanceTimes):
        name = kind.__name__
        found += [
            case(kind().draw, f"{name}.draw", **given),
            case(kind().law, f"{name}.law", mean_square_kl=jnp.ones(3)),
            case(kind().uniforms, f"{name}.uniforms", key=KEY, shape=(2,)),
        ]
    return found


def of_sampling() -> list[Case]:
    """Training and sampling."""
    given = {"key": KEY, "svi": _svi(), "data": X, "num_steps": 1, "progress": False}
    drawn = {"key": KEY, "diffusion": _diffusion(), "params": {}, "num_samples": 3}
    return [
        case(sample.ancestral, **drawn),
        case(flow.Flow, diffusion=_of_log_snr(), params={}),
        case(guidance.flagged, context=np.zeros((3, 1))),
        case(guidance.guided, diffusion=_flagged(), params={}, weight=2.0),
        case(sample.draw, **drawn, sampler=samplers.DDIM(2)),
        *(case(kind, steps=2) for kind in (samplers.DDIM, samplers.DPMSolver, samplers.Heun)),
        Case("fit", probdiff.fit, given, called=(("data", "x_0"), ("held_out", "x_0"))),
    ]


def _of_log_snr() -> Any:
    """A diffusion whose network is told the log-SNR."""

    def network(x_t: Any, log_snr: Any) -> Any:
        return x_t

    network.takes_log_snr = True
    return probdiff.Diffusion(
        probdiff.GaussianKernel(), schedules.cosine(3), network, event_shape=(2,),
        readout=readouts.Data(readouts.BridgeVariance()),
    )  # fmt: skip


def _flagged() -> Any:
    """A diffusion whose context has a flag."""
    return probdiff.Diffusion(
        probdiff.GaussianKernel(), schedules.cosine(3), lambda x_t, t, c: x_t, event_shape=(1,),
        readout=readouts.Data(readouts.BridgeVariance()), context_shape=(2,),
    )  # fmt: skip


def of_storage() -> list[Case]:
    """Saved models."""
    folder, network = tempfile.mkdtemp(), networks.RadialBasis((), 2, 3, rngs=nnx.Rngs(0))
    beta = schedules.harmonic(3)
    model = probdiff.Diffusion(probdiff.GaussianKernel(), beta, network, event_shape=())
    params = {"x_0_network$params": nnx.to_pure_dict(nnx.state(network))}
    probdiff.save(folder, model, params)
    return [
        case(probdiff.save, path=tempfile.mkdtemp(), diffusion=model, params=params),
        case(probdiff.load, path=folder),
    ]


def of_infer() -> list[Case]:
    """Samplers, twists and calibration."""
    smc, over_noise = _smc(), infer.noncentered(_program)
    guided = infer.Guided(_program, num_samples=4, check=False)
    few = {"num_chains": 2, "num_warmup": 2, "num_samples": 2, "num_leapfrog": 1}
    gibbs = infer.ParticleGibbs(_program, num_particles=2, num_runs=2, **few)

    def blind(key: Any, y: Any) -> Any:
        return jax.random.normal(key, (9,))

    start = {"key": KEY, "program": over_noise, "draws": {"x_0": np.zeros(2)}}
    simulated = {"key": KEY, "program": _program, "sampler": blind, "num_simulations": 2}
    return [
        case(infer.SMC, program=_program),
        case(infer.Guided, program=_program),
        of_program(smc.run, "SMC.run", key=KEY),
        case(smc.log_evidence_interval, "SMC.log_evidence_interval"),
        case(smc.print_summary, "SMC.print_summary", limit=0),
        of_program(guided.run, "Guided.run", key=KEY),
        case(infer.KernelTwist),
        case(infer.LaplaceTwist),
        case(infer.ReadoutTwist),
        case(infer.TweedieTwist),
        case(infer.calibrate, **simulated),
        case(infer.noncentered, program=_program),
        case(infer.forward_coordinates, program=_program),
        case(infer.ParticleGibbs, program=_program),
        of_program(gibbs.run, "ParticleGibbs.run", key=KEY),
        case(gibbs.print_summary, "ParticleGibbs.print_summary", limit=0),
        of_program(infer.initial_noise, "initial_noise", **start),
    ]


@functools.cache
def _trees() -> dict[str, Any]:
    diffusion = _diffusion()
    given = KEY, diffusion, {}, X
    bound = diagnostics.bound(*given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smc = _smc().to_datatree()
        ladder = diagnostics.ladder(*given, sizes=(1, 2), num_repeats=2, num_draws=2)
        sandwich = diagnostics.sandwich(KEY, diffusion, {}, 2, sizes=(1, 2), num_repeats=1)
    return {
        "bound": bound, "smc": smc, "ladder": ladder, "sandwich": sandwich,
        "entropy": diagnostics.entropies(*given, bound),
        "information": diagnostics.information(*given, bound),
        "comparison": diagnostics.compare({"a": bound, "b": bound}),
        "calibration": infer.calibrate(
            KEY, _program, lambda key, y: jax.random.normal(key, (9,)), num_simulations=2
        ),
    }  # fmt: skip


def of_diagnostics() -> list[Case]:
    """Diagnostics of a model."""
    trees, drawn = _trees(), {"key": KEY, "diffusion": _diffusion(), "params": {}}
    given, tree = drawn | {"x_0": X}, trees["bound"]
    pair = (diffusion := _diffusion()).model, diffusion.guide
    few = {"sizes": (1, 2), "num_repeats": 2}
    kl = tree["bound"]["kl"].values
    bits = _diffusion((2,), probdiff.BernoulliKernel(0.5))
    of_bits = diagnostics.bound(KEY, bits, {}, np.ones((4, 2), np.int32))
    fitted = probdiff.fit(KEY, _svi(), X, num_steps=1, progress=False)
    return [
        case(diagnostics.bound, **given),
        case(diagnostics.bound, "bound of a program", **given | {"diffusion": pair}),
        case(diagnostics.sampled_bound, **given, num_times=2),
        case(diagnostics.flow_density, **given | {"diffusion": _of_log_snr()}, probes=2),
        case(diagnostics.entropies, **given, tree=tree),
        case(diagnostics.entropy_form, **given, kl=kl),
        case(diagnostics.information, **given, tree=tree),
        case(diagnostics.ladder, **given, **few, num_draws=2),
        case(
            diagnostics.ladder,
            "ladder of a program",
            **given | {"diffusion": pair},
            **few,
            num_draws=2,
        ),
        case(diagnostics.sandwich, **drawn, num_examples=2, **few),
        case(diagnostics.predictive_check, **given, num_replicates=2),
        case(diagnostics.compare, models={"a": tree, "b": tree}),
        case(
            diagnostics.baselines,
            key=KEY,
            diffusion=_diffusion(),
            components=(1,),
            x_0=np.random.default_rng(0).standard_normal((25, 2)),
            held_out=X,
        ),
        case(diagnostics.bits_per_dim, tree=of_bits),
        case(
            diagnostics.features,
            key=KEY,
            diffusion=_perceptron(),
            params=_perceptron_params(),
            x_0=X,
            layer="layers/0",
            t=1,
        ),
        case(
            diagnostics.probe,
            key=KEY,
            codes=np.repeat(X, 4, 0),
            labels=np.arange(16) % 2,
            test_codes=np.repeat(X, 2, 0),
            test_labels=np.arange(8) % 2,
            few=(3,),
            max_epochs=1,
            num_repeats=1,
        ),
        case(diagnostics.parzen, draws=X, validation=X, test=X),
        case(diagnostics.to_datatree, source=fitted),
    ]


def of_plots() -> list[Case]:
    """Pictures."""
    trees, image, points = _trees(), np.ones((2, 3, 3)), X.astype(np.float64)
    shown = {"truth": image, "observation": image, "draws": np.ones((2, 2, 3, 3))}
    levels = np.stack([points] * 2)
    paths = dict.fromkeys(("forward", "reverse", "grid", "drifts", "behind"), levels)
    return [
        case(plots.bound_per_step, tree=trees["bound"]),
        case(plots.ladder, "plots.ladder", tree=trees["ladder"]),
        case(plots.sandwich, "plots.sandwich", tree=trees["sandwich"]),
        case(plots.entropy_band, tree=trees["entropy"]),
        case(plots.information, "plots.information", tree=trees["information"]),
        case(plots.comparison, tree=trees["comparison"]),
        case(plots.ess_trace, tree=trees["smc"]),
        case(plots.evidence, tree=trees["smc"]),
        case(plots.calibration, tree=trees["calibration"]),
        case(plots.points, x=points),
        case(plots.slices, levels=levels, titles=["a", "b"]),
        case(plots.drift, x=points, displacement=points),
        case(plots.images, x=image),
        case(plots.figure_1, **paths, levels=[1, 2]),
        case(plots.posterior_images, **shown, mean=image, sd=image),
        case(plots.posterior_points, draws=points),
        case(plots.losses, losses=np.ones(5)),
        case(plots.LiveLosses),
    ]


GROUPS = {
    name.removeprefix("of_"): function
    for name, function in dict(globals()).items()
    if name.startswith("of_") and function is not of_program
}


def main(groups: list[str]) -> None:
    """All calls of some groups, or of all."""
    matplotlib.use("Agg")
    resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
    total: collections.Counter[str] = collections.Counter()
    for group in groups or GROUPS:
        counts: collections.Counter[str] = collections.Counter()
        os.chdir(tempfile.mkdtemp())  # some calls write files
        for one, argument, value in calls(GROUPS[group]()):
            kind, text = outcome(one, argument, value)
            counts[kind] += 1
            if kind != "named":
                print(f"{group}\t{kind}\t{one.name}\t{argument}\t{value}\t{text}", flush=True)
        print(f"{group}: {counts.total()} calls, {dict(counts)}", flush=True)
        total += counts
    print(f"all: {total.total()} calls, {dict(total)}")


if __name__ == "__main__":
    main(sys.argv[1:])
