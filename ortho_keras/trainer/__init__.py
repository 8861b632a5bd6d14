"""A training run from recipe to report. Imports all other packages."""
