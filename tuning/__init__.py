"""Searches over a recipe's values by keras-tuner: `python -m tuning.search`, `python -m tuning.report`."""

import train  # noqa: F401 - its flags are the search's, and it starts TensorFlow without its notes
