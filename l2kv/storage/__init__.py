"""Storage of the pairs of a layer's kv heads."""
