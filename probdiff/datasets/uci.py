"""Two tables of the UCI Machine Learning Repository, as columns by name."""

import csv
import io
import lzma

import numpy as np

from probdiff.datasets.files import fetch, given

_PACKED = {
    "winequality-red.csv.xz": "bf9af3087ae02ad9759f98e4e619aeb1af2a8ca6d5121b9a3bebfe6f392fce05",
    "protein.csv.xz": "4282e5fea8a0765aff24b4f79302fa386d4b80ef76cf5b9cdcac010749d74e8c",
}
_PLAIN = {
    "winequality-red.csv": "4a402cf041b025d4566d954c3b9ba8635a3a8a01e039005d97d6a710278cf05e",
    "CASP.csv": "79970059d24ea8df7993c6012004d63c3ebc46bb886c9b222e460b197cae962f",
}
_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/"


def red_wine() -> dict[str, np.ndarray]:
    """Load red wines: 11 measurements and a quality from 3 to 8 of 1,599 of them.

    The folder named by `PROBDIFF_DATA` may hold winequality-red.csv or the same packed, .csv.xz;
    else it is downloaded once. A `ValueError` if a file's checksum is another.

    Returns:
        Columns by name, each `(1599,)`; 240 rows are copies of others.

    Example:
        >>> wine = datasets.red_wine()  # doctest: +SKIP
        >>> len(wine), wine["pH"].shape  # doctest: +SKIP
        (12, (1599,))

    Source: Cortez et al. (2009), Modeling wine preferences by data mining.
    """
    return _columns("winequality-red.csv", "winequality-red.csv", f"{_URL}wine-quality/", ";")


def protein() -> dict[str, np.ndarray]:
    """Load protein decoys: distance RMSD to the native structure, and 9 measurements, of 45,730.

    The folder named by `PROBDIFF_DATA` may hold CASP.csv or the same packed, protein.csv.xz; else
    it is downloaded once. A `ValueError` if a file's checksum is another.

    Returns:
        Columns by name, each `(45730,)`; 1,711 rows are copies of others.

    Example:
        >>> list(datasets.protein())[:3]  # doctest: +SKIP
        ['RMSD', 'F1', 'F2']

    Source: Rana (2013), Physicochemical properties of protein tertiary structure.
    """
    return _columns("protein.csv", "CASP.csv", f"{_URL}00265/", ",")


def _columns(packed: str, name: str, url: str, delimiter: str) -> dict[str, np.ndarray]:
    file = given(f"{packed}.xz", _PACKED)
    content = (fetch(name, _PLAIN, url) if file is None else file).read_bytes()
    text = (content if file is None else lzma.decompress(content)).decode()
    head, *rows = csv.reader(io.StringIO(text), delimiter=delimiter)
    values = np.array(rows, np.float64)
    return dict(zip(head, values.T, strict=True))
