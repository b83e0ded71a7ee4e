"""edgekit: put a language model on a small device, and prove that it is still good."""
