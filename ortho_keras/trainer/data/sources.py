"""Where images come from: scikit-learn's digits, a folder, TFDS. A source is one subclass of `Source`."""

import random

import numpy as np
import tensorflow as tf

from ortho_keras.method.checks import require
from ortho_keras.method.errors import InputError, first_line
from ortho_keras.method.files import expanded
from ortho_keras.trainer.data.crops import decoded_image, read_image
from ortho_keras.trainer.data.disk import ImageFiles, ImageRecords, shown

SOURCES = {}  # by the data set's name, or by the part of it up to its colon
SUFFIXES = (".jpg", ".jpeg", ".png")


class Source:
    """A data set for image classification, with the arguments `name` and `data_dir` of `load_data`.

    A subclass is available by its name, `class Digits(Source, name="digits")`, or by a prefix, `name="folder:"`. It sets
    `class_names`, a list. The keys of its splits are `"train"` and, where the data has them, `"test"` and `"validation"`.
    """

    def __init_subclass__(cls, name=None, **kwargs):
        super().__init_subclass__(**kwargs)
        if name is not None:
            SOURCES[name] = cls

    def __init__(self, name, data_dir=None):
        self.flag = f"--dataset {name}"  # for error messages
        self.notes = []  # lines for the log
        self.skipped = {}
        self.train_labels = None  # of the training images, in their order, where they are known before an image is read

    def examples(self):
        """Returns `{split: iterable of pairs of a uint8 image (height, width, channels) and a label}`.

        An image that cannot be read or decoded is left out, and `skipped[split]` has its name by its place in the split.
        """
        raise NotImplementedError

    def on_disk(self):
        """Returns `{split: ImageFiles or ImageRecords}`."""
        raise InputError(f"{self.flag} must be used with --storage memory. Received: --storage disk")


class Digits(Source, name="digits"):
    """Scikit-learn's handwritten digits: 1,797 grayscale images of 8x8 pixels, a fifth of them for the test."""

    def examples(self):
        require(self.flag, "sklearn")
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        self.class_names = [str(name) for name in digits.target_names]
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
        parts = train_test_split(np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
        return {key: zip(images[part], digits.target[part]) for key, part in zip(("train", "test"), parts)}


class ImageFolder(Source, name="folder:"):
    """A folder of class folders with JPEG and PNG files, or of `train`, `test` and `val` with class folders in each."""

    def __init__(self, name, data_dir=None):
        super().__init__(name)
        path = name.removeprefix("folder:")
        self.path = expanded(path)
        if not path or not self.path.is_dir():
            raise InputError(f"{self.flag} must be a folder that exists. Received: {path!r}")
        names = _splits([folder.name for folder in _folders(self.path)])
        # A class can be called `train`: as a split it contains folders itself.
        if "train" not in names or not _folders(self.path / "train"):
            names = {"train": ""}
        classes = {split: _folders(self.path / name) for split, name in names.items()}
        files = {split: self._images(folders) for split, folders in classes.items()}
        found = sorted({path.parent.name for paths in files.values() for path in paths})
        labels, self.class_names = {name: label for label, name in enumerate(found)}, [*map(shown, found)]
        self.files = {split: [(path, labels[path.parent.name]) for path in paths] for split, paths in files.items() if paths}
        empty = sorted({shown(folder.name) for folders in classes.values() for folder in folders} - set(self.class_names))
        if empty:
            self.notes.append(f"folders without images are no classes: {', '.join(empty)}")
        self.notes += [f"no image is in {name}/" for split, name in names.items() if not files[split]]
        parents = {self.path, *(self.path / name for name in names.values())}
        outside = [entry for parent in parents for entry in parent.iterdir() if entry.is_dir() or _is_named_image(entry)]
        outside = {shown(entry.relative_to(self.path)) for entry in outside if entry.name[0] != "."}
        outside -= {shown(path.relative_to(self.path)) for path in parents.union(*classes.values())}
        if outside:
            self.notes.append(f"outside of class folders, and left out: {_listed(sorted(outside))}")
        if "train" in self.files:
            self.train_labels = np.array([label for _, label in self.files["train"]])
        else:
            expected = "one folder of JPEG or PNG images for each class, or train/ and test/ with such folders in each"
            raise InputError(f"{self.flag} must contain {expected}. Received: no image")

    def examples(self):
        return {split: self._decoded(split) for split in self.files}

    def on_disk(self):
        return {split: ImageFiles(self.flag, self.path, *zip(*pairs)) for split, pairs in self.files.items()}

    def _images(self, folders):
        """The image files in class folders, in an order that mixes the classes and is the same on every machine."""
        images, others = [], []
        for path in (path for folder in folders for path in sorted(folder.iterdir())):
            named, hidden = _is_named_image(path), path.name[0] == "."
            # A pipe would wait for its writer. A link to nothing counts as an image, which is skipped when it is read.
            if named and not hidden and (path.is_file() or not path.exists()):
                images.append(path)
            elif named or not hidden:  # `.DS_Store` is of no interest, macOS's `._0.png` looks like an image
                others.append(shown(path.relative_to(self.path)))
        if others:
            received = f"{len(others)} entries of class folders are not JPEG or PNG files and were left out"
            self.notes.append(f"{received}: {_listed(others)}")
        random.Random(len(images)).shuffle(images)
        return images

    def _decoded(self, split):
        skipped = self.skipped[split] = {}
        for number, (path, label) in enumerate(self.files[split]):
            try:
                yield read_image(path), label
            except (OSError, tf.errors.InvalidArgumentError):
                skipped[number] = shown(path.relative_to(self.path))


def _is_named_image(path):
    return path.suffix.lower() in SUFFIXES


def _listed(names):
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def _folders(path):
    """Hidden folders (`.ipynb_checkpoints`) are not classes."""
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _splits(names):
    """Returns which of the names are splits, as `{"train": "train", "test": "test", "validation": "val"}`."""
    known = {"train": "train", "test": "test", "validation": "validation", "val": "validation", "valid": "validation"}
    return {split: name for name, split in reversed(known.items()) if name in names}


class TfdsDataset(Source):
    """A classification data set of TFDS, downloaded first if it is not prepared yet."""

    def __init__(self, name, data_dir=None):
        super().__init__(name)
        require(self.flag, "tensorflow_datasets")
        import tensorflow_datasets as tfds

        try:
            self.builder = tfds.builder(name, data_dir=data_dir)
        except Exception as error:  # depending on the form of the name, TFDS raises almost anything
            expected = "digits, folder:PATH or the name of a TFDS data set"
            raise InputError(f"--dataset must be {expected}. Received: {name!r} ({first_line(error)})") from error
        features = self.builder.info.features
        if not {"image", "label"} <= set(features) or not isinstance(features["label"], tfds.features.ClassLabel):
            raise InputError(f"{self.flag} must have an image and a class label in each example. Received: {list(features)}")
        self.class_names = features["label"].names
        if not self.builder.is_prepared():
            self._prepare()
        names = list(self.builder.info.splits)
        self.splits = _splits(names)
        if "test" not in self.splits and "validation" in self.splits:
            self.splits["test"] = self.splits.pop("validation")
        if not {"train", "test"} <= set(self.splits):
            raise InputError(f"{self.flag} must have a training and a test split. Received: the splits {names}")

    def _prepare(self):
        """Downloads and prepares the data. Without a network TFDS retries for minutes: one request fails within seconds."""
        import requests

        instructions = self.builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        try:
            urls = [url for url in self.builder.url_infos or () if url.startswith("http")]
            if urls and not instructions:
                requests.head(urls[0], timeout=10)
            self.builder.download_and_prepare()
        except Exception as error:  # TFDS passes on whatever its downloader raises
            received = f"nothing prepared in {self.builder.data_path}, and the download failed ({first_line(error)})"
            if instructions:
                received += f"; its files must be downloaded manually: {' '.join(instructions.split())}"
            raise InputError(f"{self.flag} must be prepared in --data_dir or downloadable. Received: {received}") from error

    def examples(self):
        dtype = np.dtype(self.builder.info.features["image"].np_dtype)
        if dtype != np.uint8:
            raise InputError(f"{self.flag} must have images of 8 bits. Received: {dtype.name}")
        return {key: self._decoded(split).as_numpy_iterator() for key, split in self.splits.items()}

    def _decoded(self, split):
        import tensorflow_datasets as tfds

        feature = self.builder.info.features["image"]
        is_file = isinstance(feature, tfds.features.Image)  # or a tensor, without an orientation

        def decode(example):
            image = example["image"]
            return decoded_image(image, feature.shape[-1]) if is_file else image, example["label"]

        stored = self.builder.as_dataset(split=split, decoders={"image": tfds.decode.SkipDecoding()} if is_file else None)
        return stored.map(decode, num_parallel_calls=tf.data.AUTOTUNE)

    def on_disk(self):
        info = self.builder.info
        kind = info.file_format.value
        if kind != "tfrecord":
            raise InputError(f"{self.flag} must be prepared as TFRecord files for --storage disk. Received: {kind}")
        splits = {key: ImageRecords(self.flag, info.splits[name].filepaths, info.features) for key, name in self.splits.items()}
        for key, name in self.splits.items():
            counts = len(splits[key]), info.splits[name].num_examples
            if counts[0] != counts[1]:
                received = f"{counts[0]} of the {counts[1]} examples of the split {name!r} in {self.builder.data_path}"
                raise InputError(f"{self.flag} must be complete. Received: {received}")
        return splits
