"""Diffusion probabilistic models as NumPyro programs.

The forward trajectory is a guide, the learned reverse trajectory a model; stock NumPyro trains,
samples and scores them. Start at `Diffusion`; `standard_diffusion` is one that needs no training.

Examples in docstrings run after these imports:

    import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist, optax
    from flax import nnx
    from numpyro.handlers import seed, trace
    from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
    import probdiff
    from probdiff import *

Source: Sohl-Dickstein et al. (2015), Deep Unsupervised Learning using Nonequilibrium
Thermodynamics.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probdiff import (
        datasets,
        diagnostics,
        flow,
        guidance,
        infer,
        networks,
        plots,
        readouts,
        recipes,
        sample,
        samplers,
        schedules,
        tables,
    )
    from probdiff.denoiser import from_denoiser
    from probdiff.diffusion import Diffusion
    from probdiff.elbo import SampledTimeELBO, track_kl
    from probdiff.kernels import AbsorbingKernel, BernoulliKernel, CategoricalKernel, GaussianKernel
    from probdiff.prior import Prior
    from probdiff.simple_loss import CombinedLoss, SimpleLoss
    from probdiff.standard import standard_diffusion
    from probdiff.storage import load, save
    from probdiff.tables import Table
    from probdiff.times import ImportanceTimes, StratifiedTimes, UniformTimes
    from probdiff.train.fit import Fit, fit

__all__ = [
    "AbsorbingKernel",
    "BernoulliKernel",
    "CategoricalKernel",
    "CombinedLoss",
    "Diffusion",
    "Fit",
    "GaussianKernel",
    "ImportanceTimes",
    "Prior",
    "SampledTimeELBO",
    "SimpleLoss",
    "StratifiedTimes",
    "Table",
    "UniformTimes",
    "datasets",
    "diagnostics",
    "fit",
    "flow",
    "from_denoiser",
    "guidance",
    "infer",
    "load",
    "networks",
    "plots",
    "readouts",
    "recipes",
    "sample",
    "samplers",
    "save",
    "schedules",
    "standard_diffusion",
    "tables",
    "track_kl",
]


_HOMES = {
    "denoiser": ["from_denoiser"],
    "diffusion": ["Diffusion"],
    "elbo": ["SampledTimeELBO", "track_kl"],
    "kernels": ["AbsorbingKernel", "BernoulliKernel", "CategoricalKernel", "GaussianKernel"],
    "prior": ["Prior"],
    "simple_loss": ["CombinedLoss", "SimpleLoss"],
    "standard": ["standard_diffusion"],
    "storage": ["load", "save"],
    "tables": ["Table"],
    "times": ["ImportanceTimes", "StratifiedTimes", "UniformTimes"],
    "train.fit": ["Fit", "fit"],
}
"""Files of the names that are no modules."""


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name or a module, imported when it is asked for: JAX takes seconds to import."""
        for home, names in _HOMES.items():
            if name in names:
                value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
                globals()[name] = value
                return value
        module = f"{__name__}.{name}"
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error

    def __dir__() -> list[str]:
        """All public names, imported or not: what an editor completes."""
        return sorted({*globals(), *__all__})
