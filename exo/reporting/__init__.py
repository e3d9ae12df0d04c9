"""Show the run of a recipe as one HTML page."""
