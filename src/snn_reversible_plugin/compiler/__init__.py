"""The second engine: what the tape does to a step, done to the graph of a step before it is compiled.

Under ``torch.compile`` there are no saved tensors to hand out handles for. But the compiler has forward
and backward of a region in one graph, and a partitioner decides what of the forward is stored. The pass
in :mod:`.passes` runs before that decision: it finds values of few levels (:mod:`.levels`), lets
everybody read them from packed codes (:mod:`.packing`), and says which values are stored and which
computed again (:mod:`.plan`). :mod:`.backend` hands regions to Inductor with that pass; :mod:`.entry`
is the door, and decides what to do with loops over time (:mod:`.loops`) before anything is traced.
"""

from snn_reversible_plugin.compiler.entry import compile

__all__ = ["compile"]
