"""Where the kv heads of a layer store their pairs."""
