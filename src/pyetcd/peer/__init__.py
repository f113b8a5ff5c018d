"""Frames, links, transport."""
