"""The report of a benchmark's results: page, README table, pictures and bounds."""
