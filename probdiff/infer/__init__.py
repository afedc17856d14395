"""Inference: conditioning a program that holds a trained diffusion.

    SMC           weighted particles over the reverse trajectory: draws, evidence and their errors
    Guided        the same walk without weights: approximate, among them the rule of 2015
    noncentered   the program over its noise, for MCMC(NUTS(...))
    calibrate     simulation-based calibration of a sampler under its own prior

Source: Sohl-Dickstein et al. (2015), section 2.5, multiplying by r(x).
"""

from probdiff.infer.calibrate import calibrate
from probdiff.infer.checks import InferenceWarning
from probdiff.infer.guided import Guided
from probdiff.infer.noncentered import initial_noise, noncentered
from probdiff.infer.smc import SMC
from probdiff.infer.twists import (
    GaussianTwist,
    KernelTwist,
    LaplaceTwist,
    PointTwist,
    ReadoutTwist,
    TweedieTwist,
    Twist,
)

__all__ = [
    "SMC",
    "GaussianTwist",
    "Guided",
    "InferenceWarning",
    "KernelTwist",
    "LaplaceTwist",
    "PointTwist",
    "ReadoutTwist",
    "TweedieTwist",
    "Twist",
    "calibrate",
    "initial_noise",
    "noncentered",
]
