"""A training run from recipe to report. Imports all other packages."""

from ortho_keras.method.backend import require_tensorflow

require_tensorflow("ortho_keras.trainer")
