"""Adapters around the nodes of a graph: what a selector means, what is written there, how it is taken out. Floor 1.

`surgery` opens a `site` for each of the `hosts` and lets the method write its body on a `draft` of the graph's table,
where `scopes` says which module owns what is written. `unsplice` is the way back.
"""
