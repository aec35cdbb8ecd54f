"""Unlearning by arithmetic on weights: task vectors and TIES."""
