"""Graphs as text and adapters as files, written whole or not at all and checked before anything is made. Floor 5.

`exchange` turns a graph into JSON and back, and `consistency` asks whether what a file says of itself is true.
`storage` saves and loads an adapter by way of `files`; `branches` reads one into a branch of a `Switch` or a `Fusion`.
"""
