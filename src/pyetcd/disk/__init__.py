"""Write-ahead log, snapshot files, the data directory."""
