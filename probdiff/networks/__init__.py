"""Networks `network(x_t, t, context=None)`: flax.nnx modules that hold no probability."""

from probdiff.networks.multi_scale import MultiScaleConvolution
from probdiff.networks.perceptron import Perceptron
from probdiff.networks.radial_basis import RadialBasis
from probdiff.networks.shared_head import SharedHead
from probdiff.networks.sigmoid_perceptron import SigmoidPerceptron
from probdiff.networks.summary import summary
from probdiff.networks.unet import UNet

__all__ = [
    "MultiScaleConvolution",
    "Perceptron",
    "RadialBasis",
    "SharedHead",
    "SigmoidPerceptron",
    "UNet",
    "summary",
]
