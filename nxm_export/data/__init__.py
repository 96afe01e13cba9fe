"""Task data: readers of files, examples, labels, question answering, and the metrics that score predictions."""
