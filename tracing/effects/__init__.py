"""What a trace found: cells, means by token role with intervals, sentences, and comparisons of two traces."""
