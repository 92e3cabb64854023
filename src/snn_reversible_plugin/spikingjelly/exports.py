"""SpikingJelly's export to NIR, which looks neurons up by their exact class.

The one idea: whatever stands in for a neuron is exported as that neuron is, by the exporter's own rule.

Source: ``nir_exchange`` of SpikingJelly 2.0.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import suppress
from typing import Any

from torch import nn

from snn_reversible_plugin.modules.swap import stock_type

_OURS = __name__.partition(".")[0]


def teach_exporter(root: str) -> None:
    """Let the exporter of a copy of SpikingJelly, where it has one, know what stands in for its neurons."""
    if importlib.util.find_spec("nir") is None or importlib.util.find_spec("nirtorch") is None:
        return
    with suppress(ImportError, AttributeError):  # the releases before 2.0 have none
        mapper = importlib.import_module(f"{root}.nir_exchange.to_nir")._ModuleMapper
        rules = mapper.map_dict.fget
        mapper.map_dict = property(lambda self: _with_stand_ins(rules(self), self.net))


def _with_stand_ins(rules: dict[type[nn.Module], Any], net: nn.Module) -> dict[type[nn.Module], Any]:
    """The rules by class, with those of the classes in ``net`` that are ours."""
    for module in net.modules():
        theirs = next(cls for cls in stock_type(module).__mro__ if not cls.__module__.startswith(_OURS))
        if theirs in rules:
            rules.setdefault(type(module), rules[theirs])
    return rules
