"""Verbs, watching, users, the Client class."""
