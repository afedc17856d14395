"""Progress bars: a line that grows where a person looks on, a line now and then in a file.

A terminal and a notebook take a bar that is drawn again ten times a second. In a file each drawing
is kept, and those of an hour hide the rest of a log; there it is drawn twice a minute, and at its
end.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS_IN_A_FILE = 30.0


def bar(steps: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A bar of tqdm on standard error, over `steps` or to be updated by hand.

    Args:
        steps: What is gone through.
        options: tqdm's own: `desc`, `total`, `disable`.
    """
    is_watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    if not is_watched:
        options |= {"mininterval": SECONDS_IN_A_FILE, "maxinterval": 2 * SECONDS_IN_A_FILE}
    return tqdm(steps, **options)
