"""The contract of SemEval-2025 Task 4: a model and two folders in, an unlearned checkpoint out."""
