"""Every tolerance that a test compares with, each with the line that derives it."""
