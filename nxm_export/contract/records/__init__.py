"""Records that commands write and others read: metrics, summaries, logs, reports."""
