"""Keys, members, status, auth, snapshot, discovery service, the table of paths."""
