"""Loads a data set by its name: into memory, or as references to images that stay on the disk."""

import tensorflow as tf

from ortho_keras.method.errors import InputError, first_line
from ortho_keras.trainer.data.disk import DiskSplit
from ortho_keras.trainer.data.memory import read_into_memory
from ortho_keras.trainer.data.sources import SOURCES, TfdsDataset
from ortho_keras.trainer.data.splits import with_held_out


def load_data(name, data_dir=None, image_size=0, hold_out=True, storage="memory"):
    """Loads a data set for image classification.

    Args:
        name: `"digits"` (scikit-learn's 1,797 handwritten digits, 8x8), `"folder:PATH"`, or the name of a TFDS data set. A
            folder contains either one folder for each class, or `train` and `test` (and `val`) with one for each class in each.
        data_dir: Path of TFDS's folder of prepared data. Defaults to TFDS's own, `~/tensorflow_datasets`.
        image_size: int. Resizes to this many pixels a side; 0 keeps the size, which must then be the same for all images.
        hold_out: bool. Whether a data set without a validation split gets one.
        storage: `"memory"`, or `"disk"`: the images of a folder or of a TFDS set stay on the disk, in their own sizes, and the
            parts of them that a step uses are decoded and resized to `image_size` when they are needed (`DiskSplit`).

    Returns:
        An `ImageData`. A split that the data set lacks is cut off the training split, the same at every run: a tenth for the
        test of a folder without `test`, then, with `hold_out`, a tenth for validation. A TFDS set that has a validation split
        and no test split is tested on the former.

    Raises:
        InputError: If the data set is unknown, cannot be downloaded or read, or its images differ in size.
    """
    try:
        source = SOURCES.get("".join(name.partition(":")[:2]), TfdsDataset)(name, data_dir)
        if storage == "disk":
            splits = {key: DiskSplit(images, image_size) for key, images in source.on_disk().items()}
        else:
            splits = read_into_memory(source.examples(), image_size, source.flag)
    except (OSError, tf.errors.OpError) as error:
        raise InputError(f"--dataset {name} must be complete and readable. Received: {first_line(error)}") from error
    return with_held_out(splits, source.class_names, source.flag, hold_out)
