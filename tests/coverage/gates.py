"""Which activation calls only multiply other tensors, by walking the graph of one forward pass.

An activation call is a *gate* if it is a factor of another tensor somewhere, and every way from it
to the model's output goes through such a product. It is a factor where it multiplies a tensor that
does not depend on it and is not the activation's own input, either as the operand that is repeated
along an axis (squeeze-excite, spatial attention), or, where neither or both are repeated, as the
operand that is the activation's result itself but for a constant, a view or a resizing (GLU).
"""

from __future__ import annotations

from .tape import SAME, TURNS, Event, Node, Tape, is_self_gating, words

_HANDS_ON = (
    SAME
    | TURNS
    | words(
        """
        alias slice select unbind split split_with_sizes chunk expand as_strided diagonal unfold
        narrow roll flip repeat tile index index_select gather repeat_interleave
        add sub rsub mul div neg
        upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
        upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact2d
        _upsample_bilinear2d_aa _upsample_bicubic2d_aa
        """
    )
)
_SOFTMAX = words("_softmax _safe_softmax")


def gates(tape: Tape) -> set[Event]:
    """The activation calls of a forward pass that are gates."""
    depends = _depends(tape)
    straight = _straight(tape)
    outputs = set(tape.outputs)
    found = set()
    for bit, event in enumerate(tape.events):
        factor = reaches = False
        seen, stack = {event.result}, [event.result]
        while stack and not reaches:
            node = stack.pop()
            reaches = node in outputs
            for child in node.children:
                if _is_factor(node, child, event, 1 << bit, depends, straight):
                    factor = True
                elif child not in seen:
                    seen.add(child)
                    stack.append(child)
        if factor and not reaches:
            found.add(event)
    return found


def _depends(tape: Tape) -> dict[Node, int]:
    """For each node the activation calls that it depends on, as bits."""
    results = {event.result: 1 << bit for bit, event in enumerate(tape.events)}
    depends: dict[Node, int] = {}
    for node in tape.nodes:
        bits = results.get(node, 0)
        for parent in node.parents:
            bits |= depends[parent]
        depends[node] = bits
    return depends


def _straight(tape: Tape) -> set[Node]:
    """Nodes that are an activation's result, but for constants, views and resizing."""
    results = {event.result for event in tape.events}
    found: set[Node] = set()
    for node in tape.nodes:
        parents = set(node.parents)
        if node.operator is not None:
            handed_on = tape.passages[node.operator].source in found
        elif is_self_gating(node):
            handed_on = bool(parents & found)
        else:
            handed_on = len(parents) == 1 and parents <= found and node.op in _HANDS_ON
        if node in results or node.op in _SOFTMAX or handed_on:
            found.add(node)
    return found


def _is_factor(
    node: Node,
    product: Node,
    event: Event,
    bit: int,
    depends: dict[Node, int],
    straight: set[Node],
) -> bool:
    if product.op != "mul" or len(set(product.parents)) != 2:
        return False
    (other,) = (parent for parent in product.parents if parent is not node)
    if depends[other] & bit or other.root is event.source.root:
        return False
    return _repeated(node, product) or (node in straight and not _repeated(other, product))


def _repeated(node: Node, product: Node) -> bool:
    return node.spread or node.shape != product.shape
