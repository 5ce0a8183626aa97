"""Several ranks of torch.distributed that are one worker. `entry` is the way in; see docs/islands.md.

Nothing of it is imported for a worker of one process: what it needs of torch takes long.
"""
