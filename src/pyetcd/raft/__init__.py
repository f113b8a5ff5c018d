"""Progress and quorum, log, replication, the core."""
