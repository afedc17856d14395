"""The paper's experiments and their successors, by the names that the command line knows them by.

This file imports none of them: `find` imports the one that is asked for.
"""

import importlib
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """An experiment as `probdiff list` shows it.

    Args:
        place: Its module, and its name there unless it is EXPERIMENT, as "module:NAME".
        duration: How long it takes.
        summary: What it asks.
        model: The experiment whose trained model it takes, if any.
        has_gpu: Whether it has a recipe for a GPU beside that for a CPU.
        resumes: Whether it goes on from a checkpoint.
    """

    place: str
    duration: str
    summary: str
    model: str = ""
    has_gpu: bool = False
    resumes: bool = False


TABLE = {
    "digits": Entry("digits", "about 3 minutes on one CPU core",
        summary="real 8 × 8 digits: bits per pixel beside baselines, samples, denoising and "
        "inpainting"),
    "swiss-roll": Entry("swiss_roll", "about 3 minutes on one CPU core",
        summary="a curve in the plane: K beside its ceilings, learned rates, the network of "
        "2015, figure 1"),
    "ddpm-swiss-roll": Entry("ddpm_swiss_roll", "about 4 minutes on one CPU core",
        summary="a tutorial's Swiss roll: x_0 predicted by radial basis functions, bound and "
        "L_simple"),
    "heartbeat": Entry("heartbeat", "about 4 minutes on one CPU core",
        summary="sequences of bits: K beside what it can reach, as T grows to 2000, figure 2"),
    "toy-language": Entry("toy_language", "about 3 minutes on two CPU cores",
        summary="strings of three letters: uniform and absorbing diffusion beside the best "
        "possible K"),
    "binary-mnist": Entry("binary_mnist", "about 25 minutes on one CPU core", resumes=True,
        summary="binary images: nats per test image of an absorbing diffusion, fixed binarisation"),
    "mnist": Entry("images:MNIST", "about 40 minutes on one CPU core", has_gpu=True, resumes=True,
        summary="grey digits of 28 × 28 pixels: bits per pixel, and draws"),
    "mnist-inpaint": Entry(
        "mnist_inpainting", "about 30 minutes on one CPU core, once mnist has run", model="mnist",
        has_gpu=True,
        summary="the lower half of MNIST digits from the upper: posteriors, and what a "
        "classifier reads"),
    "cifar10": Entry(
        "images:CIFAR10", "about an hour on two CPU cores; 25 minutes with --recipe gpu on a GPU",
        has_gpu=True, resumes=True,
        summary="colour photographs of 32 × 32 pixels: bits per dimension, and draws"),
    "ddpm-mnist": Entry(
        "images:DDPM_MNIST", "about 50 minutes on two CPU cores", has_gpu=True, resumes=True,
        summary="MNIST as DDPM tutorials have it, and the bound they leave out"),
    "readouts": Entry("parametrisations", "about 12 minutes on two CPU cores",
        summary="noise, data or velocity, L_simple or the bound: bits per pixel and distance "
        "of draws"),
    "dead-leaves": Entry(
        "patches:DEAD_LEAVES", "about 20 minutes on two CPU cores", has_gpu=True, resumes=True,
        summary="discs that hide one another: bits per pixel beside Gaussians"),
    "bark": Entry("patches:BARK", "about 20 minutes on two CPU cores", has_gpu=True, resumes=True,
        summary="photographs of bark: bits per pixel beside Gaussians, and a hole painted in"),
    "representation": Entry("representation", "some 20 minutes on two CPU cores",
        summary="codes that a diffusion is told, their price in bits, and what probes read off "
        "them beside others"),
    "levy": Entry("levy", "about 25 minutes on two CPU cores",
        summary="signals with independent increments: posteriors beside the exact ones of a "
        "Gibbs sampler"),
    "tables": Entry("tables", "about 80 minutes on one CPU core",
        summary="real tables and one of a known law: density, imputation and prediction beside "
        "mixtures, imputers, boosting and forests"),
    "denoise": Entry(
        "restoration:DENOISE", "about 6 minutes on one CPU core, once digits has run",
        model="digits",
        summary="posteriors of digits under noise as large as they vary: coverage, error, "
        "evidence"),
    "inpaint": Entry(
        "restoration:INPAINT", "about 15 minutes on one CPU core, once digits has run",
        model="digits",
        summary="posteriors of the lower half of a digit, the upper known exactly: coverage, "
        "error, evidence"),
    "super-resolution": Entry(
        "restoration:SUPER_RESOLUTION", "about 6 minutes on one CPU core, once digits has run",
        model="digits",
        summary="posteriors of digits from means of 2 × 2 blocks: coverage, error, evidence"),
}  # fmt: skip


def find(name: str) -> Any:
    """The `report.Experiment` of this name, which is imported now."""
    module, _, attribute = TABLE[name].place.partition(":")
    place = importlib.import_module(f"probdiff.experiments.{module}")
    return getattr(place, attribute or "EXPERIMENT")
