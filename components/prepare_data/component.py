"""prepare_data: verified images with their splits and statistics, as a dataset artifact."""

from kfp import dsl
from kfp.dsl import Dataset, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare_data(name: str, data: Output[Dataset], source: str = ""):
    """The dataset as uint8 arrays; prepared once a store.

    Args:
        name: "cifar10", "cifar10-sample", which is bundled, or what make data calls images of your own.
        source: the launcher's DATA: cifar-10-python.tar.gz or a folder that holds it or its batches, an address of it
            (https://…, s3://bucket/key), or "" for the official one; the file of your own images (a path or
            s3://…), or "" if the store has them; the sample needs none.

    Returns:
        data: train_images.npy, train_labels.npy, test_images.npy, test_labels.npy and data.json.
    """
    from pathlib import Path

    from components import datasets, exit_on_error

    with exit_on_error():
        info = datasets.prepare(name, source, Path(data.path)).info
    described = ("name", "label", "fingerprint", "train", "tune", "test")
    data.metadata.update({key: info[key] for key in described})
