"""REST over TLS: the one context of a server, which shows whatever certificate is there now."""

import ssl

from tls.identity import Identity


def server_context(identity: Identity) -> ssl.SSLContext:
    """A context for servers, each of whose new connections uses the files as they are by then.

    It is told of each handshake by what looks at the name that is asked for, also if there is none,
    and passes it on to the context of the present files: one context cannot forget a former CA.
    """
    context = identity.current().context

    def choose(handshake: ssl.SSLObject, _name: str, _context: ssl.SSLContext) -> None:
        handshake.context = identity.current().context

    context.sni_callback = choose
    return context
