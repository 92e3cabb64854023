"""Neurons that a user wrote, run by their recorded operations where those are proved to be all of it."""
