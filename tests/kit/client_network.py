"""Client on the network: deadlines, many servers, states, watches that outlive them."""

from __future__ import annotations


def _net_black_hole(connection):
    connection.recv(1)
