"""What goes on inside a model: statistics of a run, and pictures of what it hears and where it looks."""
