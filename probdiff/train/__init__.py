"""Training: `fit`, for any NumPyro `SVI`.

`fit` says what is asked for and what is returned, `loop` is its loop on the host, `step` what that
loop compiles; `data` are the batches, `checkpoint` the file of a run and `log` its reports.
"""

from probdiff.train.fit import Fit, fit
from probdiff.train.log import HeldOutLosses, Progress

__all__ = ["Fit", "HeldOutLosses", "Progress", "fit"]
