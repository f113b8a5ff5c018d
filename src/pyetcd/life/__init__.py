"""Discovery, bootstrap, embedding, proxy, flags, backup, test kit, command line."""
