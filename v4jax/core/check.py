"""Errors that a user can cause and cure."""


class UserError(ValueError):
    """One clear line: what is wrong and what to do. The command line prints it alone and exits with 1."""
