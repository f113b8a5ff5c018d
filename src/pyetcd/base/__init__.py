"""Limits, errors, ids, paths, checksums, logging, the wire codec."""
