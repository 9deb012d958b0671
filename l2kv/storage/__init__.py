"""Where pairs are stored: in one tensor for all heads, or in pages where heads hold different numbers."""
