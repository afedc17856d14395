"""Diffusion probabilistic models as NumPyro programs.

The forward trajectory is a guide, the learned reverse trajectory a model; stock NumPyro trains,
samples and scores them. Start at `Diffusion`.

Source: Sohl-Dickstein et al. (2015), Deep Unsupervised Learning using Nonequilibrium
Thermodynamics.
"""

from probdiff import datasets, diagnostics, infer, networks, readouts, sample, schedules
from probdiff.diffusion import Diffusion
from probdiff.elbo import SampledTimeELBO, track_kl
from probdiff.kernels import AbsorbingKernel, BernoulliKernel, CategoricalKernel, GaussianKernel
from probdiff.prior import Prior
from probdiff.simple_loss import CombinedLoss, SimpleLoss
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
    "readouts",
    "sample",
    "save",
    "schedules",
    "track_kl",
]
