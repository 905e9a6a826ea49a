"""What results lose against each other: scores, statistics, a page; the command ``compare``."""
