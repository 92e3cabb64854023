"""Neurons that a user wrote, run by their own recorded operations where those are proved to be all of it."""
