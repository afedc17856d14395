"""Readouts: how a network's output becomes the reverse step p(x_s | x_t), and x_0 given x_t."""

from probdiff.readouts.discrete import DataLogits, DiscreteReadout, Logits
from probdiff.readouts.gaussian import (
    BridgeVariance,
    Data,
    Epsilon,
    ForwardVariance,
    GaussianReadout,
    LearnedVariance,
    Perturbation,
    Score,
    Variance,
    Velocity,
)
from probdiff.readouts.last_step import LastStep, Learned, Tied

__all__ = [
    "BridgeVariance",
    "Data",
    "DataLogits",
    "DiscreteReadout",
    "Epsilon",
    "ForwardVariance",
    "GaussianReadout",
    "LastStep",
    "Learned",
    "LearnedVariance",
    "Logits",
    "Perturbation",
    "Score",
    "Tied",
    "Variance",
    "Velocity",
]
