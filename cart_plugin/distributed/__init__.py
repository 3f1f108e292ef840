"""One recipe merged by several workers, in pieces that a killed run does not lose.

The tasks are mergekit's: its planner makes them, and its executor runs each tensor's. A piece is a
shard of the result as mergekit would write it, so that the bytes are the same.

- `tasks`: the tasks of a merge, taken from mergekit before it runs them
- `plan`: the result's shards, foreseen tensor by tensor
- `shard`: the making of one of them; `reading` and `writing` run beside it
- `journal`: what is finished, of which merge, and whether it is what it was
- `progress`: how far all workers are
- `here`, `on_ray`: who makes the shards
- `request`: all of it, as a command asks for it
"""
