"""The files of a run as one HTML page."""
