"""Reactor, TLS, HTTP messages, HTTP server, HTTP calls, DNS."""
