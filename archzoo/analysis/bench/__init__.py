"""`archzoo bench`: training, prefill and decoding against length, of models side by side.

`contenders` has the interface that a side implements, `peers` other projects' models, `worker` what
a side's process does and `sides` its handle, `measuring` the rounds and the time budget, `showing`
tables, figures and crossovers, and `command` the command.
"""
