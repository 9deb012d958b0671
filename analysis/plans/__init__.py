"""What to keep: loss curves of captured texts, plans made of them, and what those cost on texts they have not seen."""
