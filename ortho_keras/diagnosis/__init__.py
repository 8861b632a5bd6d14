"""Where a network loses its signal: measurements, a callback, plots. Imports `method` and `nets`."""

from ortho_keras.method.backend import require_tensorflow

require_tensorflow("ortho_keras.diagnosis")
