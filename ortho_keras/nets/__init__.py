"""Plain and residual networks, and their layers. Imports `method`."""
