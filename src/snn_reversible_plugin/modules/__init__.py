"""What is done to a user's modules: which are neurons, what stands in for them, how they run again."""
