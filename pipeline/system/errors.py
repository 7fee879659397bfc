"""Errors that are for the user: printed in one line, without a traceback."""


class InputError(Exception):
    """The user's input is wrong: printed as `error: WHAT, WHERE, WHAT TO DO` and answered with exit
    code 2.
    """

    def __init__(self, what: str, where: str, remedy: str) -> None:
        super().__init__(" ".join(f"{what}, {where}, {remedy}".split()))


class TrainingStopped(RuntimeError):
    """Training went wrong; the message is for the user (exit code 1), the last good checkpoint is
    kept.
    """


class Ended(Exception):
    """A part of the stage, working in a process of its own, has failed: its line for the user and
    its exit code.
    """

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code
