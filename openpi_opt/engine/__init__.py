"""The loop that keeps every device busy and keeps every result."""
