"""The components: data preparation, training, evaluation, analysis and report, as typed steps of a pipeline.

Each is ``components/<name>/component.py``, a function of a few lines whose work is done by ``dvq`` and by
this layer's own modules, in the one image of the release; compiled, it is ``components/<name>/component.yaml``,
which any other pipeline can load.
"""

from dvq import __version__

IMAGE = f"dvq:{__version__}"
"""The image that every component runs in."""
