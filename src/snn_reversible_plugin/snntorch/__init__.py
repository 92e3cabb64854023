"""snnTorch neurons that hold their membrane and nothing else.

The one idea: snnTorch's neurons are called one time step at a time, in the user's own loop, so each step
is one autograd function whose gradient needs only the membrane that the next step starts from.
Usable as neuron types (:class:`RevLeaky` and its siblings), by ``convert_to_reversible``, and after
:func:`register` by name. Source: snnTorch 1.0 (Eshraghian et al., Proceedings of the IEEE 111, 2023).
"""

from __future__ import annotations

try:
    import snntorch
except ModuleNotFoundError as error:
    if error.name != "snntorch":
        raise
    raise ImportError(
        "snn_reversible_plugin.snntorch needs snnTorch: pip install snn-reversible-plugin[snntorch]"
    ) from error

from snn_reversible_plugin.snntorch import types as types
from snn_reversible_plugin.snntorch.coupled import CoupledLIF
from snn_reversible_plugin.snntorch.neurons import (
    RevAlpha,
    RevLapicque,
    RevLeaky,
    RevRLeaky,
    RevRSynaptic,
    RevSynaptic,
)

__all__ = [
    "CoupledLIF",
    "RevAlpha",
    "RevLapicque",
    "RevLeaky",
    "RevRLeaky",
    "RevRSynaptic",
    "RevSynaptic",
    "register",
]


def register() -> None:
    """Put the reversible neuron types into the ``snntorch`` namespace.

    Example:
        >>> import snntorch
        >>> from snn_reversible_plugin.snntorch import register
        >>> register()
        >>> snntorch.RevLeaky(beta=0.9).beta
        tensor(0.9000)
    """
    for reversible in (RevLeaky, RevLapicque, RevSynaptic, RevAlpha, RevRLeaky, RevRSynaptic, CoupledLIF):
        setattr(snntorch, reversible.__name__, reversible)
