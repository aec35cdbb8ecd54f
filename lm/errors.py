"""The one error that a user can mend: bad input, a bad file, an impossible combination.

Every message is a sentence that names the thing, the value and the remedy. Scripts print it on one line and
exit with status 2; anything else that is raised is a defect of this project.
"""


class UserError(ValueError):
    """Something the user can put right. The message says what, and how."""
