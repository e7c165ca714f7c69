"""What `find_sites` and `sparsify_` reach, checked by a tracer that knows nothing of how they work.

`python -m tests.coverage` sweeps about 290 models, see docs/coverage.md.

* `tape`: what really ran in one forward pass, operation by operation.
* `gates`: which activation calls only multiply other tensors.
* `channels`: which axes are channels, by perturbing what made them.
* `oracle`: the three together: every activation call of a model, and every operator.
* `check`: a model from the first forward pass to `restore_`, and what went wrong.
* `models`: the models. `sweep`: all of them in turn. `report`: docs/coverage.md.

Nothing here imports `lightning_meansparse.sites` except `check`, which is what asks it.
"""
