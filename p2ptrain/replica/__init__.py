"""A peer's copy of the training state, and how it moves: apply, snapshot, log, checkpoint.

`apply` is the function that makes training a replicated log: the same entries from the same state give the
same bits on every machine (I2).
"""
