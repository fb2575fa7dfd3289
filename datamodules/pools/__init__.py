"""Pools on disk: real sources to fixed-length blocks that can be traced to their documents."""
