"""What a graph is made of, read from its shapes and edges: attention, feed-forward layers, residual sums. Floor 6.

One pass over the hosts in topological order; no model's name, and no module's. A *projection* is one matrix applied to
the features. A *core* is attention without its projections. A *residual sum* adds to a value what was computed from it
with weights. These are the *landmarks*; for every other value, `near` has the landmarks that it comes from directly.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from .graph import Graph
from .names import path_of
from .node import Node

Sizes: TypeAlias = "tuple[int, ...]"

ADD = frozenset({"add", "add_", "iadd", "radd"})
# queries, keys and values in one operation
ATTENTION = frozenset({"scaled_dot_product_attention", "flex_attention", "attention"})
SOFTMAX = frozenset({"softmax", "Softmax"})
MATMUL = frozenset(
    {"matmul", "rmatmul", "mm", "bmm", "einsum", "baddbmm", "addmm", "tensordot", "linear", "grouped_mm", "_grouped_mm"}
)
# attention with all its projections in one operation
MULTIHEAD = frozenset({"multi_head_attention_forward"})
# what carries values from one position to another, beside products of two values; and what does if it keeps features
MIXING = frozenset({"cumsum", "cumprod", "logcumsumexp", "stack", "setitem"})
REDUCING = frozenset({"sum", "mean"})

# kinds of landmarks
PROJECTION = "projection"
CORE = "attention core"
WHOLE = "attention with its projections in one module"
EXPERTS = "experts in one module"
RESIDUAL = "residual sum"
OTHER = "other weights"


class Structure:
    """The landmarks of a graph and the roles that they play; bodies are left out.

    Attributes:
        kind: for each landmark, which kind it is of.
        near: for each node the landmarks that its value comes from, and whether positions were mixed on the way.
        roles: for each role the landmarks that play it, in topological order.
    """

    def __init__(self, graph: Graph) -> None:
        self.imported = graph.imported is not None
        self.nodes = {n.name: n for n in graph.nodes() if n.name and n.body is None}
        self.order = list(self.nodes)
        self.index = {name: i for i, name in enumerate(self.order)}
        self.kind: dict[str, str] = {}
        self.near: dict[str, Mapping[str, bool]] = {}
        self.roles: dict[str, dict[str, None]] = {}
        self._hosts = {written: read for body in graph.bodies.values() for read, written in body.calls}
        self._weights = _weights(graph)
        self._flows: dict[str, tuple[str, ...]] = {}
        self._constant: set[str] = set()
        # for what comes from a product of two values, that product; and the same behind a softmax
        self._scores: dict[str, str] = {}
        self._chances: dict[str, str] = {}
        # for each core its queries, keys and values
        self._cores: dict[str, tuple[str, str, str]] = {}
        # for each projection what it reads, and which dimension of its value holds the features
        self._taken: dict[str, str] = {}
        self._features: dict[str, int] = {}
        # for each residual sum the value that it starts from, and what is added to it
        self._forks: dict[str, tuple[str, tuple[str, ...]]] = {}
        # for each value, which others were computed from it, and which not
        self._walked: dict[str, dict[str, str | None]] = {}
        reads = {name: dict.fromkeys(self._from_hosts(node.inputs)) for name, node in self.nodes.items()}
        self._readers = Counter(v for read in reads.values() for v in read)
        self._parts = {v for name, read in reads.items() if self.nodes[name].op == "output" for v in read}
        for name, node in self.nodes.items():
            self._read(name, node, list(reads[name]))
        self._attention()
        for name in self._forks:
            self._feed_forward(name)
        self._heads(self._from_hosts(graph.output_names()))
        self.roles = {r: dict.fromkeys(sorted(n, key=self.index.__getitem__)) for r, n in self.roles.items()}

    def host(self, value: str) -> str:
        """The value of a host that this one is, before any body."""
        while value in self._hosts:
            value = self._hosts[value]
        return value

    def _from_hosts(self, values: Sequence[str]) -> list[str]:
        """The hosts' values that these are; what is inside a body is none."""
        return [v for v in map(self.host, values) if v in self.nodes]

    def playing(self, role: str) -> list[str]:
        """The landmarks that play a role."""
        return list(self.roles.get(role, ()))

    def plays(self, role: str, name: str) -> bool:
        """Whether a landmark plays a role."""
        return name in self.roles.get(role, ())

    def _add(self, role: str, name: str) -> None:
        self.roles.setdefault(role, {})[name] = None

    # ------------------------------------------------------------------ one node

    def _read(self, name: str, node: Node, inputs: list[str]) -> None:
        self._flows[name] = flows = tuple(v for v in inputs if _is_float(self.nodes[v]))
        weights = self._weights.get(name, {})
        if node.op == "param" or (node.op != "input" and not weights and all(v in self._constant for v in inputs)):
            self._constant.add(name)
            weights = {}
        values = [v for v in flows if v not in self._constant]
        product = len(values) > 1 and not weights and self._multiplies(name, node, values)
        kind = self._kind(name, node, weights, values, product)
        if kind is not None:
            self.kind[name] = kind
            self.near[name] = {name: False}
            return
        self.near[name] = self._joined(flows, product or self._mixes(node, flows))
        found = [self._scores[v] for v in flows if v in self._scores]
        scores = name if product else min(found, key=self.index.__getitem__, default=None)
        chances = next((self._chances[v] for v in flows if v in self._chances), None)
        if node.op in SOFTMAX:
            scores, chances = None, scores
        if scores is not None:
            self._scores[name] = scores
        if chances is not None:
            self._chances[name] = chances

    def _multiplies(self, name: str, node: Node, values: Sequence[str]) -> bool:
        """A matrix product of two values, also one that is a module of its own."""
        if "/" in name or not self.imported or len(values) != 2:
            return node.op in MATMUL and node.op != "linear"
        left, right = (self.nodes[v].shape or () for v in values)
        return len(left) > 2 and len(right) > 2 and left[-1] == right[-2] and node.shape == (*left[:-1], right[-1])

    def _mixes(self, node: Node, flows: Sequence[str]) -> bool:
        if node.op in REDUCING and flows:
            return (node.shape or ())[-1:] == (self.nodes[flows[0]].shape or ())[-1:]
        return node.op in MIXING

    def _joined(self, flows: Sequence[str], mixing: bool) -> Mapping[str, bool]:
        nears = [self.near[v] for v in flows]
        if len(nears) == 1 and not mixing:
            return nears[0]
        joined: dict[str, bool] = {}
        for near in nears:
            for landmark, mixed in near.items():
                joined[landmark] = joined.get(landmark, False) or mixed or mixing
        return joined

    def _kind(
        self, name: str, node: Node, weights: Mapping[str, Sizes], values: list[str], product: bool
    ) -> str | None:
        """Which kind of landmark a node is; None for all that only passes values on."""
        if any(len(shape) > 1 for shape in weights.values()):
            return self._module(name, node, weights)
        if node.op in MULTIHEAD:
            self._add("attention output", name)
            return WHOLE
        if node.op in ATTENTION and self._flows[name]:
            self._cores[name] = self._operands(self._flows[name])
            return CORE
        chances = [v for v in values if v in self._chances] if product else []
        if len(chances) == 1:
            scores = self._chances[chances[0]]
            query, key = [v for v in self._flows[scores] if v not in self._constant][-2:]
            self._cores[name] = (query, key, next(v for v in reversed(values) if v != chances[0]))
            return CORE
        if node.op in MATMUL and values and not product:
            return self._projection(name, values[0], -1)
        if node.op.startswith("conv") and self.imported:
            return OTHER
        return RESIDUAL if node.op in ADD and self._residual(name, node) else None

    def _module(self, name: str, node: Node, weights: Mapping[str, Sizes]) -> str | None:
        """A module with weights: one matrix over the features, or something that is not looked into."""
        read = next(iter(self._flows[name]), None)
        matrices = [shape for shape in weights.values() if len(shape) > 1]
        if "out_proj.weight" in weights and {"in_proj_weight", "q_proj_weight"} & set(weights):
            self._add("attention output", name)
            return WHOLE
        if sum(len(m) == 3 for m in matrices) > 1 and len({m[0] for m in matrices}) == 1:
            return EXPERTS
        taken, given = self.nodes[read].shape if read else None, node.shape
        if read is None or not taken or not given or len(matrices) > 1 or name in self._parts:
            return OTHER
        weight = matrices[0]
        if len(weight) == 2 and (taken[-1], given[-1]) in (weight, weight[::-1]):
            return self._projection(name, read, -1)
        if taken == given and sum(size != 1 for size in weight) < 2:
            # a scale
            return None
        if len(weight) > 2 and len(taken) == len(given) == len(weight):
            if weight[:2] == (given[1], 1) and given[1] == taken[1]:
                # one small filter for each feature: the features stay apart
                return None
            if (
                set(weight[2:]) == {1}
                and given[1] == weight[0]
                and isinstance(taken[1], int)
                and not taken[1] % weight[1]
            ):
                return self._projection(name, read, 1)
        return OTHER

    def _projection(self, name: str, read: str, features: int) -> str:
        self._add("projection", name)
        self._taken[name] = read
        self._features[name] = features
        return PROJECTION

    # ------------------------------------------------------------------ attention

    def _operands(self, flows: Sequence[str]) -> tuple[str, str, str]:
        """Queries, keys and values of one operation; where two of them are one value, the graph has it once."""
        query, key, value = (flows[min(i, len(flows) - 1)] for i in range(3))
        shape, other = self.nodes[value].shape, self.nodes[key].shape
        if shape and other and shape[:-1] != other[:-1]:
            # the third is a mask already
            value = key
        return query, key, value

    def _attention(self) -> None:
        """The projections that read a core, or a core that none of them reads; and those that a core reads."""
        outputs: dict[str, list[str]] = {core: [] for core in self._cores}
        for name, read in self._taken.items():
            for core in self._cores.keys() & self.near[read]:
                outputs[core].append(name)
        starts: dict[str, int] = {}
        for fork, branches in self._forks.values():
            for landmark in (i for branch in branches for i in self.near[branch]):
                starts[landmark] = max(self.index[fork], starts.get(landmark, -1))
        for core, operands in self._cores.items():
            start = -1
            for output in outputs[core] or [core]:
                self._add("attention output", output)
                start = max(start, starts.get(output, -1))
            for role, operand in zip(("query", "key", "value"), operands, strict=True):
                found = [i for i in self.near[operand] if self.kind[i] == PROJECTION]
                # what lies before the residual branch only tells positions or sizes
                inside = [i for i in found if self.index[i] > start]
                for landmark in inside or found:
                    self._add(role, landmark)

    # ------------------------------------------------------------------ residual sums

    def _residual(self, name: str, node: Node) -> bool:
        """Whether one side was computed, with weights, from the other; notes from where, and which sides."""
        flows = self._flows[name]
        if len(flows) < 2 or any(self.nodes[v].shape != node.shape or v in self._scores for v in flows):
            return False
        for trunk in flows:
            same = self._same(trunk)
            low = min(map(self.index.__getitem__, same))
            found = {}
            for branch in flows:
                if branch != trunk and any(self.index[landmark] > low for landmark in self.near[branch]):
                    fork = self._fork(branch, trunk, same, low)
                    if fork is not None and not self._inside_attention(fork, branch):
                        found[branch] = fork
            if found:
                self._forks[name] = (min(found.values(), key=self.index.__getitem__), tuple(found))
                return True
        return False

    def _same(self, value: str) -> set[str]:
        """A value and what it stands for: before a norm, a scale or a cast; before a parallel branch was added."""
        found = {value}
        while value in self._forks and self._readers[value] == 1:
            value = self._forks[value][0]
            found.add(value)
        while value not in self.kind and len(self._flows[value]) == 1:
            value = self._flows[value][0]
            found.add(value)
        return found

    def _inside_attention(self, fork: str, branch: str) -> bool:
        """Whether a value that attention reads is added to what it gives: a part of attention, no residual."""
        cores = [landmark for landmark in self.near[branch] if landmark in self._cores]
        read = {i for core in cores for v in self._cores[core] for i in self.near[v] if self.kind[i] == PROJECTION}
        return bool(read & self.near[fork].keys())

    def _fork(self, branch: str, trunk: str, same: set[str], low: int) -> str | None:
        """The last of these values that a branch was computed from. What was walked once is not walked again."""
        known = self._walked.setdefault(trunk, {})
        walked = {branch}
        heap = [-self.index[branch]]
        while heap:
            name = self.order[-heapq.heappop(heap)]
            fork = name if name in same else known.get(name)
            if fork is not None:
                known[branch] = fork
                return fork
            for read in self._flows[name]:
                if self.index[read] >= low and read not in walked and known.get(read, read) is not None:
                    walked.add(read)
                    heapq.heappush(heap, -self.index[read])
        known.update(dict.fromkeys(walked))
        return None

    # ------------------------------------------------------------------ feed-forward layers and heads

    def _feed_forward(self, name: str) -> None:
        """Projections that end a branch of a residual sum, after projections of the same features."""
        fork, branches = self._forks[name]
        shape, start = self.nodes[name].shape or (), self.index[fork]
        for last in dict.fromkeys(landmark for branch in branches for landmark in self.near[branch]):
            given = self.nodes[last].shape
            if self.index[last] <= start or not given:
                continue
            if given[self._features.get(last, -1)] not in (shape[-1:] + shape[1:2]):
                continue
            if self.kind[last] == EXPERTS:
                self._add("ffn output", last)
            elif self.kind[last] == PROJECTION and not self.plays("attention output", last):
                first = self._first(last, start)
                if first:
                    self._add("ffn output", last)
                for landmark in first:
                    self._add("ffn input", landmark)

    def _first(self, last: str, start: int) -> list[str]:
        """The projections with which a feed-forward layer begins; none if this is no feed-forward layer."""
        first: dict[str, None] = {}
        above, seen = [last], {last}
        while above:
            name = above.pop()
            near = self.near[self._taken[name]]
            inside = {landmark: mixed for landmark, mixed in near.items() if self.index[landmark] > start}
            plain = all(self.kind[i] == PROJECTION and not mixed for i, mixed in inside.items())
            before = [i for i in inside if not self.plays("attention output", i)]
            if plain and before:
                above += [i for i in before if i not in seen]
                seen.update(before)
            elif name == last:
                return []
            else:
                first[name] = None
        return list(first)

    def _heads(self, outputs: Sequence[str]) -> None:
        """Projections whose values the model returns, and nothing else with weights reads."""
        read = {landmark for value in self._taken.values() for landmark in self.near[value]}
        for name in self.kind:
            if name not in self._taken:
                read.update(i for value in self._flows[name] for i in self.near[value])
        for value in outputs:
            for landmark in self.near[value]:
                if self.kind[landmark] == PROJECTION and landmark not in read:
                    self._add("head", landmark)


def _is_float(node: Node) -> bool:
    return node.dtype is None or node.dtype.is_floating_point


def _weights(graph: Graph) -> dict[str, dict[str, Sizes]]:
    """For each call of a module without calls inside: the shapes of all parameters that it reads."""
    modules = {n.name: n.path for n in graph.nodes() if n.name and n.body is None and "/" not in n.name}
    modules = {name: path for name, path in modules.items() if graph[name].op not in ("input", "output")}
    found: dict[str, dict[str, Sizes]] = {path: {} for path in modules.values()}
    if graph.imported is None:
        for name, path in modules.items():
            found[path].update((p, param.shape) for p, param in graph[name].params.items())
        return {name: found[path] for name, path in modules.items() if found[path]}
    names = {name: [name] for name in graph.imported.params}
    for name, first in graph.imported.tied.items():
        names[first].append(name)
    for first, all_names in names.items():
        shape = graph.imported.params[first].shape
        owned = [name for name in all_names if name.rpartition(".")[0] in found]
        for name in owned:
            path, _, last = name.rpartition(".")
            found[path][last] = shape
        readers = [path_of(graph.imported.readers.get(name, "")) for name in all_names if not owned]
        for path in found.keys() & readers:
            found[path][first.removeprefix(path + ".")] = shape
    return {name: found[path] for name, path in modules.items() if found[path]}
