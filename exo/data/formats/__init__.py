"""The formats of preference data: what the columns of a row mean."""
