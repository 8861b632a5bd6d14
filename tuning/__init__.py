"""Searches over a recipe's values by keras-tuner: `python -m tuning.search`, `python -m tuning.report`."""
