"""The page's sections as plain records: every text, number and drawing that the template puts in its place. No HTML here."""
