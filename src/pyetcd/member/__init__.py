"""Cluster, applier, journal, auth records, statistics, the server object.

The way of a PUT through the rooms is drawn at the top of server.py.
"""
