"""Gradient release: buckets step in the backward pass and take turns in a pool of memory."""
