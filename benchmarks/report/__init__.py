"""The report of a benchmark's results: page, tables of the documents, pictures and bounds."""
