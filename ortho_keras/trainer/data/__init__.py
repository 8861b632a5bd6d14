"""Images and labels: where they come from, how they are stored, and the batches that a run makes of them."""

from ortho_keras.trainer.data.batches import BatchSettings, evaluation_batches, training_batches
from ortho_keras.trainer.data.disk import DiskSplit
from ortho_keras.trainer.data.loading import ImageData, MemorySplit, load_data

__all__ = ["BatchSettings", "DiskSplit", "ImageData", "MemorySplit", "evaluation_batches", "load_data", "training_batches"]
