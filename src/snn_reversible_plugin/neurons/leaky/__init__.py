"""The leaky family, one time step a call: snnTorch's equations."""
