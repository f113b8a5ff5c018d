"""The command line: options, output, etcdctl's commands and more."""
