"""Small changes to the wires of a graph."""

from __future__ import annotations

import onnx_graphsurgeon as gs


def replace_reads(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every node that reads ``old``, in bodies too, read ``new``; outputs of graphs stay."""
    for reader in list(old.outputs):
        for i, entry in enumerate(reader.inputs):
            if entry is old:
                reader.inputs[i] = new


def remove(node: gs.Node) -> None:
    """Unhook a node from its graph: it reads and writes nothing any more, and the next cleanup drops it."""
    node.inputs.clear()
    node.outputs.clear()


def move_output(node: gs.Node, output: gs.Tensor) -> None:
    """Let ``node`` write ``output`` instead of its first output; whoever wrote it before is removed."""
    for writer in list(output.inputs):
        remove(writer)
    node.outputs[0] = output
