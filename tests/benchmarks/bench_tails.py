"""SMC with its default twist under likelihoods that are not Gaussian: `heavy_tails` as a table.

    python tests/benchmarks/bench_tails.py [--particles 1000] [--runs 2] [--seeds 6] [--only cauchy]

A row is the mean over seeds ± its standard error; `seconds` counts the compilation once.
"""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np

from probdiff import infer

sys.path.append(str(Path(__file__).parents[1]))
from heavy_tails import LAWS, Score, score

warnings.simplefilter("ignore", infer.InferenceWarning)


def main():
    parser = argparse.ArgumentParser()
    for name, value in [("particles", 1000), ("runs", 2), ("seeds", 6)]:
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", nargs="*", default=list(LAWS))
    parser.add_argument("--priors", nargs="*", default=["normal", "mixture"])
    args = parser.parse_args()
    for prior in args.priors:
        for law in args.only:
            found = Score(*np.array([
                score(prior, law, seed, args.particles, args.runs) for seed in range(args.seeds)
            ]).T)  # fmt: skip
            cells = [
                f"{name} {v.mean():7.3f} ± {v.std(ddof=1) / np.sqrt(len(v)):.3f}"
                for name, v in found._asdict().items()
            ]
            print(f"{prior:8s} {law:13s}", "  ".join(cells))
            for name in ("error", "ess", "mean"):
                print(f"    {name:5s}", np.round(getattr(found, name), 3), flush=True)


if __name__ == "__main__":
    main()
