"""Reading traces that were recorded elsewhere: stages, categories, gaps."""
