"""What rounds of fresh processes prove."""
