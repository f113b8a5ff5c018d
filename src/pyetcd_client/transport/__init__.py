"""Errors, results, endpoints, connections, calls."""
