"""Suites that others subclass or parametrise: `ops` walks every operator. May import everything below the front doors."""
