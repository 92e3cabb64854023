"""Neurons on the grid, whose earlier states are rebuilt from later ones."""
