"""The services that Rollcall is measured beside.

Nothing is imported here: a peer carries no weight but its own.
"""
