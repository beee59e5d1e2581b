"""From a command line to points, and from points to configurations."""
