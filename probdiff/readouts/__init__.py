"""Readouts: how a network's output becomes the reverse step p(x_s | x_t), and x_0 given x_t."""

from probdiff.readouts.discrete import DataLogits, DiscreteReadout, Logits
from probdiff.readouts.gaussian import (
    BridgeVariance,
    Data,
    Denoiser,
    Epsilon,
    ForwardVariance,
    GaussianReadout,
    InterpolatedVariance,
    LearnedVariance,
    Perturbation,
    Score,
    Variance,
    Velocity,
)
from probdiff.readouts.grid import Grid
from probdiff.readouts.last_step import Discretised, LastStep, Learned, Tied
from probdiff.readouts.mixture import Mixture

__all__ = [
    "BridgeVariance", "Data", "DataLogits", "Denoiser", "DiscreteReadout", "Discretised", "Epsilon",
    "ForwardVariance", "GaussianReadout", "Grid", "InterpolatedVariance", "LastStep", "Learned",
    "LearnedVariance", "Logits", "Mixture", "Perturbation", "Score", "Tied", "Variance", "Velocity",
]  # fmt: skip
