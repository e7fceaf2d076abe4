"""Prepare a user's own images, and say what a sweep calls them: ``python -m pipeline.data FILE``."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from components import datasets
from dvq import own
from pipeline import preflight
from pipeline.command import application


def bring(
    source: Annotated[str, typer.Argument(help="a file of numpy.savez with train_images and test_images")],
) -> None:
    """Bring images to the store and print their name."""
    store = preflight.find_store()
    name = own.name(source)
    preflight.check_cache(store)
    with tempfile.TemporaryDirectory() as folder:
        prepared = datasets.prepare(name, source, Path(folder, "data"))
        info, arrays = prepared.info, prepared.arrays
        both = own.shared(arrays["train_images"], arrays["test_images"])
    if both:
        print(
            f"warning: {both} of the {info['test']} test images are training images too, pixel for pixel; results on "
            "them say nothing of images that were not seen",
            file=sys.stderr,
        )
    print(
        f"{info['train']} training images, of which 'split: tune' holds out {info['tune']}, and {info['test']} test "
        f"images are in the store {store.place}; in a sweep's base:\n\n  data: {name}"
    )


app = application(bring)

if __name__ == "__main__":
    app()
