"""What a trained diffusion is worth, as ArviZ DataTrees.

    bound, sampled_bound    K on log p(x_0), per example and per step
    flow_density            log p(x_0) of the probability flow, another model of the same network
    entropy_form            the paper's eq. 14, and the correction that makes it a bound
    ladder                  from K through importance-weighted bounds and SMC towards log p(x_0)
    sandwich                bounds from below and above, at draws of the model
    entropies               bounds on the entropy of every reverse step
    information             bounds on what each level still tells of the data
    baselines               independent entries, a Gaussian, a mixture, on the same measure
    compare                 models by their bounds on the same examples, errors paired
    parzen                  log density of test images under Gaussians around draws
    bits_per_dim            bits per entry of discrete data
    features                hidden activations of the network at a level, a code that nobody trained
    probe                   what classifiers read off codes, and how far classes lie apart
    predictive_check        replicate data sets of the model beside the data, PITs of statistics
    to_datatree             a run of MCMC, SMC, SVI or `fit`, dims always right

`bound` and `ladder` take a program too, any model and guide whose rows are in one plate.
Groups have named dims; a bound has dim `example` and no chain or draw.
"""

from probdiff.diagnostics.baselines import baselines
from probdiff.diagnostics.bits import BitsPerDim, bits_per_dim
from probdiff.diagnostics.bounds import BITS_PER_NAT, bound, entropy_form, sampled_bound
from probdiff.diagnostics.comparison import compare
from probdiff.diagnostics.conversion import to_datatree
from probdiff.diagnostics.entropies import entropies, information
from probdiff.diagnostics.features import features
from probdiff.diagnostics.flow import flow_density
from probdiff.diagnostics.ladder import LadderWarning, ladder, sandwich
from probdiff.diagnostics.parzen import parzen
from probdiff.diagnostics.predictive import predictive_check
from probdiff.diagnostics.probes import probe

__all__ = [
    "BITS_PER_NAT", "BitsPerDim", "LadderWarning", "baselines", "bits_per_dim", "bound", "compare",
    "entropies", "entropy_form", "features", "flow_density", "information", "ladder", "parzen",
    "predictive_check", "probe", "sampled_bound", "sandwich", "to_datatree",
]  # fmt: skip
