"""Messages of errors."""

from sfumato.errors import UserError


def assert_one_sentence(error: Exception, *words: object) -> None:
    """Assert that an error is a UserError of one line, not too long, with all of the words."""
    assert isinstance(error, UserError), repr(error)
    message = str(error)
    assert (
        "\n" not in message and len(message) < 1500 and all(str(word) in message for word in words)
    ), (message, words)
