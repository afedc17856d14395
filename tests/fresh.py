"""A fresh process that reopens a file and runs code on its tree, with the package not imported."""

import subprocess
import sys
import textwrap

OPEN = """
import sys, warnings
import matplotlib
matplotlib.use("Agg")
import arviz_plots, numpy as np, pandas as pd, xarray as xr
tree = xr.open_datatree(sys.argv[1], engine="h5netcdf")
"""
CLOSE = """
for node in tree.subtree:
    for value in node.attrs.values():
        assert isinstance(value, (str, int, float, np.generic)), node.attrs
assert "probdiff" not in sys.modules
"""


def check_in_fresh_process(tree, path, code):
    """Write the tree, reopen it elsewhere as `tree` and run code there."""
    tree.to_netcdf(path, engine="h5netcdf")
    program = OPEN + textwrap.dedent(code) + CLOSE
    command = [sys.executable, "-I", "-c", program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
