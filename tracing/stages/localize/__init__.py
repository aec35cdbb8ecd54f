"""The stage `localize`: several localizers on the same facts, compared."""
