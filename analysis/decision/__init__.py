"""Whether to ship a compressed cache: what is measured for it, and the rules that turn measurements into an answer."""
