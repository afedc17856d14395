"""The paper's experiments and their successors, by the names that the command line knows them by.

This file imports none of them: `find` imports the one that is asked for.
"""

import importlib
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """An experiment as `probdiff list` shows it.

    Args:
        place: Its module, and its name there unless it is EXPERIMENT, as "module:NAME".
        summary: What it asks.
        duration: How long it takes.
        model: The experiment whose trained model it takes, if any.
        has_gpu: Whether it has a recipe for a GPU beside that for a CPU.
        resumes: Whether it goes on from a checkpoint.
    """

    place: str
    summary: str
    duration: str
    model: str = ""
    has_gpu: bool = False
    resumes: bool = False


TABLE = {
    "digits": Entry(
        "digits",
        "real 8 × 8 digits: bits per pixel beside baselines, samples, denoising and inpainting",
        "about 3 minutes on one CPU core",
    ),
    "swiss-roll": Entry(
        "swiss_roll",
        "a curve in the plane: K beside its ceilings, learned rates, the network of 2015, figure 1",
        "about 3 minutes on one CPU core",
    ),
    "ddpm-swiss-roll": Entry(
        "ddpm_swiss_roll",
        "a tutorial's Swiss roll: x_0 predicted by radial basis functions, bound and L_simple",
        "about 4 minutes on one CPU core",
    ),
    "heartbeat": Entry(
        "heartbeat",
        "sequences of bits: K beside what it can reach, as T grows to 2000, figure 2",
        "about 4 minutes on one CPU core",
    ),
    "toy-language": Entry(
        "toy_language",
        "strings of three letters: uniform and absorbing diffusion beside the best possible K",
        "about 3 minutes on two CPU cores",
    ),
    "binary-mnist": Entry(
        "binary_mnist",
        "binary images: nats per test image of an absorbing diffusion, fixed binarisation",
        "about 25 minutes on one CPU core",
        resumes=True,
    ),
    "mnist": Entry(
        "images:MNIST",
        "grey digits of 28 × 28 pixels: bits per pixel, and draws",
        "about 40 minutes on one CPU core",
        has_gpu=True,
        resumes=True,
    ),
    "mnist-inpaint": Entry(
        "mnist_inpainting",
        "the lower half of MNIST digits from the upper: posteriors, and what a classifier reads",
        "about 30 minutes on one CPU core, once mnist has run",
        model="mnist",
        has_gpu=True,
    ),
    "cifar10": Entry(
        "images:CIFAR10",
        "colour photographs of 32 × 32 pixels: bits per dimension, and draws",
        "about an hour on two CPU cores; 25 minutes with --recipe gpu on a GPU",
        has_gpu=True,
        resumes=True,
    ),
    "ddpm-mnist": Entry(
        "images:DDPM_MNIST",
        "MNIST as DDPM tutorials have it, and the bound they leave out",
        "about 50 minutes on two CPU cores",
        has_gpu=True,
        resumes=True,
    ),
    "readouts": Entry(
        "parametrisations",
        "noise, data or velocity, L_simple or the bound: bits per pixel and distance of draws",
        "about 12 minutes on two CPU cores",
    ),
    "dead-leaves": Entry(
        "patches:DEAD_LEAVES",
        "discs that hide one another: bits per pixel beside Gaussians",
        "about 20 minutes on two CPU cores",
        has_gpu=True,
        resumes=True,
    ),
    "bark": Entry(
        "patches:BARK",
        "photographs of bark: bits per pixel beside Gaussians, and a hole painted in",
        "about 20 minutes on two CPU cores",
        has_gpu=True,
        resumes=True,
    ),
    "denoise": Entry(
        "restoration:DENOISE",
        "posteriors of digits under noise as large as they vary: coverage, error, evidence",
        "about 6 minutes on one CPU core, once digits has run",
        model="digits",
    ),
    "inpaint": Entry(
        "restoration:INPAINT",
        "posteriors of the lower half of a digit, the upper known exactly: coverage, error, "
        "evidence",
        "about 15 minutes on one CPU core, once digits has run",
        model="digits",
    ),
    "super-resolution": Entry(
        "restoration:SUPER_RESOLUTION",
        "posteriors of digits from means of 2 × 2 blocks: coverage, error, evidence",
        "about 6 minutes on one CPU core, once digits has run",
        model="digits",
    ),
}


def find(name: str) -> Any:
    """The `report.Experiment` of this name, which is imported now."""
    module, _, attribute = TABLE[name].place.partition(":")
    place = importlib.import_module(f"probdiff.experiments.{module}")
    return getattr(place, attribute or "EXPERIMENT")
