"""The components: data preparation, training, evaluation, analysis and report, as typed steps of a pipeline.

Each is ``components/<name>/component.py``, a function of a few lines whose work is done by ``dvq`` and by
this layer's own modules, in the one image of the release; compiled, it is ``components/<name>/component.yaml``,
which any other pipeline can load.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dvq import DvqError, __version__

IMAGE = f"dvq:{__version__}"
"""The image that every component runs in."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print a DvqError raised in this block as one sentence, and exit with status 1; tracebacks are for bugs."""
    try:
        yield
    except DvqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
