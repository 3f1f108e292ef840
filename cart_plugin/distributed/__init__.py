"""One recipe merged by several workers, in parts that a killed run does not lose.

The tasks are mergekit's: its planner makes them, and its executor runs each tensor's. The parts are
shards of the result as mergekit would write them, or pieces of these: the bytes are the same.

- `tasks`: the tasks of a merge, taken from mergekit before it runs them
- `plan`: the result's shards and parts, foreseen tensor by tensor
- `part`: the making of one of them; `reading` and `writing` run beside it
- `journal`: what is finished, of which merge, and whether it is what it was
- `progress`: how far all workers are
- `here`, `on_ray`: who makes the parts; `start`: Ray, started while other things are done
- `request`: all of it, as a command asks for it
"""
