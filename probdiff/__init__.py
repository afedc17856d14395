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
from types import ModuleType
from typing import TYPE_CHECKING

from probdiff import datasets, networks, readouts, sample, schedules
from probdiff.diffusion import Diffusion
from probdiff.elbo import SampledTimeELBO, track_kl
from probdiff.kernels import AbsorbingKernel, BernoulliKernel, CategoricalKernel, GaussianKernel
from probdiff.prior import Prior
from probdiff.simple_loss import CombinedLoss, SimpleLoss
from probdiff.standard import standard_diffusion
from probdiff.storage import load, save
from probdiff.times import ImportanceTimes, StratifiedTimes, UniformTimes
from probdiff.train import Fit, fit

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
    "UniformTimes",
    "datasets",
    "diagnostics",
    "fit",
    "infer",
    "load",
    "networks",
    "plots",
    "readouts",
    "sample",
    "save",
    "schedules",
    "standard_diffusion",
    "track_kl",
]


if TYPE_CHECKING:
    from probdiff import diagnostics, infer, plots
else:

    def __getattr__(name: str) -> ModuleType:
        """The folders that stand on ArviZ and matplotlib, slower to import than all the rest."""
        if name not in ("diagnostics", "infer", "plots"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")
