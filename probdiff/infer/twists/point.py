"""r at the denoised point, as if x_t left nothing open."""

import dataclasses

import jax.numpy as jnp

from probdiff.infer.expansion import local
from probdiff.infer.twists.base import Tilt, Twist, View, limited, shift_of


@dataclasses.dataclass(frozen=True)
class PointTwist(Twist):
    """r(x̂_0), without width: the guidance of DPS as a twist. Collapses while x_t is noisy."""

    takes_known = False

    def __call__(self, view: View) -> Tilt:
        at = local(view.log_r, view.x_0_hat)
        shift = shift_of(view.levels.step(view.i), view.pull_back(at.gradient))
        shift = limited(shift, view)  # else, unweighted, it grows without bound where r is sharp
        return Tilt(at.value, shift, jnp.zeros_like(shift), jnp.zeros((0, *shift.shape)))
