"""What a model does, seen in one run on fake tensors: nn.Module → Graph. Floor 4.

`trace` runs the model on `fakes` of its tensors and makes a graph of what `record` saw: each module and operation, and
which tensor came from which. `parts` finds the tensors in a structure, `memory` says which of them show the same
elements, `ways` which entries and exits of modules a value passed before it was read, `outside` what comes back of
values that left torch, and `walks` over which modules the forward walked. `identity` finds forwards that ask whether
two tensors are one object.
"""
