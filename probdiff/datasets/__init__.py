"""Data: generators with known laws, real images, and real tables.

Real data come from scikit-learn, or are downloaded once and checked by their checksums; where the
folder named by `PROBDIFF_DATA` holds the files, nothing is downloaded. Textures are cropped from
images that the caller brings.
"""

from probdiff.datasets.cifar10 import Cifar10, cifar10, with_mirrored
from probdiff.datasets.dead_leaves import dead_leaves
from probdiff.datasets.digits import Digits, dequantise, digits
from probdiff.datasets.gaussian import gaussian, gaussian_mixture, gaussian_mixture_distribution
from probdiff.datasets.heartbeat import heartbeat, heartbeat_sequences
from probdiff.datasets.mnist import BinarisedMnist, Mnist, binarise, binarised_mnist, mnist
from probdiff.datasets.swiss_roll import swiss_roll, swiss_roll_log_density
from probdiff.datasets.textures import Textures, grey_images, textures
from probdiff.datasets.uci import protein, red_wine

__all__ = [
    "BinarisedMnist", "Cifar10", "Digits", "Mnist", "Textures", "binarise", "binarised_mnist",
    "cifar10", "dead_leaves", "dequantise", "digits", "gaussian", "gaussian_mixture",
    "gaussian_mixture_distribution", "grey_images", "heartbeat", "heartbeat_sequences", "mnist",
    "protein", "red_wine", "swiss_roll", "swiss_roll_log_density", "textures", "with_mirrored",
]  # fmt: skip
