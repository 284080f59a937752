"""Suites that others subclass or parametrise, and slow twins.

`ops` walks every operator; `interpret` runs a graph node by node. May import everything below the front doors.
"""
