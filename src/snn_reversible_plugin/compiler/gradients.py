"""The gradients of a product, one after the other, with no more alive than each of them reads.

The one idea: the backward of a convolution is one call for two gradients, which has its input, both
results and copies in a layout of its own alive at once. As two calls, the weight's first, the input is
gone when its gradient is made; and codes are unpacked for it anew, rather than kept from where the product
was computed again. Source: ``output_mask`` of ``aten.convolution_backward``, whose gradients are computed
apart anyway.
"""

from __future__ import annotations

from torch import fx

from snn_reversible_plugin.compiler.graph import REARRANGED, Joint, is_product, name_of, tensor_of
from snn_reversible_plugin.compiler.packing import Code, Writer


def split_convolutions(joint: Joint, writer: Writer) -> None:
    """Let each convolution's backward be two calls, where it is for two gradients."""
    for node in list(joint.graph.nodes):
        if node not in joint.of_tangents or name_of(node) != "convolution_backward":
            continue
        gradient, value, *others, mask = node.args
        assert isinstance(gradient, fx.Node) and isinstance(value, fx.Node)
        assert isinstance(mask, (list, tuple))
        if not (mask[0] and any(mask[1:])):
            continue
        writer.behind = node.prev
        of_weight = writer.call(node.target, gradient, value, *others, [False, *mask[1:]])
        # Of the input only its shape is read, which the gradient mostly has as well, and it is alive.
        stands_in = gradient if _is_alike(gradient, value) else value
        of_input = writer.call(node.target, gradient, stands_in, *others, [True, False, False])
        for user in list(node.users):
            user.replace_input_with(node, of_input if user.args[1] == 0 else of_weight)
        joint.graph.erase_node(node)
        joint.of_tangents.remove(node)
        joint.of_tangents |= {of_weight, of_input}


def _is_alike(one: fx.Node, other: fx.Node) -> bool:
    a, b = tensor_of(one), tensor_of(other)
    if a is None or b is None or a.dtype is not b.dtype or a.device != b.device:
        return False
    return a.shape == b.shape and a.stride() == b.stride()


def is_gradient(node: fx.Node) -> bool:
    """Whether a node of the backward is a product, or a convolution's backward."""
    return is_product(node) or name_of(node) == "convolution_backward"


def unpacked_anew(
    node: fx.Node, codes: dict[fx.Node, Code], alone: set[fx.Node], writer: Writer
) -> fx.Node | None:
    """A value of the forward again, if it is that of codes that are ``alone`` in their bytes but for views.

    Codes that share bytes are of a loop's steps: small, and each would be one more call.
    """
    if node in codes:
        return writer.unpack(codes[node]) if node in alone else None
    if name_of(node) not in REARRANGED and name_of(node) != "convert_element_type":
        return None
    (source,) = node.all_input_nodes
    value = unpacked_anew(source, codes, alone, writer)
    return None if value is None else writer.copy(node, {source: value})
