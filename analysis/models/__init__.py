"""Models: find, vet and load them, and work out their sizes from their configs alone."""
