"""Options, parsing, console output, signals and exit codes. Imports no other package of exo."""
