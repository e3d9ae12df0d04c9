"""Read files, directories, tables and hub names as a stream of rows."""
