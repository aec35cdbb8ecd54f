"""From run folders to a report: what each folder is, which of them are about one model, and what that model is beside others."""
