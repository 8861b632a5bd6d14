"""Where a network loses its signal: measurements, a callback, plots. Imports `method` and `nets`."""
