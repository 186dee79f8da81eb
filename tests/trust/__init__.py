"""What is tried for docs/reliability.md: tests that take minutes each and record how much they tried."""
