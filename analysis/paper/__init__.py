"""The paper's figures on any model, as numbers, and why norms do or do not predict attention."""
