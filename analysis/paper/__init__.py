"""The paper's figures on any model, in numbers, and why norms go with attention or do not."""
