"""Random valid models for hypothesis: branches, shared weights, bodies of If, several outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

IMAGE, ROW = (2, 4, 6, 6), (2, 8)
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass
class Builder:
    """A graph in the making; all tensors have the shape `IMAGE` or `ROW`."""

    draw: Draw
    rng: np.random.Generator
    pool: dict[str, tuple[int, ...]]
    arrays: dict[str, np.ndarray[Any, Any]]
    prefix: str = ""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    own: list[str] = field(default_factory=list)

    def pick(self, shape: tuple[int, ...]) -> str:
        """A tensor of that shape; recent ones more often than not."""
        names = [name for name, known in self.pool.items() if known == shape]
        return names[-1 - self.draw(st.integers(0, min(len(names) - 1, 5)))]

    def weight(self, key: str, *shape: int) -> str:
        """A constant; one of two of that kind, so that many are shared."""
        name = f"{key}{self.draw(st.integers(0, 1))}"
        if name not in self.arrays:
            fan_in = max(int(np.prod(shape[1:])), 1)
            self.arrays[name] = (self.rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)
        return name

    def fixed(self, name: str, values: Any) -> str:
        """A constant of given values."""
        self.arrays[name] = np.asarray(values)
        return name

    def add(self, op: str, inputs: list[str], shape: tuple[int, ...], count: int = 1, **attrs: Any) -> str:
        """A node; returns its first result."""
        names = [f"{self.prefix}t{len(self.own) + i}" for i in range(count)]
        node_name = self.draw(st.sampled_from(["", f"{self.prefix}{op}_{len(self.nodes)}"]))
        self.nodes.append(helper.make_node(op, inputs, names, name=node_name, **attrs))
        self.own += names
        self.pool.update(dict.fromkeys(names, shape))
        return names[0]

    def step(self, kind: str | None = None, depth: int = 0) -> None:
        """A random operator, or a few that belong together."""
        kinds = STEPS if depth == 0 else STEPS[:-1]
        getattr(self, f"_{kind or self.draw(st.sampled_from(kinds))}")()

    def _conv(self) -> None:
        group = self.draw(st.sampled_from([1, 2, 4]))
        inputs = [self.pick(IMAGE), self.weight(f"wc{group}", 4, 4 // group, 3, 3)]
        inputs += [self.weight("bc", 4)] if self.draw(st.booleans()) else []
        self.add("Conv", inputs, IMAGE, pads=[1] * 4, group=group)

    def _conv_norm(self) -> None:
        x = self.add("Conv", [self.pick(IMAGE), self.weight("wc1", 4, 4, 3, 3)], IMAGE, pads=[1] * 4)
        ones = self.fixed("ones", np.ones(4, np.float32))
        self.add("BatchNormalization", [x, ones, self.weight("bc", 4), self.weight("bc", 4), ones], IMAGE)

    def _conv_transpose(self) -> None:
        self.add("ConvTranspose", [self.pick(IMAGE), self.weight("wt", 4, 2, 3, 3)], IMAGE, pads=[1] * 4, group=2)

    def _activation(self) -> None:
        op = self.draw(st.sampled_from(["Relu", "Sigmoid", "LeakyRelu", "Tanh", "Identity", "Neg", "Softmax"]))
        shape = self.draw(st.sampled_from([IMAGE, ROW]))
        self.add(op, [self.pick(shape)], shape)

    def _clip(self) -> None:
        low, high = self.draw(st.sampled_from([(0.0, 6.0), (-1.0, 1.0), (0.0, 0.5)]))
        names = [self.fixed(f"limit{value:g}", np.float32(value)) for value in (low, high)]
        self.add("Clip", [self.pick(IMAGE), *names], IMAGE)

    def _add(self) -> None:
        shape = self.draw(st.sampled_from([IMAGE, ROW]))
        self.add(self.draw(st.sampled_from(["Add", "Sub", "Max"])), [self.pick(shape), self.pick(shape)], shape)

    def _beside_constant(self) -> None:
        other = self.weight("k", 4, 1, 1) if self.draw(st.booleans()) else self.fixed("half", np.float32(0.5))
        self.add(self.draw(st.sampled_from(["Add", "Mul"])), [self.pick(IMAGE), other], IMAGE)

    def _gate(self) -> None:
        x = self.pick(IMAGE)
        self.add("Mul", [x, self.add("Sigmoid", [x], IMAGE)], IMAGE)

    def _pool(self) -> None:
        op = self.draw(st.sampled_from(["MaxPool", "AveragePool"]))
        self.add(op, [self.pick(IMAGE)], IMAGE, kernel_shape=[3, 3], pads=[1] * 4)

    def _concat(self) -> None:
        axis = self.draw(st.integers(0, 1))
        both = self.add("Concat", [self.pick(IMAGE), self.pick(IMAGE)], (0,), axis=axis)
        self.add("Split", [both], IMAGE, count=2, axis=axis, num_outputs=2)

    def _moves(self) -> None:
        x = self.pick(IMAGE)
        x = self.add("Transpose", [x], IMAGE, perm=[0, 1, 3, 2])
        if self.draw(st.booleans()):
            self.add("Reshape", [x, self.fixed("shape", np.array([0, -1, 6, 6]))], IMAGE)

    def _resize(self) -> None:
        big = self.add("Resize", [self.pick(IMAGE), "", self.fixed("sizes", np.float32([1, 1, 2, 2]))], (0,))
        self.add("MaxPool", [big], IMAGE, kernel_shape=[2, 2], strides=[2, 2])

    def _pad(self) -> None:
        big = self.add("Pad", [self.pick(IMAGE), self.fixed("pads", np.array([0, 0, 1, 1] * 2))], (0,))
        self.add("AveragePool", [big], IMAGE, kernel_shape=[3, 3])

    def _where(self) -> None:
        mask = self.fixed("mask", np.arange(6) % 2 == 0)
        self.add("Where", [mask, self.pick(IMAGE), self.pick(IMAGE)], IMAGE)

    def _flatten_gemm(self) -> None:
        flat = self.add("Flatten", [self.pick(IMAGE)], (0,))
        self.add("Gemm", [flat, self.weight("wf", 8, 144), self.weight("bg", 8)], ROW, transB=1)

    def _matmul(self) -> None:
        w = self.weight("wm", 8, 8)
        w = self.add("Transpose", [w], (0,), perm=[1, 0]) if self.draw(st.booleans()) else w
        self.add("MatMul", [self.pick(ROW), w], ROW)

    def _gemm(self) -> None:
        attrs = {"alpha": 0.5} if self.draw(st.booleans()) else {}
        self.add("Gemm", [self.pick(ROW), self.weight("wm", 8, 8), self.weight("bg", 8)], ROW, **attrs)

    def _attention(self) -> None:
        x = self.pick(ROW)
        scores = self.add("MatMul", [x, self.add("Transpose", [self.pick(ROW)], (0,), perm=[1, 0])], (0,))
        self.add("MatMul", [self.add("Softmax", [scores], (0,)), x], ROW)

    def _layer_norm(self) -> None:
        self.add("LayerNormalization", [self.pick(ROW), self.weight("g", 8), self.weight("bg", 8)], ROW)

    def _embedding(self) -> None:
        self.add("Gather", [self.weight("wm", 8, 8), "ids"], ROW, axis=0)

    def _if(self) -> None:
        shape = self.draw(st.sampled_from([IMAGE, ROW]))
        bodies = {}
        for branch in ("then_branch", "else_branch"):
            # Exporters often use the same names in both branches.
            shared = self.draw(st.booleans())
            prefix = f"{self.prefix}b{len(self.own)}_" if shared else f"{self.prefix}{len(self.own)}_{branch}_"
            inner = Builder(self.draw, self.rng, dict(self.pool), self.arrays, prefix=prefix)
            for _ in range(self.draw(st.integers(1, 3))):
                inner.step(depth=1)
            result = inner.add("Identity", [inner.pick(shape)], shape)
            bodies[branch] = helper.make_graph(
                inner.nodes, branch, [], [helper.make_tensor_value_info(result, TensorProto.FLOAT, shape)]
            )
        self.add("If", ["flag"], shape, **bodies)


STEPS = sorted(name[1:] for name in vars(Builder) if name.startswith("_") and name[1:2].islower() and name != "_if")
STEPS.append("if")


@st.composite
def models(draw: Draw, least: int = 5, most: int = 30) -> onnx.ModelProto:
    """A model of ``least`` to ``most`` nodes; inputs ``image``, ``row``, ``ids`` and ``flag``."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    builder = Builder(draw, rng, {"image": IMAGE, "row": ROW}, {})
    goal = draw(st.integers(least, most - 4))
    builder.step("conv")
    builder.step("matmul")
    while len(builder.nodes) < goal:
        builder.step()
    shown = [name for name, shape in builder.pool.items() if shape in (IMAGE, ROW) and name in builder.own]
    outputs = [shown[-1], *draw(st.lists(st.sampled_from(shown), max_size=2))]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, builder.pool[n]) for n in dict.fromkeys(outputs)]
    known = sorted(name for name, array in builder.arrays.items() if array.dtype == np.float32)
    if known and draw(st.booleans()):
        infos.append(helper.make_tensor_value_info(known[0], TensorProto.FLOAT, builder.arrays[known[0]].shape))
    graph = helper.make_graph(
        builder.nodes,
        "random",
        [
            helper.make_tensor_value_info("image", TensorProto.FLOAT, IMAGE),
            helper.make_tensor_value_info("row", TensorProto.FLOAT, ROW),
            helper.make_tensor_value_info("ids", TensorProto.INT64, (2,)),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, ()),
        ],
        infos,
        [numpy_helper.from_array(array, name) for name, array in builder.arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def batches(seed: int = 0) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Two batches, so that both branches of every If are seen."""
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.normal(size=IMAGE).astype(np.float32),
            "row": rng.normal(size=ROW).astype(np.float32),
            "ids": rng.integers(0, 8, 2),
            "flag": np.array(flag),
        }
        for flag in (True, False)
    ]
