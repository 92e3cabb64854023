"""What others do about memory, by hand where no library does it."""
