"""motion8, the small data set of the demo."""
