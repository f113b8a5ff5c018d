"""Leases, locks, queues, caches, services."""
