"""A TCP proxy before a server of HTTP, whose script says what goes wrong with which request.

A fault is tied to a request, not to a time: ``proxy.at(r"PUT .*partNumber=2", answer(503))`` meets the next such
request, and ``proxy.at(r"PUT .*/results.json", cut(server.kill))`` kills the server in the middle of it.
"""

import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import responses

PIECE = 1 << 16
EXPECT = re.compile(rb"(?i)\r\nexpect: *100-continue\r\n")


@dataclass
class Flow:
    """What of the server's answers reaches the client."""

    left: int | None = None
    """bytes after which the connection breaks"""


@dataclass
class Exchange:
    """A request whose head was read, and the two sides of its connection."""

    line: str
    """``PUT /bucket/key?partNumber=2``"""
    head: bytes
    length: int
    """bytes of body that follow the head"""
    client: socket.socket
    server: socket.socket
    flow: Flow
    proxy: "Proxy"
    flipped: bool = False

    def forward(self, fraction: float = 1.0, rate: float = 0.0) -> None:
        """Send the head and ``fraction`` of the body to the server, ``rate`` bytes a second if given."""
        self.server.sendall(EXPECT.sub(b"\r\n", self.head))
        if EXPECT.search(self.head):
            self.client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        left = int(self.length * fraction)
        while left:
            piece = self.client.recv(min(left, PIECE))
            if not piece:
                raise ConnectionAbortedError
            left -= len(piece)
            if self.flipped and not left:
                piece = piece[:-1] + bytes([piece[-1] ^ 1])
            self.server.sendall(piece)
            time.sleep(len(piece) / rate if rate else 0)


Fault = Callable[[Exchange], None]


@dataclass
class Rule:
    pattern: re.Pattern[str]
    fault: Fault
    times: int
    met: threading.Event = field(default_factory=threading.Event)


def answer(status: int, body: str = "") -> Fault:
    """The proxy answers in the server's place; the server never sees the request."""

    def fault(exchange: Exchange) -> None:
        content = body.encode()
        head = f"HTTP/1.1 {status} {responses[status]}\r\nContent-Type: application/xml\r\n"
        head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        only_head = exchange.line.startswith("HEAD ")
        exchange.client.sendall(head.encode() + (b"" if only_head else content))
        raise ConnectionAbortedError

    return fault


def s3_error(status: int, code: str) -> Fault:
    """The proxy answers with an error as S3 words it."""
    return answer(status, f"<Error><Code>{code}</Code><Message>by the script</Message></Error>")


def cut(meanwhile: Callable[[], object] = lambda: None) -> Fault:
    """Half of the request's body reaches the server, then ``meanwhile`` is called and the connection breaks."""

    def fault(exchange: Exchange) -> None:
        exchange.forward(fraction=0.5)
        meanwhile()
        raise ConnectionAbortedError

    return fault


def hang(exchange: Exchange) -> None:
    """The request is taken and never answered, until the proxy closes."""
    exchange.proxy.closing.wait()
    raise ConnectionAbortedError


def slow(rate: float) -> Fault:
    """The request's body goes through at ``rate`` bytes a second."""
    return lambda exchange: exchange.forward(rate=rate)


def answer_up_to(size: int) -> Fault:
    """The request goes through; the connection breaks after ``size`` bytes of the answer, or before any."""

    def fault(exchange: Exchange) -> None:
        exchange.flow.left = size
        exchange.forward()

    return fault


def flip(exchange: Exchange) -> None:
    """The last bit of the request's body is another when it arrives."""
    exchange.flipped = True
    exchange.forward()


def calling(function: Callable[[], object]) -> Fault:
    """``function`` is called, then the request goes through."""

    def fault(exchange: Exchange) -> None:
        function()
        exchange.forward()

    return fault


class Proxy:
    """Listens on a free loopback port and passes connections on to the server at ``upstream``."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.requests: list[str] = []
        """the lines of all requests so far"""
        self.closing = threading.Event()
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def at(self, pattern: str, fault: Fault, times: int = 1) -> threading.Event:
        """Let ``fault`` happen to the next ``times`` requests whose line matches; set when the first did."""
        rule = Rule(re.compile(pattern), fault, times)
        with self._lock:
            self._rules.append(rule)
        return rule.met

    def clear(self) -> None:
        """Forget the script and the requests."""
        with self._lock:
            self._rules.clear()
            self.requests.clear()

    def close(self) -> None:
        self.closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                server = socket.create_connection(("127.0.0.1", self.upstream))
            except OSError:  # the server is down: a refused connection, as near as a proxy can come to it
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                return
            with server:
                for one in (client, server):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                flow = Flow()
                threading.Thread(target=_pump, args=(server, client, flow), daemon=True).start()
                try:
                    while head := _head(client):
                        self._exchange(head, client, server, flow)
                except OSError:  # this connection ends here
                    for one in (client, server):
                        try:
                            one.shutdown(socket.SHUT_RDWR)
                        except OSError:
                            continue

    def _exchange(self, head: bytes, client: socket.socket, server: socket.socket, flow: Flow) -> None:
        text = head.decode("latin-1")
        line = text.partition(" HTTP/")[0]
        sized = re.search(r"(?im)^content-length: *(\d+)", text)
        exchange = Exchange(line, head, int(sized[1]) if sized else 0, client, server, flow, self)
        with self._lock:
            self.requests.append(line)
            rule = next((one for one in self._rules if one.times > 0 and one.pattern.search(line)), None)
            if rule:
                rule.times -= 1
                rule.met.set()
        (rule.fault if rule else Exchange.forward)(exchange)


def _head(client: socket.socket) -> bytes:
    """The bytes of a request up to the empty line; none at the connection's end."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = client.recv(1)
        if not byte:
            return b""
        head += byte
    return head


def _pump(source: socket.socket, target: socket.socket, flow: Flow) -> None:
    """Pass on what the server answers."""
    try:
        while piece := source.recv(PIECE):
            if flow.left is not None:
                piece = piece[: flow.left]
                flow.left -= len(piece)
            target.sendall(piece)
            if flow.left == 0:
                break
        target.shutdown(socket.SHUT_RDWR)
        source.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
