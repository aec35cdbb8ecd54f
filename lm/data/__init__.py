"""What is read from data files: rows and questions as records, and files of them as dictionaries."""
