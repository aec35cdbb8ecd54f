"""What is asked of the model: facts, the subject in each, how near an answer is, and which cells a trace computes."""
