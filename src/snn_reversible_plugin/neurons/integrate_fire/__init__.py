"""The integrate-and-fire family over a sequence: IF, LIF, ParametricLIF."""
