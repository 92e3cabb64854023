"""Reversed over depth: chains of reversible blocks, columns, and the residual streams of stock networks."""

from snn_reversible_plugin.blocks.chain import RevSBlock, RevSSequence
from snn_reversible_plugin.blocks.columns import RevSColumns

__all__ = ["RevSBlock", "RevSColumns", "RevSSequence"]
