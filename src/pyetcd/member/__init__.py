"""Cluster, applier, journal, auth records, statistics, the server object."""
