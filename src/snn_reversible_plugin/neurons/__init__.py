"""Neuron equations, and their autograd functions on the tape. No framework is known here."""
