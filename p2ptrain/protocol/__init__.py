"""The rules of a round as pure code: state, event and now go in, effects come out.

Nothing in this room reads a clock, draws a random number, opens a socket or touches a tensor.
"""
