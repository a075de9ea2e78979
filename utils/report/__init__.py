"""What a run tells: log, files of its epochs, pictures, records and the page about runs."""
