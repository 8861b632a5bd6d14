"""Searches over a recipe's values by keras-tuner: `python -m tuning.search`, `python -m tuning.report`."""

import ortho_train  # noqa: F401 - starts TensorFlow as train.py does, before anything imports it
