"""Graph → View: boxes, frames, links, rows and totals as plain data, computed once. Floor 6.

Knows graphs and what of them is worth showing; nothing of colours, terminals or Graphviz. `data` is what renderers read,
`outline` the tree of names and what is opened, `runs` the repeats, `boxes` the walk from nodes to boxes and links, and
`fold` puts them together.
"""

from .data import Box, Frame, Link, Row, Sums, View, bar, legend, number, per_member, percent, shape_text
from .fold import view

__all__ = ["Box", "Frame", "Link", "Row", "Sums", "View", "bar", "legend", "number", "per_member", "percent"]
__all__ += ["shape_text", "view"]
