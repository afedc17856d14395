"""Pages of `probdiff`: `sphinx-build -W -n notebooks build/pages`.

Notebooks are shown with the outputs that they are kept with, names by their docstrings. These are
plain text for `help`: what reStructuredText would misread in them is made ready for it here.
"""

import inspect
import itertools
import logging
import re
from pathlib import Path

import jax
import matplotlib.axes
import xarray
from docutils import nodes
from sphinx.addnodes import pending_xref

project, author = "probdiff", "The probdiff authors"
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "myst_nb",
    "sphinx-mathjax-offline",
]
html_theme, html_title = "furo", "probdiff"
html_theme_options = {"light_css_variables": {"code-font-size": "0.75rem"}}
html_show_copyright = html_show_sourcelink = html_copy_source = False
default_role = "named"
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 80
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "special-members": "__call__",
}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
nb_execution_mode, nb_merge_streams = "off", True
myst_enable_extensions = ["dollarmath"]

intersphinx_mapping = {
    "arviz": ("https://python.arviz.org/projects/plots/en/stable", None),
    "jax": ("https://docs.jax.dev/en/latest", None),
    "matplotlib": ("https://matplotlib.org/stable", None),
    "numpy": ("https://numpy.org/doc/stable", None),
    "numpyro": ("https://num.pyro.ai/en/stable", None),
    "python": ("https://docs.python.org/3", None),
    "xarray": ("https://docs.xarray.dev/en/stable", None),
}
intersphinx_timeout = 5
# Without a network these are missing: then a name of theirs is no link, and that is no fault.
logging.getLogger("sphinx.sphinx.ext.intersphinx").addFilter(
    lambda record: "inventories" not in str(record.msg)
)
TYPES = "DataGivenFirst|Deviations|Evidence|Programs|Result|Sampler|Units|_Runs?"
INTERNAL = rf"probdiff\.\w+(\.\w+)?\.({TYPES})"
nitpick_ignore_regex = [("py:.*", rf"(?!probdiff\b).*|{INTERNAL}")]

# Where others document what is defined elsewhere.
jax.Array.__module__, jax.Array.__name__, jax.Array.__qualname__ = "jax", "Array", "Array"
jax.sharding.Mesh.__module__ = "jax.sharding"
matplotlib.axes.Axes.__module__ = "matplotlib.axes"
xarray.DataTree.__module__ = "xarray"
ELSEWHERE = {
    "arviz_plots.plot_ecdf_pit": "arviz_plots.plot_ecdf_pit",
    "plot_ppc_dist": "arviz_plots.plot_ppc_dist",
    "plot_ppc_pit": "arviz_plots.plot_ppc_pit",
    "plot_ppc_tstat": "arviz_plots.plot_ppc_tstat",
    "numpyro.infer.Predictive": "numpyro.infer.util.Predictive",
    "numpyro.param": "numpyro.primitives.param",
    "MCMC": "numpyro.infer.mcmc.MCMC",
    "Predictive": "numpyro.infer.util.Predictive",
    "SVI": "numpyro.infer.svi.SVI",
    "Trace_ELBO": "numpyro.infer.elbo.Trace_ELBO",
}
WRITTEN = {
    "~jax.Array | ~numpy.ndarray | ~numpy.bool | ~numpy.number | bool | int | float | complex":
        "~jax.typing.ArrayLike",
    "~jaxtyping.Key[~jax.Array, ''] | ~jaxtyping.UInt32[~jax.Array, '2'] | "
    "~jaxtyping.UInt32[~jax.Array, '4']": "~jaxtyping.PRNGKeyArray",
    "Callable[[...]": "Callable[...",
    "xr.DataTree": "~xarray.DataTree",
}  # fmt: skip

from probdiff import networks  # noqa: E402, annotations hold the names above

for network in vars(networks).values():
    if inspect.isclass(network):  # NNX's metaclass hides what a network takes
        init = inspect.signature(network.__init__)
        network.__signature__ = init.replace(parameters=[*init.parameters.values()][1:])

PAGES = "\n".join(page.read_text() for page in sorted(Path(__file__).parent.glob("api/*.rst")))
LISTED = re.findall(r"^\.\. auto(?!module)\w+:: (\S+)", PAGES, re.MULTILINE)


def target_of(text):
    """What a text in backticks names, `Prior`, `infer.SMC(...)` or `fit`, or None.

    Functions of modules are named with their module; without it they may be arguments, or sites.
    """
    name = text.partition("(")[0]
    for target in LISTED:
        is_qualified = "." in name or name[:1].isupper() or target == f"probdiff.{name}"
        if is_qualified and f".{target}".endswith(f".{name}"):
            return target
    return ELSEWHERE.get(name)


def named(role, rawtext, text, lineno, inliner, options=None, content=None):
    """Text in backticks: code, and a link where it names something that has its place here."""
    code = nodes.literal(rawtext, text, classes=["code"])
    if (target := target_of(text)) is None:
        return [code], []
    options = {"refdomain": "py", "reftype": "obj", "reftarget": target}
    return [pending_xref(rawtext, code, refexplicit=True, refwarn=True, **options)], []


def set_docstring(app, what, name, obj, options, lines):
    """Formulas and tables stand as they are; nothing else is markup."""
    if what in ("attribute", "property") and lines:
        lines[0] = f": {lines[0]}"  # or what stands before a colon is read as a type
    found, indent, is_shown, is_example = [], 0, False, False
    for before, line in itertools.pairwise(["Start", *lines]):
        depth = len(line) - len(line.lstrip())
        is_example = line.lstrip().startswith(">>>") or (is_example and bool(line))
        if line and not (is_shown and depth > indent):
            is_shown = depth > indent and not before and not is_example
            if is_shown:
                language = "python" if "import" in line else "text"
                found += [f"{indent * ' '}.. code-block:: {language}", ""]
            else:
                indent = depth
        if before == "Returns:":
            line = f"    : {line.lstrip()}"
        found.append(line if is_shown or is_example else _escaped(line))
    lines[:] = found


def _escaped(line):
    parts = re.split(r"(`[^`]*`)", line)  # those at odd places are in backticks
    parts[::2] = [re.sub(r"([*|]|_(?!\w))", r"\\\1", part) for part in parts[::2]]
    parts[:-1:2] = [re.sub(r"(?<=[^\s(])$", r"\\ ", part) for part in parts[:-1:2]]
    return "".join(parts)


def set_signature(app, what, name, obj, options, signature, returned):
    """Types as they are written in the source, where Sphinx writes out their unions."""
    for field in getattr(obj, "_fields", ()):  # "Alias for field number 0" says nothing
        getattr(obj, field).__doc__ = None
    return tuple(text and _as_written(text) for text in (signature, returned))


def _as_written(text):
    array = r"~jaxtyping\.(\w+)\[Array, (.*?)\]"
    numpys = r"~jaxtyping\.\1\[ndarray, \2\]"
    text = re.sub(rf"{array} \| {numpys}", r"~jaxtyping.\1[~jax.Array | ~numpy.ndarray, \2]", text)
    text = re.sub(array, r"~jaxtyping.\1[~jax.Array, \2]", text)
    text = re.sub(r"~jaxtyping\.Shaped\[(.*?), '\.\.\.'\]", r"\1", text)
    text = re.sub(r"\{(\w+)\}", r"\1", text)  # a size that is an argument
    for written, shown in WRITTEN.items():
        text = text.replace(written, shown)
    return text


def setup(app):
    """Connect the above to Sphinx."""
    app.add_role("named", named)
    app.connect("autodoc-process-docstring", set_docstring, priority=100)
    app.connect("autodoc-process-signature", set_signature)
