"""The reports of a run: log, files of its epochs, pictures, records and the page about runs."""
