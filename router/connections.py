"""One connection of REST: what uvicorn's HTTP parser leaves to whoever uses it."""

import asyncio

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES_MAX = 65_536
"""What the line and the headers of a request may have; a proxy's are a few thousand."""

_OF_UPGRADES = frozenset((b"connection", b"upgrade", b"http2-settings"))


class Connection(HttpToolsProtocol):
    """Closes a connection on which no request has come for as long as one may stay idle.

    uvicorn does so behind an answer only, and waits for ever for the first request, or for the rest
    of one's head, however slowly and however much of it comes.

    A client that offers another protocol is answered in this one, as RFC 9110, 7.8, has it. Java's
    does so with each request, and uvicorn would lose the body.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first request."""
        super().connection_made(transport)
        self._head_bytes = 0
        self._in_head = False
        self._await_request()

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head is there; one with an offer is read again without it."""
        self._in_head = False
        if not self._offers():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request is there. Behind an offer the parser would not look for its body."""
        if not self._offers():
            super().on_message_complete()

    def _offers(self) -> bool:
        """Whether the request in hand asks for another protocol. CONNECT does nothing else."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def data_received(self, data: bytes) -> None:
        """Takes what came, and sets the time until which more of it has to."""
        began = self._head_bytes > 0
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self.transport.is_closing():
            return
        if self._head_bytes > HEAD_BYTES_MAX:
            self._refuse_head()
            return
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self.timeout_keep_alive_task is None:
            self._await_request(anew=not (began and self._in_head))

    def _feed(self, data: bytes) -> None:
        """Raises HttpParserError for what is no HTTP."""
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                head = self._head_without_offer()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                data = head + data[offer.args[0] :]
            else:
                return

    def _head_without_offer(self) -> bytes:
        """The head of the request in hand; its connection stays open as is usual in its version."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % pair for pair in self.headers if pair[0] not in _OF_UPGRADES]
        return b"\r\n".join((*lines, b"", b""))

    def _await_request(self, *, anew: bool = True) -> None:
        """A head that has begun has no more time for each part that comes of it."""
        if anew:
            self._due = self.loop.time() + self.timeout_keep_alive
        self.timeout_keep_alive_task = self.loop.call_at(self._due, self.timeout_keep_alive_handler)

    def _refuse_head(self) -> None:
        text = b"the head of a request must have at most %d bytes" % HEAD_BYTES_MAX
        head = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n"
        kind = b"content-type: text/plain; charset=utf-8\r\n"
        self.transport.write(b"%b%bcontent-length: %d\r\n\r\n%b" % (head, kind, len(text), text))
        self.transport.close()
