"""Facts as text for a terminal, or as a page. Computes and looks up nothing."""
