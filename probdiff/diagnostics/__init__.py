"""What a trained diffusion is worth, as ArviZ DataTrees.

    bound, sampled_bound    K on log p(x_0), per example and per step
    entropy_form            the paper's eq. 14, and the correction that makes it a bound

Groups have named dims; a bound has dim `example` and no chain or draw.
"""

from probdiff.diagnostics.bounds import BITS_PER_NAT, bound, entropy_form, sampled_bound

__all__ = ["BITS_PER_NAT", "bound", "entropy_form", "sampled_bound"]
