"""Plans: loss curves of captured texts, plans made from them, and what plans cost on texts they have not seen."""
