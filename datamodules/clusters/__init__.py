"""Clusters of a pool: vectors of its rows, k-means, and names for what came out."""
