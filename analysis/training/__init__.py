"""Training of the bundled model: a small Llama from a folder of texts, and the record of how its heads came to be."""
