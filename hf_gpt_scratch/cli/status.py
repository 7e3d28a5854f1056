"""Exit statuses; 0 is success, and 2 is typer's, for usage errors."""

FAILED, DIFFERENT, INTERRUPTED = 1, 3, 130
