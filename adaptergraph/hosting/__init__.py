"""Bodies that run inside a model somebody else wrote: the class swap, and what a forward meets at each site. Floor 4.

* `sites` attaches and detaches, `attachment` records what was done and undoes it. `routes` tells what each module has
  to do at its entry and at its exit.
* `hosted` swaps the classes. When the model runs, it takes the `steps`, whose values lie in the `frames` of that
  forward.
* A site between two operations of a forward: `lowering` reads the `source` of that forward, follows it (`following`)
  with arguments such as it is called with (`examples`), and writes the `program` that runs instead.
"""
