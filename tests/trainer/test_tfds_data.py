"""TFDS sets in memory: what is read, what is prepared, and what is refused and how."""

import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from loaded import prepare, refusal, values

from ortho_keras.trainer.data import load_data, loading


def gradients(n, start=0, size=(4, 6)):
    """`n` images of one value each, from `start` on, with labels 0, 1, 0, ..."""
    index = start + np.arange(n)
    return (index[:, np.newaxis, np.newaxis, np.newaxis] + np.zeros((1, *size, 1))).astype(np.uint8), index % 2


def test_tfds_data(tmp_path):
    prepare(tmp_path, "tiny", {"train": gradients(20), "validation": gradients(5, 100)})
    data, again = load_data("tiny", tmp_path), load_data("tiny:1.0.0", tmp_path)
    assert data.image_shape == (4, 6, 1) and data.class_names == ("a", "b")
    assert sorted(values(data.test)) == [100, 101, 102, 103, 104]  # no test split: the validation split is it
    assert (len(data.train), len(data.validation)) == (18, 2)
    assert sorted(values(data.train, data.validation)) == list(range(20))
    assert data.train.labels.tolist() == [value % 2 for value in values(data.train)]
    assert values(data.train) == values(again.train)
    assert load_data("tiny", tmp_path, 9).image_shape == (9, 9, 1)
    prepare(tmp_path, "whole", {"train": gradients(20), "validation": gradients(3, 50), "test": gradients(4, 100)})
    data = load_data("whole", tmp_path)
    found = [sorted(values(split)) for split in (data.train, data.validation, data.test)]
    assert found == [list(range(20)), [50, 51, 52], [100, 101, 102, 103]]
    tensors = tfds.features.Tensor(shape=(4, 6, 1), dtype=np.uint8)
    prepare(tmp_path, "tensors", {"train": gradients(4), "test": gradients(3, 100)}, image=tensors)
    data = load_data("tensors", tmp_path, hold_out=False)
    assert (sorted(values(data.train)), sorted(values(data.test))) == ([0, 1, 2, 3], [100, 101, 102])


def test_images_are_resized_as_one_by_one_and_stay_in_order(monkeypatch):
    monkeypatch.setattr(loading, "RESIZED_AT_ONCE", 200)
    rng = np.random.default_rng(0)
    shapes = [(4, 6, 3), (5, 5, 3), (6, 4, 3), (9, 9, 3)]
    images = [rng.integers(0, 256, shapes[kind], dtype=np.uint8) for kind in rng.choice(4, 60, p=[0.5, 0.2, 0.1, 0.2])]
    found = loading.read_into_memory({"train": zip(images, range(60))}, 5, "--dataset x")["train"]
    assert found.labels.tolist() == list(range(60)) and found.images.dtype == np.uint8
    for image, resized in zip(images, found.images, strict=True):
        alone = image if image.shape[:2] == (5, 5) else tf.image.resize(image, (5, 5), antialias=True).numpy()
        assert np.abs(resized - alone.astype(np.float64)).max() <= 0.5 + 1e-4


def test_prepared_data_that_cannot_be_used(tmp_path):
    prepare(tmp_path, "untested", {"train": gradients(4)})
    assert "untested must have a training and a test split. Received: the splits ['train']" in refusal("untested", tmp_path)
    wide = (np.full((4, 4, 6, 1), 256 * 100 + 3, np.uint16), [0, 1, 0, 1])
    prepare(tmp_path, "wide", {"train": wide, "test": wide}, image=tfds.features.Image(shape=(4, 6, 1), dtype=np.uint16))
    assert "uint16" in refusal("wide", tmp_path)
    prepare(tmp_path, "numbers", {"train": gradients(3), "test": gradients(3)}, label=np.int64)
    assert "class label" in refusal("numbers", tmp_path)
    prepare(tmp_path, "tiny", {"train": gradients(20), "test": gradients(5)})
    (record,) = tmp_path.glob("tiny/1.0.0/tiny-train.tfrecord*")
    record.write_bytes(record.read_bytes()[:-40])
    assert "tiny must be complete" in refusal("tiny", tmp_path)


class GeneratedTiny(tfds.core.GeneratorBasedBuilder):
    """A data set with code, that prepares itself without a download unless it has a source."""

    VERSION = tfds.core.Version("1.0.0")
    SOURCE = None

    def _info(self):
        features = {"image": tfds.features.Image(shape=(4, 6, 1)), "label": tfds.features.ClassLabel(names=["a", "b"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        if self.SOURCE:
            dl_manager.download(self.SOURCE)
        return {"train": self._generate_examples(10, 0), "test": self._generate_examples(4, 100)}

    def _generate_examples(self, n, start):
        for image, label in zip(*gradients(n, start=start)):
            yield int(image[0, 0, 0]), {"image": image, "label": label}


class BrokenTiny(GeneratedTiny):
    """Fails half-way through preparing."""

    def _generate_examples(self, n, start):
        yield from super()._generate_examples(n, start)
        raise OSError(28, "No space left on device\nand a second line")


UNREACHABLE = "http://localhost:9/tiny.tar.gz"  # nothing listens on this port
URL_INFOS = {UNREACHABLE: tfds.core.download.checksums.UrlInfo(tfds.core.utils.Size(9), "00" * 32, "tiny.tar.gz")}


class UnreachableTiny(GeneratedTiny):
    SOURCE, url_infos = UNREACHABLE, URL_INFOS


class ByHandTiny(UnreachableTiny):
    """Its files must be downloaded manually, as ImageNet's."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "\nRegister somewhere, and put tiny.tar\n    into manual_dir.\n"

    def _split_generators(self, dl_manager):
        return super()._split_generators(dl_manager) if list(dl_manager.manual_dir.glob("tiny.tar")) else {}


def files_below(path):
    return {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}


def test_tfds_data_is_prepared_once(tmp_path):
    data = load_data("generated_tiny", tmp_path)
    assert sorted(values(data.train, data.validation, data.test)) == [*range(10), 100, 101, 102, 103]
    before = files_below(tmp_path)
    assert values(load_data("generated_tiny", tmp_path).train) == values(data.train) and files_below(tmp_path) == before


def test_tfds_data_that_cannot_be_prepared(tmp_path):
    message = refusal("broken_tiny", tmp_path)
    assert "No space left on device" in message and files_below(tmp_path) == {}
    assert str(tmp_path / "broken_tiny" / "1.0.0") in message and "--data_dir" in message


def test_files_that_must_be_downloaded_manually(tmp_path):
    message = refusal("by_hand_tiny", tmp_path)
    assert "Manual directory" in message  # no server is tried first
    assert message.endswith("its files must be downloaded manually: Register somewhere, and put tiny.tar into manual_dir.")


@pytest.mark.parametrize("name", ["nosuchset", "", "no such set", "generated_tiny/a=3", "huggingface:x"])
def test_unknown_tfds_name(tmp_path, name):
    assert repr(name) in refusal(name, tmp_path)
    assert files_below(tmp_path) == {}


def test_a_server_that_cannot_be_reached_is_reported_soon(tmp_path):
    """TFDS alone retries ten times, which takes minutes."""
    started = time.monotonic()
    message = refusal("unreachable_tiny", tmp_path)
    assert time.monotonic() - started < 30
    assert "connection" in message.lower() and str(tmp_path / "unreachable_tiny") in message and files_below(tmp_path) == {}
