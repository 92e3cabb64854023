"""Reversed over depth: chains of reversible blocks, and the residual streams of stock networks."""

from snn_reversible_plugin.blocks.chain import RevSBlock, RevSSequence

__all__ = ["RevSBlock", "RevSSequence"]
