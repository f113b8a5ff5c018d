"""Events, watchers, history, the key tree, time to live."""
