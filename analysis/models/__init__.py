"""Models: found, vetted, loaded, and weighed by their configs alone."""
