"""What a store does wrong, and trying it again: with growing pauses, some chance in them, and one deadline for it all.

The clients below (botocore, s3fs, obstore) are told not to try again by themselves, so that the deadline is one and
every attempt is counted. What no further attempt can mend, a missing object or a wrong key, is raised at once.
"""

import re
import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ResponseStreamingError,
    SSLError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as ConnectingError
from botocore.parsers import ResponseParserError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

ERRORS = (OSError, BotoCoreError, ClientError, aiohttp.ClientError, TimeoutError)  # what a store that fails raises
CREDENTIALS = (
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
)
PASSING = (  # what clients raise where no answer came, or half of one
    aiohttp.ClientError,
    ConnectingError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    ResponseParserError,
    ResponseStreamingError,
    TimeoutError,
)
LASTING = (SSLError, aiohttp.InvalidURL, aiohttp.ClientSSLError)  # of them, where no other would come
THROTTLED = ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests")
DAMAGED = ("BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody")  # on the way to the store
MANGLED = "Invalid timestamp"  # botocore's ValueError about a date in a list that came damaged
QUERY = re.compile(r"(https?://[^\s'\"?]*)\?[^\s'\"]*")  # of an address, where a signature would be
CAUSES = ("throttled", "server", "connection", "timeout", "checksum")
AT_THE_DOOR = 10.0  # seconds: the most that a store is tried again before there is any work to lose
PAUSES = 0.2, 15.0  # seconds: a pause is up to the first, then up to twice as much each time, up to the second
AGREE = 5  # times that something is read, until two readings that follow each other agree

T = TypeVar("T")

lock = threading.Lock()
retries: Counter[str] = Counter()  # in this process, by cause
taken: Counter[str] = Counter()  # of them, by `take_retries`


class PassingError(OSError):
    """A failure that another attempt may not have, for one of `CAUSES`."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


def patiently(work: Callable[[], T], seconds: float) -> T:
    """What `work` gives, tried again while it fails in a way that may pass, for so many seconds in all."""
    first, longest = PAUSES
    trying = Retrying(
        retry=retry_if_exception(lambda error: cause(error) is not None),
        wait=wait_random_exponential(multiplier=first, max=longest),
        stop=stop_before_delay(seconds),
        before_sleep=note,
        reraise=True,
    )
    return trying(work)


def is_of_one(error: BaseException) -> bool:
    """Whether a store that gives others will not give this object, today or another day."""
    return cause(error) is None and not is_of_credentials(error)


def agreed(work: Callable[[], T], told: Callable[[T], object] = lambda found: found) -> T:
    """What `work` gives twice in a row, as far as is `told`: for what comes with no checksum of its own."""
    before = work()
    for _ in range(AGREE):
        now = work()
        if told(now) == told(before):
            break
        before = now
        count("checksum")
    return now  # where it changes all the time, the last


def cause(error: BaseException) -> str | None:
    """Which of `CAUSES` made a store fail; None for what another attempt would not mend."""
    if isinstance(error, PassingError):
        return error.cause
    if isinstance(error, ValueError) and MANGLED in str(error):
        return "checksum"
    if client := client_error(error):
        return cause_of_reply(error_code(error), client.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if isinstance(error, aiohttp.ClientResponseError):
        return cause_of_reply("", error.status)
    if isinstance(error, PASSING) and not isinstance(error, LASTING):
        return "timeout" if "timeout" in type(error).__name__.lower() else "connection"
    return None


def cause_of_reply(code: str, status: int) -> str | None:
    """The same for an answer with this error code and HTTP status."""
    if code in DAMAGED:
        return "checksum"
    if code in THROTTLED or status in (429, 503):
        return "throttled"
    if code == "RequestTimeout" or status == 408:
        return "timeout"
    conflicts = ("OperationAborted", "ConditionalRequestConflict")  # with another writer, which will be done soon
    return "server" if code in conflicts or (status >= 500 and status != 501) else None


def is_of_credentials(error: BaseException) -> bool:
    """Whether a store failed for want of good credentials, which is no object's fault."""
    return error_code(error) in CREDENTIALS or isinstance(
        error, (NoCredentialsError, CredentialRetrievalError, TokenRetrievalError)
    )


def note(state: RetryCallState) -> None:
    assert state.outcome
    error = state.outcome.exception()
    count((error and cause(error)) or "server")


def count(cause: str) -> None:
    """Count one more attempt."""
    with lock:
        retries[cause] += 1


def take_retries() -> dict[str, int]:
    """How often this process tried again since this was last asked, by cause."""
    with lock:
        new = retries - taken
        taken.update(new)
    return dict(new)


def reason(error: BaseException) -> str:
    """What went wrong with a store, in one line that says what to do where that is known."""
    code = error_code(error)
    match error:
        case NoCredentialsError():
            return "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use --anonymous"
        case FileNotFoundError():
            return "no such file, folder or bucket"
        case PermissionError() if code == "QuotaExceeded":
            return "QuotaExceeded: the store takes no more from this user or bucket; make place or raise its quota"
        case PermissionError():
            return "access denied; check the credentials and what they allow"
    text = QUERY.sub(r"\1", " ".join(str(error).split())) or type(error).__name__
    return f"{code}: {text}"[:300] if code and code not in text else text[:300]


def error_code(error: BaseException) -> str:
    """S3's own code of an error ("SlowDown"), or nothing."""
    client = client_error(error)
    return str(client.response.get("Error", {}).get("Code", "")) if client else ""


def client_error(error: BaseException) -> ClientError | None:
    """The answer of an S3 server that an error is or comes from."""
    return next((one for one in (error, error.__cause__) if isinstance(one, ClientError)), None)
