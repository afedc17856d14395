"""Networks `network(x_t, t, context=None)`: flax.nnx modules that hold no probability."""

from probdiff.networks.convolution import convolve
from probdiff.networks.from_mixture import FromMixture
from probdiff.networks.multi_scale import MultiScaleConvolution
from probdiff.networks.per_step import RadialBasis, SigmoidPerceptron
from probdiff.networks.perceptron import Perceptron, SharedHead
from probdiff.networks.summary import summary
from probdiff.networks.unet import UNet

__all__ = [
    "FromMixture", "MultiScaleConvolution", "Perceptron", "RadialBasis", "SharedHead",
    "SigmoidPerceptron", "UNet", "convolve", "summary",
]  # fmt: skip
