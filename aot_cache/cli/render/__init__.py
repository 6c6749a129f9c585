"""Show facts as text for a terminal, or as an HTML page. Computes and looks up nothing."""
